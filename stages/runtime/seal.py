"""The seal of bundle.json: a digest of all else that it says, by which damage to it is told from what was written."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

KEY = "sha256"


def seal(document: Mapping[str, Any]) -> str:
    """Return the SHA-256 in hex of what a document says, its own seal left out."""
    said = {key: value for key, value in document.items() if key != KEY}
    return hashlib.sha256(json.dumps(said, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
