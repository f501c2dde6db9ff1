"""Which tokens a query attends to, of more than it may: those that score most with an indexer's keys, in float32.

A token's score is the sum over heads of the positive part of q times its key, by the weight of each head. Keys lie in
blocks of 16 tokens, channel by channel; what comes out are words of 16 bits, integers in float32, the token of the
lowest position in the lowest bit.
"""

from __future__ import annotations

import functools
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T  # noqa: N812

from stages.kernels.cpu.vectors import constant, get, kernel, put, span, splat, total, vector
from stages.sizes import PAGE_SIZE as PAGE
from stages.sizes import words_of

LEAST = -(1 << 31)


def kept_keys(size: int, context: int) -> int:
    """Return how many numbers the keys of ``context`` tokens are, in whole blocks."""
    return (words_of(context) - 1) * PAGE * size


@functools.cache
def choose_tokens(heads: int, size: int, count: int, context: int) -> tirx.PrimFunc:
    """(q [r, heads * size], k [r, size], weights [r, heads], positions [r, 1], before [b, kept], ends int32 [b])
    -> (words [r, words], after): the ``count`` tokens that score most, of equal ones those that come first.

    Rows are those of :mod:`stages.kernels.recurrences`; the state are the keys by position.
    """
    words, kept = words_of(context), kept_keys(size, context)
    with kernel() as made:
        rows, batch = T.int64(), T.int64()
        q = made.argument("q", (rows, heads * size), "float32")
        k = made.argument("k", (rows, size), "float32")
        weights = made.argument("weights", (rows, heads), "float32")
        positions = made.argument("positions", (rows, 1), "float32")
        before = made.argument("before", (batch, kept), "float32")
        ends = made.argument("ends", (batch,), "int32")
        y = made.argument("y", (rows, words), "float32")
        after = made.argument("after", (batch, kept), "float32")

        def position(row: Any) -> Any:
            return T.bind(T.max(T.min(T.Cast("int64", positions[row, 0]), context - 1), 0))

        with T.parallel(0, batch) as sequence:
            with T.serial(0, kept // PAGE) as line:
                put(after, before[sequence, span(line * PAGE, PAGE)], sequence, span(line * PAGE, PAGE))
            earlier = T.if_then_else(sequence > 0, T.Cast("int64", ends[T.max(sequence - 1, 0)]) + 1, 0)
            first = T.bind(T.max(earlier, 0))
            last = T.min(T.Cast("int64", ends[sequence]), rows - 1)
            with T.serial(0, T.max(last + 1 - first, 0)) as i, T.serial(0, size) as channel:
                at = position(first + i)
                put(after, k[first + i, channel], sequence, (at // PAGE * size + channel) * PAGE + at % PAGE)
        with T.parallel(0, rows) as row:
            at = position(row)
            blocks = T.bind(at // PAGE + 1)
            sequence = vector(1, "int64")
            put(sequence, T.int64(0), 0)
            with T.serial(0, batch - 1) as s:
                put(sequence, sequence[0] + T.if_then_else(T.Cast("int64", ends[s]) < row, T.int64(1), T.int64(0)), 0)
            with T.serial(0, words) as word:
                put(y, T.if_then_else(word < blocks, T.float32((1 << PAGE) - 1), T.float32(0)), row, word)
            with T.If(at >= count), T.Then():
                ranks = T.alloc_buffer((kept // size,), "int32")
                with T.serial(0, blocks) as block:
                    score = _score(q, weights, after, (row, sequence[0], block), heads, size)
                    seen = T.Cast("int64x16", T.ramp(0, 1, PAGE)) + splat(block * PAGE, PAGE) <= splat(at, PAGE)
                    put(ranks, T.Select(seen, _rank(score), constant(LEAST, PAGE, "int32")), span(block * PAGE, PAGE))
                _words(y, row, ranks, blocks, count)
    return made.function


def _score(q: Any, weights: Any, keys: Any, place: tuple[Any, Any, Any], heads: int, size: int) -> Any:
    """Return the scores of the tokens of a block of a sequence with the query of a row."""
    row, sequence, block = place
    scores, product = vector(PAGE), vector(PAGE)
    put(scores, constant(0, PAGE), span(0, PAGE))
    with T.serial(0, heads) as head:
        put(product, constant(0, PAGE), span(0, PAGE))
        with T.serial(0, size) as channel:
            key = keys[sequence, span((block * size + channel) * PAGE, PAGE)]
            put(product, get(product, PAGE) + key * splat(q[row, head * size + channel], PAGE), span(0, PAGE))
        positive = T.max(get(product, PAGE), constant(0, PAGE))
        put(scores, get(scores, PAGE) + positive * splat(weights[row, head], PAGE), span(0, PAGE))
    return get(scores, PAGE)


def _rank(score: Any) -> Any:
    """Return integers in the order of float32 numbers, of which none is a negative zero."""
    bits = T.reinterpret(f"int32x{PAGE}", score)
    return T.Select(bits < constant(0, PAGE, "int32"), bits ^ constant((1 << 31) - 1, PAGE, "int32"), bits)


def _words(y: Any, row: Any, ranks: Any, blocks: Any, count: int) -> None:
    """Write which tokens are of the ``count`` highest ranks, whose lowest is found bit by bit."""
    limit, found, left, word = vector(1, "int64"), vector(PAGE, "int32"), vector(1, "int32"), vector(1, "int32")

    def above(rank: Any) -> Any:
        """Return how many tokens have a rank of so much or more."""
        put(found, constant(0, PAGE, "int32"), span(0, PAGE))
        with T.serial(0, blocks) as block:
            more = ranks[span(block * PAGE, PAGE)] >= splat(rank, PAGE)
            put(found, get(found, PAGE) + T.Cast(f"int32x{PAGE}", more), span(0, PAGE))
        return total(found, PAGE)

    put(limit, T.int64(LEAST), 0)
    with T.serial(0, 32) as bit:
        higher = T.bind(limit[0] + T.shift_left(T.int64(1), T.Cast("int64", 31 - bit)))
        with T.If(above(T.Cast("int32", higher)) >= count), T.Then():
            put(limit, higher, 0)
    lowest = T.bind(T.Cast("int32", limit[0]))
    put(left, count - above(lowest + 1), 0)
    with T.serial(0, blocks) as block:
        put(word, T.int32(0), 0)
        with T.serial(0, PAGE) as lane:
            rank = T.bind(ranks[block * PAGE + lane])
            equal = T.bind(T.Cast("int32", T.And(rank == lowest, left[0] > 0)))
            put(left, left[0] - equal, 0)
            put(word, word[0] + T.shift_left(equal + T.Cast("int32", rank > lowest), T.Cast("int32", lane)), 0)
        put(y, T.Cast("float32", word[0]), row, block)
