"""How documents are written: sorted keys and no numbers that JSON lacks, so that equal documents are equal bytes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def json_text(document: object) -> str:
    """Return the text of a document, a line for each value."""
    return json.dumps(document, allow_nan=False, ensure_ascii=False, indent=1, sort_keys=True) + "\n"


def write_json(path: Path, document: object) -> None:
    """Write a document."""
    path.write_text(json_text(document), "utf-8")
