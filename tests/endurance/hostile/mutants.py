"""Strategies that put sound documents together wrongly: JSON by its tree, text and bytes by pieces."""

from __future__ import annotations

import json
import marshal
import math
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

DEEP: Any = 0
for _ in range(300):
    DEEP = [DEEP]
ODD_TEXTS = (
    "", " ", "\0", "\n", "\x1b[31mred", "\x1b]0;owned\x07", "\u202egnp", "\u200f", "\x9b2J", "\ud800", "\ufeff",
    "../../../../tmp/owned", "/etc/passwd", "/dev/zero", "a/b", "..", "model.safetensors", "{{ 7 * 7 }}", "${vars.x}",
    "(a+)+$", "(", "\\p{", "a" * 5000, "e\u0301", "\U0001f600", "<|endoftext|>", "\u2581", "NaN", "__class__", "*a",
)  # fmt: skip
ODD_VALUES = (
    None, True, False, 0, 1, -1, 255, 2**15, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, 10**30, -(10**18),
    0.0, -0.0, 1.5, -1.5, 1e-320, 1e308, math.nan, math.inf, -math.inf, [], {}, [[]], [None], [0] * 300, {"": 0},
    {"type": 1}, ["a", 1, None, {}], DEEP,
)  # fmt: skip
SCALARS = st.one_of(
    st.sampled_from(ODD_VALUES), st.sampled_from(ODD_TEXTS), st.integers(), st.floats(), st.text(max_size=8)
)
SHAPES = ("replace", "replace", "replace", "delete", "insert", "rename", "repeat", "swap", "wrap")


def copied(value: Any) -> Any:
    """Return a copy of a JSON value, in a twentieth of the time that ``copy.deepcopy`` takes."""
    return marshal.loads(marshal.dumps(value))  # noqa: S302 - of our own making


def places(value: Any, limit: int = 40) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value inside ``value``; of a long table a few of its entries."""
    items = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    for key, inner in items if len(items) <= limit else items[: limit - 8] + items[-8:]:
        yield (key,)
        yield from ((key, *rest) for rest in places(inner, limit))


@st.composite
def trees(draw: st.DrawFn, *seeds: Any, most: int = 4) -> Any:
    """Draw a document with a few values of it replaced, moved, repeated or gone."""
    document = copied(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, most))):
        paths = list(places(document))
        if not paths:
            break
        *outer, last = draw(st.sampled_from(paths))
        holder = document
        for key in outer:
            holder = holder[key]
        _change(draw, holder, last, document, paths)
    return document


def _change(draw: st.DrawFn, holder: Any, last: Any, document: Any, paths: list[tuple[Any, ...]]) -> None:
    shape = draw(st.sampled_from(SHAPES))
    if shape == "delete":
        del holder[last]
    elif shape == "insert" and isinstance(holder, dict):
        holder[draw(st.sampled_from(ODD_TEXTS) | st.text(max_size=8))] = copied(draw(SCALARS))
    elif shape == "rename" and isinstance(holder, dict):
        holder[draw(st.sampled_from(ODD_TEXTS))] = holder.pop(last)
    elif shape == "repeat" and isinstance(holder, list):
        holder.extend([holder[last]] * draw(st.integers(1, 50)))
    elif shape == "swap":
        value = document
        for key in draw(st.sampled_from(paths)):
            value = value[key]
        holder[last] = copied(value)
    elif shape == "wrap":
        holder[last] = draw(st.sampled_from(([holder[last]], {"a": holder[last]}, [holder[last]] * 2)))
    else:
        holder[last] = copied(draw(SCALARS))


@st.composite
def documents(draw: st.DrawFn, *seeds: Any) -> bytes:
    """Draw JSON: mutated by its tree mostly, by its bytes at times, by both."""
    data = json.dumps(draw(trees(*seeds)), ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    return draw(pieces(data)) if draw(st.integers(0, 4)) == 0 else data


@st.composite
def pieces(draw: st.DrawFn, *seeds: bytes, most: int = 4) -> bytes:
    """Draw bytes with some of them replaced, repeated, moved or gone."""
    data = draw(st.sampled_from(seeds))
    for _ in range(draw(st.integers(1, most))):
        if not data:
            break
        start = draw(st.integers(0, len(data) - 1))
        end = start + draw(st.sampled_from((1, 1, 2, 4, 8, 30, 200, len(data))))
        shape = draw(st.sampled_from(("flip", "cut", "end", "put", "put", "repeat", "move")))
        if shape == "flip":
            data = data[:start] + bytes([data[start] ^ (1 << draw(st.integers(0, 7)))]) + data[start + 1 :]
        elif shape == "cut":
            data = data[:start] + data[end:]
        elif shape == "end":
            data = data[:start]
        elif shape == "put":
            odd = draw(
                st.sampled_from(ODD_TEXTS).map(lambda t: t.encode("utf-8", "surrogatepass")) | st.binary(max_size=9)
            )
            data = data[:start] + odd + data[start + draw(st.sampled_from((0, len(odd)))) :]
        elif shape == "repeat":
            data = data[:end] + data[start:end] * draw(st.sampled_from((1, 2, 50, 1000))) + data[end:]
            data = data[: 1 << 20]
        else:
            at = draw(st.integers(0, len(data)))
            data = data[:at] + data[start:end] + data[at:]
    return data


def texts(*seeds: str) -> st.SearchStrategy[bytes]:
    """Draw text with lines and pieces of it out of place."""
    return pieces(*(seed.encode() for seed in seeds)) | shuffled(*seeds)


@st.composite
def shuffled(draw: st.DrawFn, *seeds: str) -> bytes:
    """Draw text with lines out of place."""
    lines = draw(st.sampled_from(seeds)).splitlines(keepends=True)
    for _ in range(draw(st.integers(1, 4))):
        at, to = draw(st.integers(0, len(lines) - 1)), draw(st.integers(0, len(lines) - 1))
        lines[to] = draw(st.sampled_from((lines[at], lines[at] * 2, "", lines[to].replace(":", ": *a", 1))))
    return "".join(lines).encode()
