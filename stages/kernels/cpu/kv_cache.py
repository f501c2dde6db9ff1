"""Kernels around attention for the paged KV cache on a CPU: rotary positions, appending, copying, reading back.

A page holds 16 tokens. Its keys lie transposed, [head_dim, 16]: a vector is one channel of all tokens of a page, and a
score is never summed across lanes. Its values lie [16, head_dim]. Signatures are those of TVM's kernels, which the
runtime calls; all kernels that touch the keys of a page are made here, so that no other needs to know.
"""

from __future__ import annotations

import math
from collections.abc import Callable
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

    @property
    def stored(self) -> tuple[int, int, int]:
        """What the runtime is told of ``queries``, ``keys`` and ``dim``, by which it makes room."""
        return self.queries, self.keys, self.dim

    def qkv(self, made: Any, n: Any) -> Any:
        """Declare queries, keys and values of ``n`` tokens: [n, queries + 2 keys, dim]."""
        return made.argument("qkv", (n, self.queries + 2 * self.keys, self.dim), "float32")

    def rows(self, made: Any, name: str, n: Any) -> Any:
        """Declare what ``n`` queries ask, or what attention answers: [n, queries, dim]."""
        return made.argument(name, (n, self.queries, self.dim), "float32")

    def sums(self, made: Any, name: str, n: Any) -> Any:
        """Declare the log-sum-exp of ``n`` queries: [n, queries]."""
        return made.argument(name, (n, self.queries), "float32")

    def tokens(self, made: Any, name: str, *n: Any) -> Any:
        """Declare the keys or the values of ``n`` tokens, or of so many of each layer, that are in no page."""
        return made.argument(name, (*n, self.keys, self.dim), "float32")

    def pages(self, made: Any, count: Any) -> Any:
        """Declare the pages of a layer, ``count`` of them, which may begin inside a larger tensor."""
        return made.argument("pages", (count, 2, self.keys, PAGE, self.dim), "float32", inside=True)

    def keep(self, tokens: Any, s: Any, head: Any, emit: Callable[[Any, Any, Any], None]) -> None:
        """Let ``emit(buffer, row, head)`` write a head of a token, and keep that in ``tokens``."""
        emit(tokens, s, head)

    def given(self, tokens: Any, s: Any, head: Any, start: Any, lanes: int) -> Any:
        """Return channels of a head of a token that is in no page."""
        return tokens[s, head, span(start, lanes)]

    def page_keys(self, pages: Any, page: Any, head: Any, channel: Any) -> Any:
        """Return one channel of the keys of all tokens of a page."""
        at = channel * PAGE
        return pages[page, 0, head, at // self.dim, span(at % self.dim, PAGE)]

    def page_value(self, pages: Any, page: Any, head: Any, token: Any, start: Any, lanes: int) -> Any:
        """Return channels of the value of a token of a page."""
        return pages[page, 1, head, token, span(start, lanes)]

    def append(self, pages: Any, page: Any, token: Any, head: Any, k: Any, v: Any, s: Any) -> None:
        """Emit what puts the key and the value of token ``s`` into a page."""
        with T.serial(0, self.dim) as d:
            put(pages, k[s, head, d], *self._key(page, head, d, token))
        along(
            self.dim,
            LANES,
            lambda at, lanes: put(pages, v[s, head, span(at, lanes)], page, 1, head, token, span(at, lanes)),
        )

    def move(self, pages: Any, source: tuple[Any, Any], target: tuple[Any, Any], head: Any) -> None:
        """Emit what copies a token, (page, token), to another place."""
        (page, token), (to_page, to_token) = source, target
        with T.serial(0, self.dim) as d:
            put(pages, pages[self._key(page, head, d, token)], *self._key(to_page, head, d, to_token))
            put(pages, pages[page, 1, head, token, d], to_page, 1, head, to_token, d)

    def read_back(self, pages: Any, page: Any, token: Any, head: Any, k: Any, v: Any, at: tuple[Any, Any]) -> None:
        """Emit what copies a token out of its page to ``k`` and ``v`` [layers, tokens, keys, dim]."""
        with T.serial(0, self.dim) as d:
            put(k, pages[self._key(page, head, d, token)], *at, head, d)
            put(v, pages[page, 1, head, token, d], *at, head, d)

    def _key(self, page: Any, head: Any, channel: Any, token: Any) -> tuple[Any, ...]:
        at = channel * PAGE + token
        return (page, 0, head, at // self.dim, at % self.dim)


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
        qkv = heads.qkv(made, n)
        positions = made.argument("positions", (n,), "int32", inside=True)
        outputs = [heads.rows(made, "q", n), *(heads.tokens(made, name, n) for name in ("k", "v"))]
        frequencies = made.argument("frequencies", (max(half, 1),), "float32")
        with T.serial(0, n) as s, T.Assert(positions[s] < context, beyond(context), "ValueError"):
            T.evaluate(0)

        def row(s: Any) -> None:
            of_keys = of_queries = _angles(positions[s], frequencies, factor, half)
            if log_n:
                of_queries = _stretched(of_keys, query_scale(positions[s], log_n), half)
            queries, keys, values = outputs
            with T.serial(0, heads.queries) as h:
                _turn((qkv, s, h), (queries, s, h), rotary_dim, heads.dim, *of_queries)
            with T.serial(0, heads.keys) as h:
                source = qkv, s, heads.queries + h
                heads.keep(keys, s, h, lambda *to: _turn(source, to, rotary_dim, heads.dim, *of_keys))
            with T.serial(0, heads.keys) as h:
                behind = qkv, s, heads.queries + heads.keys + h
                heads.keep(values, s, h, lambda *to: _turn(behind, to, 0, heads.dim))

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


def _turn(source: tuple[Any, ...], target: tuple[Any, ...], turned: int, dim: int, *tables: Any) -> None:
    """Emit one head, (buffer, row, head): its first ``turned`` channels turned, halves against each other, the others
    copied.
    """
    (qkv, *of), (output, *to) = source, target
    half = turned // 2

    def rotate(at: Any, lanes: int) -> None:
        low, high = (qkv[(*of, span(at + side, lanes))] for side in (0, half))
        c, n = (table[span(at, lanes)] for table in tables)
        put(output, low * c - high * n, *to, span(at, lanes))
        put(output, high * c + low * n, *to, span(at + half, lanes))

    def copy(at: Any, lanes: int) -> None:
        put(output, qkv[(*of, span(turned + at, lanes))], *to, span(turned + at, lanes))

    if turned:
        along(half, LANES, rotate)
    if turned < dim:
        along(dim - turned, LANES, copy)


def append(heads: Heads) -> tirx.PrimFunc:
    """Return the kernel of (pages, k, v, places): each token's key and value to its place; -1 is none."""
    with kernel() as made:
        n, count = T.int64(), T.int64()
        pages = heads.pages(made, count)
        k, v = (heads.tokens(made, name, n) for name in ("k", "v"))
        places = made.argument("places", (n,), "int32", inside=True)

        def row(s: Any) -> None:
            with T.If(places[s] != -1), T.Then(), T.serial(0, heads.keys) as h:
                heads.append(pages, places[s] // PAGE, places[s] % PAGE, h, k, v, s)

        each_row(n, 4 * heads.keys * heads.dim, row)
    return made.function


def copy_page(heads: Heads) -> tirx.PrimFunc:
    """Return the kernel of (pages, from, to, tokens): the first tokens of a page to another page."""
    with kernel() as made:
        pages = heads.pages(made, T.int32())
        source, target, tokens = (made.number(name, "int64") for name in ("source", "target", "tokens"))
        with T.serial(0, heads.keys) as h, T.serial(0, tokens) as t:
            heads.move(pages, (source, t), (target, t), h)
    return made.function


def read_back(heads: Heads, layers: int) -> tirx.PrimFunc:
    """Return the kernel of (pages, places, k, v, layer): keys and values of the tokens at ``places``, as they are kept
    in a cache.
    """
    with kernel() as made:
        n = T.int64()
        pages = heads.pages(made, T.int64())
        places = made.argument("places", (n,), "int32", inside=True)
        k, v = (heads.tokens(made, name, layers, n) for name in ("k", "v"))
        layer = made.number("layer", "int64")
        with T.serial(0, n) as s, T.serial(0, heads.keys) as h:
            heads.read_back(pages, places[s] // PAGE, places[s] % PAGE, h, k, v, (layer, s))
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
        with T.serial(0, starts[sequences]) as i, T.serial(0, heads.keys) as h:
            source, target = ((places[side, i] // PAGE, places[side, i] % PAGE) for side in (0, 1))
            heads.move(pages, source, target, h)
    return made.function
