"""Seals JSON documents: a digest of all other fields, by which damage is detected.

bundle.json has one, and may be laid out in any way. A certificate and a result are *fixed* besides: there is one way to
write what they say, so that no byte of their files can be another.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

KEY = "sha256"


def seal(document: Mapping[str, object]) -> str:
    """Return the SHA-256 in hex of what a document says, its own seal left out."""
    content = {key: value for key, value in document.items() if key != KEY}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def fixed(document: Mapping[str, object]) -> bytes:
    """Return the one file, in UTF-8, that says what ``document`` does, with its seal; :class:`ValueError` for NaN."""
    content = {**document, KEY: seal(document)}
    return (json.dumps(content, ensure_ascii=False, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()
