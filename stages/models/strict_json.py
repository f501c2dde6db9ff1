"""Read a JSON object strictly: no duplicate keys, no NaN; what is wrong is said with its place."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path


def read_object(path: Path, name: str) -> dict[str, Any]:
    """Return the JSON object in ``path``; :class:`ValueError` calling the file ``name`` if it is none."""
    try:
        value = parse(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{name}: expected a JSON object, found {type(value).__name__}")
    return value


def parse(data: bytes) -> Any:
    """Return the JSON value in UTF-8 ``data``; :class:`ValueError` says what is wrong, without the file."""
    return json.loads(data.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant)


def _no_duplicates(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key '{key}' occurs twice in one object")
        found[key] = value
    return found


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not a JSON number")
