"""Read a JSON object strictly: no duplicate keys, no NaN, no half characters, no endless files.

Infinity, which JSON has not, stands in configs all the same (``time_step_limit`` of Mamba 2): transformers 5 writes it
as the object ``{"__float__": "Infinity"}``, and as that it is read here where Python's own JSON was written.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from stages.checkpoint import misplaced

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from stages.documents.files import JsonObject

MAX_BYTES = 64 << 20  # far above any real file: the index of a checkpoint of 100,000 tensors has 10 MB
BLOCK = 1 << 20  # bytes read at a time
# Of a text, each of which takes up to 200 bytes of memory: a file of 64 MB could fill gigabytes. The header of 100,000
# tensors has 1,500,000.
MAX_VALUES = 3_000_000
MAX_SHOWN = 80  # characters of a value in a message


def shown(value: Any) -> str:
    """Return ``value`` as it reads in a message, shortened."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def read_bounded(path: Path, limit: int) -> bytes | None:
    """Return the content of a file, None for more than ``limit`` bytes.

    What is read counts and not what a stat says: a file may grow meanwhile, and the size of some says nothing.
    """
    data = bytearray()
    with path.open("rb") as file:
        while len(data) <= limit and (block := file.read(BLOCK)):
            data += block
    return bytes(data) if len(data) <= limit else None


def read_object(path: Path, name: str) -> JsonObject:
    """Return the JSON object in ``path``; :class:`ValueError` calling the file ``name`` if it is none."""
    data = read_bounded(path, MAX_BYTES)
    if data is None:
        raise ValueError(f"{name}: more than {MAX_BYTES:,} bytes are too many for a config")
    if instead := misplaced.no_text(data):
        raise ValueError(f"{name}: {instead}")
    try:
        value = parse(data, _infinite)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{name}: expected a JSON object, found {type(value).__name__}")
    return value


def parse(data: bytes, constant: Callable[[str], Any] | None = None) -> Any:
    """Return the JSON value in UTF-8 ``data``; :class:`ValueError` says what is wrong, without the file. ``constant``
    makes a value of Infinity, -Infinity or NaN, which are refused without it.
    """
    values = data.count(b",") + data.count(b"[") + data.count(b"{")
    if values > MAX_VALUES:
        raise ValueError(f"about {values:,} values are too many for a config (at most {MAX_VALUES:,} are read)")
    text = data.decode("utf-8")
    constant = constant or _no_constant
    value = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=constant, parse_float=_finite)
    if "\\u" in text:  # nothing else can make half a character
        _no_surrogates(value)
    return value


def _no_duplicates(pairs: Iterable[tuple[str, object]]) -> JsonObject:
    found: dict[str, object] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {shown(key)} occurs twice in one object")
        found[key] = value
    return found


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not a JSON number")


def _infinite(text: str) -> dict[str, str]:
    if text == "NaN":
        _no_constant(text)
    return {"__float__": text}


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:MAX_SHOWN]} is beyond every floating-point number")
    return value


def _no_surrogates(value: Any) -> None:
    """Refuse an escape that is one half of a pair, in a key or a text: it can be neither written nor printed."""
    if isinstance(value, str):
        if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
            raise ValueError(f"{shown(value)} holds half of a surrogate pair, which is no character")
    elif isinstance(value, list):
        for item in value:
            _no_surrogates(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            _no_surrogates(key)
            _no_surrogates(item)
