"""Attention over the paged KV cache on a CPU, in float32: tiles of rows against 16 tokens at a time.

A row is one head of one query. The rows of a tile share their head of keys; each task of a thread is one head of keys
and some rows. Three passes over a tile: scores with their maximum, exponentials with their sum, the weighted values.
Scores are in units of log 2; ``lse`` is the log to that base of the sum of their powers, -5e4 where nothing is seen, as
TVM's kernels have it: with a weight of zero it merges with what was computed elsewhere.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T  # noqa: N812

from stages.kernels.cpu.kv_cache import Heads
from stages.kernels.cpu.vectors import constant, exp2, get, kernel, put, span, splat, tanh, total, vector
from stages.sizes import PAGE_SIZE as PAGE

LOWEST, HIDDEN = -5e4, -1e30
ROWS = 4  # rows of a tile
TILE_TOKENS = 32  # queries of one task of a prefill
LOG2E = math.log2(math.e)


@dataclass(frozen=True)
class Source:
    """Where the keys and values of one sequence are: ``key(block, channel)`` of 16 tokens in lanes, ``value(token,
    start, lanes)`` of one token; tokens of a ``block`` number are its 16. ``begins`` says whether the first token of
    the sequence is among them: a sink belongs to those. ``first`` is the position of the first of them.
    """

    key: Callable[[Any, Any], Any]
    value: Callable[[Any, Any, int], Any]
    begins: Any
    first: Any


@dataclass(frozen=True)
class Options:
    """What a model asks of attention. A score x becomes ``cap`` * tanh(x / cap) where there is one. In the channel
    ``sink`` of queries, if it is one, is the score of what is attended to and has no value. With a ``chunk``, layers
    whose scale is negative see the tokens of the query's chunk of positions alone. With ``words``, those are seen whose
    bits are 1 in so many channels from ``chosen`` on of the heads of the query, one head after the other.
    """

    cap: float = 0.0
    sink: int = 0
    chunk: int = 0
    chosen: int = 0
    words: int = 0


PLAIN = Options()
Range = tuple[Any, Any]  # of tokens: the first, and the one behind the last


def _is_zero(token: Any) -> bool:
    """Say whether a range begins with the first token, whatever the arguments."""
    return isinstance(token, int) and token == 0


def _bound(token: Any) -> Any:
    """Compute ``token`` once."""
    return 0 if _is_zero(token) else T.bind(token)


def _least(tokens: Sequence[Any]) -> Any:
    """Return the first of ``tokens``: queries of several sequences come in no order of their positions."""
    return 0 if any(map(_is_zero, tokens)) else _bound(functools.reduce(T.min, tokens))


class _Kernel:
    """What all attention kernels declare, and the tile that they are made of. ``width`` is how many channels of a row
    have accumulators at the same time.
    """

    def __init__(self, heads: Heads, width: int, options: Options) -> None:
        self.heads = heads
        self.width = width
        self.cap, self.sink, self.chunk = options.cap, options.sink, options.chunk
        self.chosen, self.words = options.chosen, options.words
        self.q: Any = None
        self.output: Any = None
        self.lse: Any = None
        self.sm_scale: Any = None
        self.chunked: Any = None
        self.scores: Any = None

    def outputs(self, made: Any, n: Any) -> None:
        """Declare the output and the log-sum-exp of n queries."""
        self.output = self.heads.rows(made, "output", n)
        self.lse = self.heads.sums(made, "lse", n)

    def scale(self, made: Any) -> None:
        """Declare the arguments of all kernels that come last; rotation has happened before."""
        made.number("rotary_mode", "int32")
        made.number("rope_scale", "float32")
        made.number("rope_theta", "float32")
        self.sm_scale = made.number("sm_scale", "float32")
        if self.chunk:
            self.chunked = self.sm_scale < 0
            self.sm_scale = T.bind(tirx.abs(self.sm_scale))

    def first_seen(self, window: int, query: Any, first: Any, end: Any) -> Any:
        """Return the index of the first token that a query sees, from its position and the ``first`` token's."""
        if self.chunk:
            before = T.min(T.max(query // self.chunk * self.chunk - first, 0), end)
            return T.if_then_else(self.chunked, before, 0)
        return first_seen(window, query, first, end)

    def room(self, blocks: Any) -> None:
        """Make room for the scores of a tile against so many blocks; once per task, for its size is known late."""
        self.scores = T.alloc_buffer((ROWS, blocks * PAGE), "float32")

    def tile(self, rows: Sequence[tuple[Any, Any]], seen: Sequence[Range], source: Source) -> None:
        """Emit a tile: ``rows`` are (query, head), each sees its range of tokens; the last ends last."""
        scores, seen = self.scores, [(_bound(low), T.bind(high)) for low, high in seen]
        low, high = _least([low for low, _ in seen]), seen[-1][1]
        first, end = _bound(low // PAGE), T.bind((high + PAGE - 1) // PAGE)
        peaks, sums = ([vector(PAGE) for _ in rows] for _ in range(2))
        for peak, part in zip(peaks, sums, strict=True):
            put(peak, constant(LOWEST, PAGE), span(0, PAGE))
            put(part, constant(0, PAGE), span(0, PAGE))
        with T.serial(first, end) as block:
            self._scores(rows, seen, block, source, peaks)
        floors = [self._floor(row, source) for row in rows]
        for peak, floor in zip(peaks, floors, strict=True):
            total(peak, PAGE, T.max)
            if self.sink:
                put(peak, T.max(peak[0], floor), 0)
        with T.serial(first, end) as block:
            for number, (peak, part) in enumerate(zip(peaks, sums, strict=True)):
                at = (number, span(block * PAGE, PAGE))
                put(scores, exp2(scores[at] - splat(peak[0], PAGE), PAGE), *at)
                put(part, get(part, PAGE) + scores[at], span(0, PAGE))
        for (query, head), peak, part, floor in zip(rows, peaks, sums, floors, strict=True):
            # Where nothing is seen the sum is one, of nothing.
            put(part, total(part, PAGE) + T.exp2(floor - peak[0]), 0)
            put(self.lse, peak[0] + T.log2(part[0]), query, head)
            put(part, T.float32(1) / part[0], 0)
        for start in range(0, self.heads.dim, self.width):
            self._values(rows, start, min(self.width, self.heads.dim - start), (low, high), source, scores, sums)

    def _floor(self, row: tuple[Any, Any], source: Source) -> Any:
        """Return the score of what is attended to beside tokens and has no value: a sink, or nothing."""
        if not self.sink:
            return T.float32(LOWEST)
        score = T.max(self.q[(*row, self.sink)] * T.float32(LOG2E), T.float32(LOWEST))
        return T.bind(T.if_then_else(source.begins, score, T.float32(LOWEST)))

    def _scores(
        self, rows: Sequence[tuple[Any, Any]], seen: Sequence[Range], block: Any, source: Source, peaks: Any
    ) -> None:
        ways = max(1, 4 // len(rows))  # independent sums, so that no addition waits for the one before
        parts = [[vector(PAGE) for _ in range(ways)] for _ in rows]
        for ways_of_row in parts:
            for part in ways_of_row:
                put(part, constant(0, PAGE), span(0, PAGE))
        # Unrolled by TVM: written out here it is the same machine code, from IR of four times the size.
        with T.unroll(0, self.heads.dim // ways) as few:
            for way in range(ways):
                channel = few * ways + way
                for (query, head), ways_of_row in zip(rows, parts, strict=True):
                    part, x = ways_of_row[way], splat(self.q[query, head, channel], PAGE)
                    put(part, get(part, PAGE) + source.key(block, channel) * x, span(0, PAGE))
        for number, (ways_of_row, (low, high), peak) in enumerate(zip(parts, seen, peaks, strict=True)):
            score = sum((get(part, PAGE) for part in ways_of_row[1:]), get(ways_of_row[0], PAGE))
            if self.cap:
                score = tanh(score * splat(self.sm_scale * T.float32(1 / self.cap), PAGE), PAGE)
                score = score * constant(self.cap * LOG2E, PAGE)
            else:
                score = score * splat(self.sm_scale * T.float32(LOG2E), PAGE)
            tokens = T.ramp(block * PAGE, 1, PAGE)
            visible = tokens < splat(high, PAGE)
            if not _is_zero(low):
                visible = T.And(visible, tokens >= splat(low, PAGE))
            if self.words:
                bits = self._bits(rows[number][0], source.first + block * PAGE)
                visible = T.And(visible, (splat(bits, PAGE) >> T.ramp(0, 1, PAGE)) % constant(2, PAGE, "int32") == 1)
            put(ways_of_row[0], T.Select(visible, score, constant(HIDDEN, PAGE)), span(0, PAGE))
            put(self.scores, get(ways_of_row[0], PAGE), number, span(block * PAGE, PAGE))
            put(peak, T.max(get(peak, PAGE), get(ways_of_row[0], PAGE)), span(0, PAGE))

    def _bits(self, query: Any, position: Any) -> Any:
        """Return which of the tokens from a position on a query sees, from the lowest bit on: PAGE of them."""

        def word(number: Any) -> Any:
            channel = self.chosen + number % self.words
            return T.Cast("int32", self.q[query, T.min(number // self.words, self.heads.queries - 1), channel])

        both = word(position // PAGE) + word(position // PAGE + 1) * (1 << PAGE)
        return T.bind(T.shift_right(T.Cast("int64", both), T.Cast("int64", position % PAGE)))

    def _values(
        self, rows: Sequence[Any], start: int, width: int, seen: Range, source: Source, scores: Any, inverse: Any
    ) -> None:
        parts = [vector(width) for _ in rows]
        for part in parts:
            put(part, constant(0, width), span(0, width))
        with T.serial(*seen) as token:
            for number, part in enumerate(parts):
                weight = splat(scores[number, token], width)
                put(part, get(part, width) + source.value(token, start, width) * weight, span(0, width))
        for (query, head), part, one in zip(rows, parts, inverse, strict=True):
            put(self.output, get(part, width) * splat(one[0], width), query, head, span(start, width))


class _Pages:
    """The page table of a batch, and the sources that it makes of pages.

    It has one block of each sequence; after a fork a sequence has several, and the kernel is called for each.
    ``numbers`` is how many the runtime tells of a block's length: one, or three, of which the others are zero here.
    """

    def __init__(self, heads: Heads, made: Any, batch: Any, numbers: int) -> None:
        self.heads = heads
        self.pages = heads.pages(made, T.int32())
        self.count = T.int32()
        self.starts = made.argument("page_starts", (batch + 1,), "int32", inside=True)
        self.numbers = made.argument("page_numbers", (self.count,), "int32", inside=True)
        self.first_row = (0,) if numbers > 1 else ()
        shape = (numbers, batch) if numbers > 1 else (batch,)
        self.lengths = made.argument("lengths", shape, "int32", inside=True)  # the first: tokens of the last page

    def end(self, sequence: Any) -> Any:
        """Return how many tokens there are of a sequence."""
        used = self.starts[sequence + 1] - self.starts[sequence]
        return T.if_then_else(used > 0, (used - 1) * PAGE + self.lengths[(*self.first_row, sequence)], 0)

    def source(self, sequence: Any, head: Any, first: Any, end: Any) -> Source:
        """Return where a head of a sequence is, of which these are the tokens from position ``first`` on to ``end``."""

        def page(block: Any) -> Any:
            return self.numbers[self.starts[sequence] + block]

        return Source(
            lambda block, channel: self.heads.page_keys(self.pages, page(block), head, channel),
            lambda token, start, lanes: self.heads.page_value(
                self.pages, page(token // PAGE), head, token % PAGE, start, lanes
            ),
            T.And(first == 0, end > 0),
            first,
        )


def decode(heads: Heads, width: int, window: int = 0, numbers: int = 1, options: Options = PLAIN) -> tirx.PrimFunc:
    """Return the kernel of one query of each sequence against the tokens that the cache holds of it, within a
    ``window`` if there is one; ``numbers`` of lengths are told.
    """
    attention = _Kernel(heads, width, options)
    with kernel() as made:
        batch = T.int32()
        attention.q = heads.rows(made, "q", batch)
        cache = _Pages(heads, made, batch, numbers)
        k_positions, q_positions = positions_of(made, batch, batch)
        attention.outputs(made, batch)
        attention.scale(made)
        with T.parallel(0, batch * heads.keys) as task:
            sequence, head = task // heads.keys, task % heads.keys
            attention.room(cache.count)
            end = T.bind(cache.end(sequence))
            source = cache.source(sequence, head, k_positions[sequence], end)
            low = _bound(attention.first_seen(window, q_positions[sequence], k_positions[sequence], end))
            for first in range(0, heads.group, ROWS):
                members = range(first, min(first + ROWS, heads.group))
                rows = [(sequence, head * heads.group + member) for member in members]
                attention.tile(rows, [(low, end)] * len(rows), source)
    return made.function


def prefill(heads: Heads, width: int, window: int = 0, numbers: int = 1, options: Options = PLAIN) -> tirx.PrimFunc:
    """Return the kernel of the queries of several sequences against the tokens that the cache holds of each, within a
    ``window`` if there is one; those of a chunk see each other elsewhere. ``numbers`` of lengths are told.
    """
    attention = _Kernel(heads, width, options)
    with kernel() as made:
        n, batch = T.int32(), T.int32()
        attention.q = heads.rows(made, "q", n)
        starts = made.argument("q_starts", (batch + 1,), "int32", inside=True)
        cache = _Pages(heads, made, batch, numbers)
        k_positions, q_positions = positions_of(made, batch, n)
        attention.outputs(made, n)
        made.number("causal", "int32")  # for TVM's kernels: within a window or not
        attention.scale(made)

        def sequences(head: Any, low: Any, high: Any) -> None:
            attention.room(cache.count)
            with T.serial(0, batch) as s:
                bounds = T.bind(T.max(low, starts[s])), T.bind(T.min(high, starts[s + 1]))
                end = T.bind(cache.end(s))

                def seen(query: Any) -> Range:
                    return attention.first_seen(window, q_positions[query], k_positions[s], end), end

                _queries(attention, head, bounds, seen, cache.source(s, head, k_positions[s], end))

        _tasks(heads, n, sequences)
    return made.function


def positions_of(made: Any, batch: Any, n: Any) -> tuple[Any, Any]:
    """Declare the positions of the first tokens that the cache holds, and of queries."""
    sizes = {"k_positions": batch, "q_positions": n}
    keys, queries = (made.argument(name, (size,), "int32", inside=True) for name, size in sizes.items())
    return keys, queries


def first_seen(window: int, query: Any, first: Any, end: Any) -> Any:
    """Return the index of the first token within a query's window, from its position and the ``first`` token's."""
    return T.min(T.max(query - first - (window - 1), 0), end) if window else 0


def prefill_ragged(heads: Heads, width: int, options: Options = PLAIN) -> tirx.PrimFunc:
    """Return the kernel of the queries of several sequences against the keys and values that came with them."""
    attention = _Kernel(heads, width, options)
    with kernel() as made:
        n, m, batch = T.int32(), T.int32(), T.int32()
        attention.q = heads.rows(made, "q", n)
        starts = made.argument("q_starts", (batch + 1,), "int32", inside=True)
        k, v = (heads.tokens(made, name, m) for name in ("k", "v"))
        kv_starts = made.argument("kv_starts", (batch + 1,), "int32", inside=True)
        q_positions = made.argument("q_positions", (n,), "int32", inside=True)
        k_positions = made.argument("k_positions", (batch,), "int32", inside=True)
        attention.outputs(made, n)
        causal = made.number("causal", "int32")
        attention.scale(made)

        def sequences(head: Any, low: Any, high: Any) -> None:
            blocks = (m + PAGE - 1) // PAGE
            turned = T.alloc_buffer((blocks, heads.dim, PAGE), "float32")
            attention.room(blocks)
            with T.serial(0, batch) as s:
                bounds = T.bind(T.max(low, starts[s])), T.bind(T.min(high, starts[s + 1]))
                first = T.bind(kv_starts[s])
                length = T.bind(kv_starts[s + 1] - first)
                last = _last_seen(causal, length, length - (starts[s + 1] - starts[s]), starts[s])

                def seen(query: Any) -> Range:
                    return attention.first_seen(0, q_positions[query], k_positions[s], length), last(query)

                needed = T.bind(T.if_then_else(bounds[0] < bounds[1], last(bounds[1] - 1), 0))
                with T.serial(0, needed) as token, T.serial(0, heads.dim) as d:
                    put(turned, heads.given(k, first + token, head, d, 1), token // PAGE, d, token % PAGE)
                source = Source(
                    lambda block, channel: turned[block, channel, span(0, PAGE)],
                    lambda token, start, lanes: heads.given(v, first + token, head, start, lanes),
                    T.And(k_positions[s] == 0, length > 0),
                    k_positions[s],
                )
                _queries(attention, head, bounds, seen, source)

        _tasks(heads, n, sequences)
    return made.function


def _last_seen(causal: Any, length: Any, before: Any, first: Any) -> Callable[[Any], Any]:
    """Return the end of what a query sees of ``length`` tokens, ``before`` of which come before the sequence's
    ``first``.
    """
    return lambda query: T.if_then_else(causal > 0, T.min(length, before + query - first + 1), length)


def _tasks(heads: Heads, n: Any, body: Callable[[Any, Any, Any], None]) -> None:
    """Emit ``body(head of keys, first query, end)`` for all heads and runs of queries, on all threads."""
    tiles = (n + TILE_TOKENS - 1) // TILE_TOKENS
    with T.parallel(0, tiles * heads.keys) as task:
        # The last queries see the most: they begin, so that no thread is left with a long task at the end.
        tile, head = T.bind(tiles - 1 - task // heads.keys), T.bind(task % heads.keys)
        body(head, tile * TILE_TOKENS, T.min(n, (tile + 1) * TILE_TOKENS))


def _queries(
    attention: _Kernel, head: Any, bounds: tuple[Any, Any], seen: Callable[[Any], Range], source: Source
) -> None:
    """Emit the queries within ``bounds`` for all query heads of a head of keys, in tiles, then one by one."""
    low, high = bounds
    group = attention.heads.group
    count = T.bind(T.max(high - low, 0))
    with T.serial(0, group) as member:
        own = T.bind(head * group + member)

        def tile(start: Any, height: int) -> None:
            first = T.bind(start)
            queries = [first + i for i in range(height)]
            attention.tile([(q, own) for q in queries], [seen(q) for q in queries], source)

        with T.serial(0, count // ROWS) as number:
            tile(low + number * ROWS, ROWS)
        with T.serial(0, count % ROWS) as rest:
            tile(low + count // ROWS * ROWS + rest, 1)
