"""Checks what a verb prints with ``--json`` against its documented schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema

SCHEMA = json.loads((Path(__file__).parents[2] / "docs" / "output.schema.json").read_text())


def validate(document: Any, kind: str) -> None:
    """Fail unless the document is as the schema's definition ``kind`` says."""
    assert kind in SCHEMA["$defs"]
    jsonschema.validate(document, {**SCHEMA, "$ref": f"#/$defs/{kind}"})
