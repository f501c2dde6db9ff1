"""GGUF files as documents that are mutated by their tree: taken apart, and put together whatever a mutation left.

Bytes that are changed at random break a length near the beginning, and nothing behind it is ever read.
"""

from __future__ import annotations

import contextlib
import struct
from typing import Any

TEXT, ARRAY = 8, 9
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
ALIGNMENT = 32  # bytes

Document = dict[str, Any]  # version; metadata: key -> [type, value]; tensors: [name, sizes, type, offset]


def taken_apart(data: bytes) -> tuple[Document, bytes]:
    """Return the document of a sound file, and what follows it."""
    at = 4

    def number(form: str) -> Any:
        nonlocal at
        (found,) = struct.unpack_from(f"<{form}", data, at)
        at += struct.calcsize(form)
        return found

    def text() -> str:
        nonlocal at
        length = number("Q")
        at += length
        return data[at - length : at].decode()

    def value(kind: int) -> Any:
        if kind == ARRAY:
            inner, count = number("I"), number("Q")
            return [inner, [value(inner) for _ in range(count)]]
        return text() if kind == TEXT else number(NUMBERS[kind])

    version, tensors, entries = number("I"), number("Q"), number("Q")
    metadata = {text(): [kind := number("I"), value(kind)] for _ in range(entries)}
    found = [[text(), [number("Q") for _ in range(number("I"))], number("I"), number("Q")] for _ in range(tensors)]
    return {"version": version, "metadata": metadata, "tensors": found}, data[-(-at // ALIGNMENT) * ALIGNMENT :]


def put_together(document: Any, rest: bytes) -> bytes:
    """Return the file of a document, in which anything may be anything."""
    document = document if isinstance(document, dict) else {}
    metadata, tensors = document.get("metadata"), document.get("tensors")
    entries = [_text(key) + _entry(entry) for key, entry in (metadata if isinstance(metadata, dict) else {}).items()]
    infos = [_tensor(tensor) for tensor in (tensors if isinstance(tensors, list) else [])]
    counts = _number(4, document.get("version")) + _number(10, len(infos)) + _number(10, len(entries))
    head = b"".join([b"GGUF", counts, *entries, *infos])
    return head + bytes(-len(head) % ALIGNMENT) + rest


def _tensor(value: Any) -> bytes:
    name, sizes, kind, offset = [*value, *[0] * 4][:4] if isinstance(value, list) else [value, [], 0, 0]
    sizes = sizes if isinstance(sizes, list) else [sizes]
    return _text(name) + b"".join(
        [_number(4, len(sizes)), *(_number(10, size) for size in sizes), _number(4, kind), _number(10, offset)]
    )


def _entry(value: Any) -> bytes:
    """Return a type and a value of it; of what is no pair, a text."""
    kind, inner = value if isinstance(value, list) and len(value) == 2 else (TEXT, value)
    return _number(4, kind) + _value(kind, inner)


def _value(kind: Any, value: Any) -> bytes:
    if kind == ARRAY and isinstance(value, list) and len(value) == 2:
        items = value[1] if isinstance(value[1], list) else [value[1]]
        return _number(4, value[0]) + _number(10, len(items)) + _items(value[0], items)
    return _number(kind, value) if isinstance(kind, int) and kind in NUMBERS else _text(value)


def _items(kind: Any, items: list[Any]) -> bytes:
    with contextlib.suppress(struct.error, TypeError, OverflowError, KeyError):
        return struct.pack(f"<{len(items)}{NUMBERS[kind]}", *items)
    return b"".join(_value(kind, item) for item in items)


def _text(value: Any) -> bytes:
    data = (value if isinstance(value, str) else str(value)[:100]).encode("utf-8", "surrogatepass")
    return len(data).to_bytes(8, "little") + data


def _number(kind: int, value: Any) -> bytes:
    """Return a number as its type stores it; what does not fit as its lowest bits, or as the length of its text."""
    form = NUMBERS[kind]
    with contextlib.suppress(struct.error, TypeError, OverflowError):
        return struct.pack(f"<{form}", value)
    bits = 8 * struct.calcsize(form)
    lowest = (value if isinstance(value, int) else len(str(value))) % 2**bits
    return lowest.to_bytes(bits // 8, "little")
