"""JSON of any content, and the writer of documents: equal ones are equal bytes, with sorted keys and finite numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from pathlib import Path

JsonObject: TypeAlias = Mapping[str, Any]  # of any content: what others wrote, or what is not checked yet


def json_text(document: object) -> str:
    """Return the text of a document, a line for each value."""
    return json.dumps(document, allow_nan=False, ensure_ascii=False, indent=1, sort_keys=True) + "\n"


def write_json(path: Path, document: object) -> None:
    """Write a document."""
    path.write_text(json_text(document), "utf-8")
