"""Kernels around attention for the paged KV cache on a CPU: rotary positions, appending, copying, reading back.

A page holds 16 tokens. Its keys lie transposed, [head_dim, 16]: a vector is one channel of all tokens of a page, and a
score is never summed across lanes. Its values lie [16, head_dim]. Signatures are those of TVM's kernels, which the
runtime calls; all kernels that touch the keys of a page are made here, so that no other needs to know.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T  # noqa: N812

from stages.kernels.cpu.vectors import along, each_row, kernel, put, span
from stages.sizes import PAGE_SIZE as PAGE

LANES = 16


@dataclass(frozen=True)
class Heads:
    """Attention heads: of queries, of keys and values, and their channels, a multiple of 16."""

    queries: int
    keys: int
    dim: int

    @property
    def group(self) -> int:
        """Query heads for each head of keys."""
        return self.queries // self.keys

    def pages(self, made: Any, count: Any) -> Any:
        """Declare the pages of a layer, ``count`` of them, which may begin inside a larger tensor."""
        return made.argument("pages", (count, 2, self.keys, PAGE, self.dim), "float32", inside=True)

    def key(self, page: Any, head: Any, channel: Any, token: Any) -> tuple[Any, ...]:
        """Return the index of a channel of the key of a token of a page."""
        at = channel * PAGE + token
        return (page, 0, head, at // self.dim, at % self.dim)

    def key_channel(self, page: Any, head: Any, channel: Any) -> tuple[Any, ...]:
        """Return the index of one channel of the keys of all tokens of a page."""
        at = channel * PAGE
        return (page, 0, head, at // self.dim, span(at % self.dim, PAGE))


def fits(head_dim: int) -> bool:
    """Say whether the kernels can be made for heads of so many channels."""
    return head_dim % LANES == 0


def beyond(context: int) -> str:
    """Return the error message for a position outside the context."""
    return (
        f"a token at position {context} or later: the library was built for sequences of at most {context} tokens "
        "(context_window of its metadata); shorten the sequence, or build with a larger context_window"
    )


def query_scale(position: Any, log_n: int) -> Any | float:
    """Return the factor of a query for log-n attention (:class:`stages.models.family.AttentionCache`)."""
    if not log_n:
        return 1.0
    logarithm = tirx.log((position + 1).astype("float32"))
    return tirx.max(tirx.const(1, "float32"), logarithm * tirx.const(1 / math.log(log_n), "float32"))


def rope(heads: Heads, context: int, rotary_dim: int, factor: float, log_n: int = 0) -> tirx.PrimFunc:
    """Return the kernel of (qkv, positions, q, k, v, frequencies): heads taken apart, those of q and k turned by their
    position times each frequency and stretched by ``factor``; an angle is computed once per token, not once per head.
    ``log_n`` stretches queries, of which all channels are turned then, besides. Every token passes here, so this is
    where a position outside the ``context`` is refused: the frequencies are chosen for it, the window too.
    """
    half = rotary_dim // 2
    with kernel() as made:
        n = T.int32()
        qkv = made.argument("qkv", (n, heads.queries + 2 * heads.keys, heads.dim), "float32")
        positions = made.argument("positions", (n,), "int32", inside=True)
        outputs = [made.argument(name, (n, count, heads.dim), "float32") for name, count in _parts(heads)]
        frequencies = made.argument("frequencies", (max(half, 1),), "float32")
        with T.serial(0, n) as s, T.Assert(positions[s] < context, beyond(context), "ValueError"):
            T.evaluate(0)

        def row(s: Any) -> None:
            of_keys = of_queries = _angles(positions[s], frequencies, factor, half)
            if log_n:
                of_queries = _stretched(of_keys, query_scale(positions[s], log_n), half)
            first = 0
            turnings = (rotary_dim, of_queries), (rotary_dim, of_keys), (0, of_keys)
            for (_, count), output, (turned, tables) in zip(_parts(heads), outputs, turnings, strict=True):
                with T.serial(0, count) as h:
                    _turn(qkv, output, s, first + h, h, turned, heads.dim, *tables)
                first += count

        each_row(n, max(50 * half, heads.dim), row)
    return made.function


def _angles(position: Any, frequencies: Any, factor: float, half: int) -> list[Any]:
    """Emit cosines and sines of a position times each of ``half`` frequencies; return where they are."""
    tables = [T.alloc_buffer((half,), "float32") for _ in range(2)] if half else []
    if half:
        with T.serial(0, half) as d:
            angle = T.bind(T.Cast("float32", position) * frequencies[d])
            for table, function in zip(tables, (T.cos, T.sin), strict=True):
                put(table, function(angle) * T.float32(factor), d)
    return tables


def _stretched(tables: list[Any], stretch: Any, half: int) -> list[Any]:
    """Emit ``tables`` times a number; return where the products are."""
    products = [T.alloc_buffer((half,), "float32") for _ in tables]
    number = T.bind(stretch)
    with T.serial(0, half) as d:
        for table, product in zip(tables, products, strict=True):
            put(product, table[d] * number, d)
    return products


def _parts(heads: Heads) -> list[tuple[str, int]]:
    return [("q", heads.queries), ("k", heads.keys), ("v", heads.keys)]


def _turn(qkv: Any, output: Any, s: Any, source: Any, h: Any, turned: int, dim: int, *tables: Any) -> None:
    """Emit one head: its first ``turned`` channels turned, halves against each other, the others copied."""
    half = turned // 2

    def rotate(at: Any, lanes: int) -> None:
        low, high = (qkv[s, source, span(at + side, lanes)] for side in (0, half))
        c, n = (table[span(at, lanes)] for table in tables)
        put(output, low * c - high * n, s, h, span(at, lanes))
        put(output, high * c + low * n, s, h, span(at + half, lanes))

    def copy(at: Any, lanes: int) -> None:
        put(output, qkv[s, source, span(turned + at, lanes)], s, h, span(turned + at, lanes))

    if turned:
        along(half, LANES, rotate)
    if turned < dim:
        along(dim - turned, LANES, copy)


def append(heads: Heads) -> tirx.PrimFunc:
    """Return the kernel of (pages, k, v, places): each token's key and value to its place; -1 is none."""
    with kernel() as made:
        n, count = T.int64(), T.int64()
        pages = heads.pages(made, count)
        k, v = (made.argument(name, (n, heads.keys, heads.dim), "float32") for name in ("k", "v"))
        places = made.argument("places", (n,), "int32", inside=True)

        def row(s: Any) -> None:
            with T.If(places[s] != -1), T.Then(), T.serial(0, heads.keys) as h:
                page, token = places[s] // PAGE, places[s] % PAGE
                with T.serial(0, heads.dim) as d:
                    put(pages, k[s, h, d], *heads.key(page, h, d, token))
                along(
                    heads.dim,
                    LANES,
                    lambda at, lanes: put(pages, v[s, h, span(at, lanes)], page, 1, h, token, span(at, lanes)),
                )

        each_row(n, 4 * heads.keys * heads.dim, row)
    return made.function


def copy_page(heads: Heads) -> tirx.PrimFunc:
    """Return the kernel of (pages, from, to, tokens): the first tokens of a page to another page."""
    with kernel() as made:
        pages = heads.pages(made, T.int32())
        source, target, tokens = (made.number(name, "int64") for name in ("source", "target", "tokens"))
        with T.serial(0, heads.keys) as h, T.serial(0, tokens) as t, T.serial(0, heads.dim) as d:
            put(pages, pages[heads.key(source, h, d, t)], *heads.key(target, h, d, t))
            put(pages, pages[source, 1, h, t, d], target, 1, h, t, d)
    return made.function


def read_back(heads: Heads, layers: int) -> tirx.PrimFunc:
    """Return the kernel of (pages, places, k, v, layer): keys and values of the tokens at ``places``."""
    with kernel() as made:
        n = T.int64()
        pages = heads.pages(made, T.int64())
        places = made.argument("places", (n,), "int32", inside=True)
        k, v = (made.argument(name, (layers, n, heads.keys, heads.dim), "float32") for name in ("k", "v"))
        layer = made.number("layer", "int64")
        with T.serial(0, n) as s, T.serial(0, heads.keys) as h, T.serial(0, heads.dim) as d:
            page, token = places[s] // PAGE, places[s] % PAGE
            put(k, pages[heads.key(page, h, d, token)], layer, s, h, d)
            put(v, pages[page, 1, h, token, d], layer, s, h, d)
    return made.function


def move_tokens(heads: Heads) -> tirx.PrimFunc:
    """Return the kernel of (pages, starts, from and to, sequences): tokens to other places, in order."""
    with kernel() as made:
        total = T.int32()
        pages = heads.pages(made, T.int32())
        starts_handle, places_handle = (T.arg(name, T.handle()) for name in ("starts", "places"))
        sequences = made.number("sequences", "int32")
        starts = T.match_buffer(starts_handle, (sequences + 1,), "int32", elem_offset=T.int32())
        places = T.match_buffer(places_handle, (2, total), "int32", elem_offset=T.int32())
        with T.serial(0, starts[sequences]) as i, T.serial(0, heads.keys) as h, T.serial(0, heads.dim) as d:
            (page, token), (to_page, to_token) = ((places[side, i] // PAGE, places[side, i] % PAGE) for side in (0, 1))
            put(pages, pages[heads.key(page, h, d, token)], *heads.key(to_page, h, d, to_token))
            put(pages, pages[page, 1, h, token, d], to_page, 1, h, to_token, d)
    return made.function
