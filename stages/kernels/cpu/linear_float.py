"""Kernels of linear layers on a CPU in float32: y = x @ w.T (+ bias) (+ residual), weights unpacked on the way."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import tvm
from tvm import tirx
from tvm.script.ir_builder import tirx as T  # noqa: N812

from stages.kernels.cpu.stored import Stored
from stages.kernels.cpu.vectors import (
    as_float,
    choose,
    constant,
    get,
    kernel,
    prefetch,
    put,
    span,
    splat,
    total,
    vector,
)
from stages.sizes import LEVELED
from stages.sizes import N32_BLOCK as BLOCK

PANEL = 256  # terms of k whose weights are unpacked at once: 32 KiB of floats, which stay in the first-level cache
AHEAD = 4096  # prefetch distance in bytes of kernels that read weights once; hardware prefetchers look less far
LINE = 64  # bytes of a cache line
MANY_STREAMS = 4  # blocks for each stream, or there is one: threads share the blocks of one stream
RUN = 4  # products between which their elements' middle is taken off, see Read
FEW = 2  # up to so many rows, unpacking a panel costs more than unpacking for each row


@dataclass(frozen=True)
class LinearLayer:
    """One linear layer of a graph.

    ``rows`` is the number of rows of x, None where it is known at run time; ``outer`` the number of axes before it,
    all of size one. ``bias`` is the dtype of the bias, empty for none. ``tile`` is (rows, lanes) of the accumulators
    that fit the registers of the target. ``streams`` is how many blocks of features, far apart, one row is multiplied
    by at the same time: that keeps several memory streams in flight. ``dot`` names how bytes are multiplied
    (byte_products.py), where activations are quantized to them; empty where they stay floats.
    """

    weight: Stored
    rows: int | None
    outer: int
    bias: str = ""
    residual: bool = False
    tile: tuple[int, int] = (8, BLOCK)
    streams: int = 1
    dot: str = ""


class Arguments:
    """The tensors of a kernel of ``linear``, declared in the order in which it is called; ``rows`` is how many."""

    def __init__(self, made: Any, linear: LinearLayer) -> None:
        self.linear, weight = linear, linear.weight
        self.rows: Any = T.int64() if linear.rows is None else linear.rows
        self.outer = (0,) * linear.outer
        shape = (1,) * linear.outer + (self.rows,)
        self.inputs(made, shape)
        self.weights = [made.argument(*tensor) for tensor in weight.tensors]
        self.bias = made.argument("bias", (weight.n,), linear.bias) if linear.bias else None
        self.residual = made.argument("residual", (*shape, weight.n), "float32") if linear.residual else None
        self.y = made.argument("y", (*shape, weight.n), "float32")

    def inputs(self, made: Any, shape: tuple[Any, ...]) -> None:
        """Declare the activations, rows of ``shape``."""
        self.x = made.argument("x", (*shape, self.linear.weight.k), "float32")

    def source(self, row: Any) -> Any:
        """Return which row of the activations a row is the product of."""
        return row

    def term(self, row: Any, k: Any) -> Any:
        """Return x[source(row), k]."""
        return self.x[(*self.outer, self.source(row), k)]

    def place(self, row: Any) -> tuple[Any, ...]:
        """Return where y has a row."""
        return (*self.outer, row)

    def features(self, block: Any) -> Any:
        """Return which feature of y is the first of a block of the weight."""
        return block * BLOCK

    def added(self, row: Any, features: Any, lanes: int) -> Any:
        """Return what is added to the products of ``features``, None for nothing."""
        parts = []
        if self.bias is not None:
            parts.append(as_float(self.bias[features], lanes))
        if self.residual is not None:
            parts.append(self.residual[(*self.outer, row, features)])
        return sum(parts[1:], parts[0]) if parts else None

    def write(self, row: Any, block: Any, sums: Any) -> None:
        """Store the BLOCK ``sums`` of a block of features, as far as there are as many."""
        n = self.linear.weight.n
        whole, rest = divmod(n, BLOCK)

        def store(features: Any, value: Any, lanes: int) -> None:
            added = self.added(row, features, lanes)
            put(self.y, value if added is None else value + added, *self.place(row), features)

        def full() -> None:
            store(span(self.features(block), BLOCK), get(sums, BLOCK), BLOCK)

        def part() -> None:
            with T.serial(0, rest) as v:
                store(whole * BLOCK + v, sums[v], 1)

        if not rest:
            full()
        elif not whole:
            part()
        else:
            choose(block < whole, full, part)


def _zeros() -> Any:
    """Return a fresh accumulator of a block, cleared."""
    zeros = vector(BLOCK)
    put(zeros, constant(0, BLOCK), span(0, BLOCK))
    return zeros


@functools.cache
def linear_kernel(linear: LinearLayer) -> tirx.PrimFunc:
    """Return the kernel of (x, stored weight..., [bias], [residual], y)."""
    with kernel() as made:
        Product(Arguments(made, linear)).emit()
    return made.function


class Read(NamedTuple):
    """A row of x as products of packed elements read it.

    ``terms`` [k] are divided by what elements are multiplied by at their places in words. ``offsets`` [k / RUN] correct
    runs of products for elements that count from 0, not from their middle: a correction of a whole group would be many
    times as large as its products, and leave its rounding. ``sums`` [k / group] are what minima are multiplied by.
    """

    terms: Any
    offsets: Any
    sums: Any


class Product:
    """Emits the products of one block of features; ``panel_terms`` of k are unpacked at once for all rows."""

    panel_terms = PANEL

    def __init__(self, arguments: Arguments) -> None:
        self.arguments = arguments
        self.weight = arguments.linear.weight

    def emit(self) -> None:
        """Emit the kernel: blocks of features on all threads."""
        if self.arguments.linear.rows == 1:
            self.single_row()
        else:
            with T.parallel(0, self.weight.blocks) as block:
                self.rows(block)

    def single_row(self) -> None:
        """Emit a kernel of one row: the blocks in streams of the same length, of which the last may end earlier."""
        read, blocks, streams = self.prepared(0), self.weight.blocks, self.arguments.linear.streams
        streams = streams if blocks >= streams * MANY_STREAMS else 1
        length = -(-blocks // streams)
        last = blocks - length * (streams - 1)
        with T.parallel(0, length) as at:
            side = [at + length * stream for stream in range(streams)]
            if last == length:
                self.row(0, side, read)
            else:
                choose(at < last, lambda: self.row(0, side, read), lambda: self.row(0, side[:-1], read))

    def prepared(self, row: Any) -> Read | None:
        """Emit what packed elements are multiplied by; None where weights are floats."""
        if not self.weight.bits:
            return None
        weight, per_word = self.weight, self.weight.per_word
        terms = T.alloc_buffer((weight.k,), "float32")
        with T.serial(0, weight.k // per_word) as word:
            for element in range(per_word):
                k = word * per_word + element
                put(terms, self.arguments.term(row, k) * T.float32(2.0 ** -weight.shift(element)), k)
        offsets = self._run_sums(row, RUN, -weight.middle) if weight.middle else None
        return Read(terms, offsets, self._run_sums(row, weight.group, 1) if weight.minimum else None)

    def _run_sums(self, row: Any, terms: int, times: int) -> Any:
        """Emit the sums of every so many ``terms`` of x times ``times``."""
        sums, lanes = T.alloc_buffer((self.weight.k // terms,), "float32"), vector(terms)
        with T.serial(0, self.weight.k // terms) as at:
            put(lanes, self.arguments.term(row, span(at * terms, terms)), span(0, terms))
            put(sums, total(lanes, terms) * T.float32(times), at)
        return sums

    def row(self, row: Any, blocks: Sequence[Any], read: Any) -> None:
        """Emit the products of one row and some blocks, weights unpacked for it alone."""
        products = [_zeros() for _ in blocks]
        self.row_products(row, blocks, read, products)
        for block, part in zip(blocks, products, strict=True):
            self.arguments.write(row, block, part)

    def fetch(self, blocks: Sequence[Any], row: Any, rows: int) -> None:
        """Ask for ``rows`` of words, or of floats, of blocks that lie :data:`AHEAD` of those from ``row`` on."""
        stored, (_, _, dtype) = self.arguments.weights[0], self.weight.tensors[0]
        size = tvm.DataType(dtype).itemsize
        for block in blocks:
            for number in range(rows):
                for lane in range(0, BLOCK, LINE // size):
                    prefetch(stored, block, row + AHEAD // (BLOCK * size) + number, lane)

    def row_products(self, row: Any, blocks: Sequence[Any], read: Any, products: Sequence[Any]) -> None:
        """Emit the products of one row, added to ``products``, one of each block."""
        if read is None:
            self._float_row(row, blocks, products)
        elif self.weight.levels:
            self._leveled_row(read, blocks, products)
        else:
            self._packed_row(read, blocks, products)

    def _packed_row(self, read: Any, blocks: Sequence[Any], products: Sequence[Any]) -> None:
        weight, weights = self.weight, self.arguments.weights
        with T.serial(0, weight.k // weight.group) as g:
            for block, value, product in zip(blocks, self.group_values(read, blocks, g), products, strict=True):
                found = get(product, BLOCK) + value * weight.scale(weights, block, g)
                if weight.minimum:
                    found = found + weight.least(weights, block, g) * splat(self.sum_of(read, g), BLOCK)
                put(product, found, span(0, BLOCK))

    def sum_of(self, read: Any, group: Any) -> Any:
        """Return the sum of the terms of a group, which minima are multiplied by."""
        return read.sums[group]

    def group_values(self, read: Any, blocks: Sequence[Any], g: Any) -> list[Any]:
        """Emit the products of a group's elements, and return their sums, one of each block."""
        weight, q_weight = self.weight, self.arguments.weights[0]
        ways = 2 // len(blocks) or 1 if len(weight.planes) == 1 else 1  # planes take registers
        self.fetch(blocks, g * weight.words, weight.words)
        parts = [[_zeros() for _ in range(ways)] for _ in blocks]

        def add(w: Any) -> None:
            words = [lambda at, b=block: q_weight[b, g * weight.words + at, span(0, BLOCK)] for block in blocks]
            for element in range(weight.per_word):
                k = g * weight.group + w * weight.per_word + element
                for word, parts_of_block in zip(words, parts, strict=True):
                    x, part = splat(read.terms[k], BLOCK), parts_of_block[element // RUN % ways]
                    if read.offsets is not None and not element % RUN:
                        put(part, get(part, BLOCK) + splat(read.offsets[k // RUN], BLOCK), span(0, BLOCK))
                    put(part, get(part, BLOCK) + weight.code(word, w, element, BLOCK) * x, span(0, BLOCK))

        weight.each_word(T.unroll, weight.group // weight.per_word, add)  # by TVM: a quarter of the IR
        return [sum((get(part, BLOCK) for part in others), get(first, BLOCK)) for first, *others in parts]

    def _leveled_row(self, read: Any, blocks: Sequence[Any], products: Sequence[Any]) -> None:
        whole, rest = self.weight.eights
        floats = [[T.alloc_buffer((LEVELED, BLOCK), "float32") for _ in range(2)] for _ in blocks]
        with T.serial(0, whole) as outer:
            self._outer_group(read, blocks, products, floats, (outer, LEVELED))
        if rest:
            self._outer_group(read, blocks, products, floats, (whole, rest))

    def _outer_group(
        self, read: Any, blocks: Sequence[Any], products: Sequence[Any], floats: Sequence[Any], at: tuple[Any, int]
    ) -> None:
        """Emit the products of the groups ``at`` (number, groups) that share two floats, scales to ``floats`` first."""
        outer, count = at
        for block, (scales, lows) in zip(blocks, floats, strict=True):
            for number in range(count):
                scale, low = self.weight.of_levels(self.arguments.weights, block, outer, number)
                put(scales, scale, number, span(0, BLOCK))
                put(lows, low, number, span(0, BLOCK))
        with T.serial(0, count) as number:
            g = outer * LEVELED + number
            values = self.group_values(read, blocks, g)
            for value, product, (scales, lows) in zip(values, products, floats, strict=True):
                scale, low = scales[number, span(0, BLOCK)], lows[number, span(0, BLOCK)]
                found = get(product, BLOCK) + value * scale - low * splat(self.sum_of(read, g), BLOCK)
                put(product, found, span(0, BLOCK))

    def _float_row(self, row: Any, blocks: Sequence[Any], products: Sequence[Any]) -> None:
        (stored,), k, ways = self.arguments.weights, self.weight.k, 4
        sums = ways // len(blocks)  # independent ones of each block
        parts = [[product, *(_zeros() for _ in range(sums - 1))] for product in products]

        def add(at: Any, way: int) -> None:
            x = splat(self.arguments.term(row, at), BLOCK)
            for block, parts_of_block in zip(blocks, parts, strict=True):
                part = parts_of_block[way % sums]
                put(part, get(part, BLOCK) + as_float(stored[block, at, span(0, BLOCK)], BLOCK) * x, span(0, BLOCK))

        with T.serial(0, k // ways) as step:
            self.fetch(blocks, step * ways, ways)
            for way in range(ways):
                add(step * ways + way, way)
        for way in range(k % ways):
            add(k // ways * ways + way, way)
        for product, *others in parts:
            put(product, sum((get(part, BLOCK) for part in others), get(product, BLOCK)), span(0, BLOCK))

    def rows(self, block: Any) -> None:
        """Emit all rows: tiles of them against one panel of unpacked weights after the other."""
        rows, whole = self.arguments.rows, self.weight.n // BLOCK
        alone = rows <= FEW if whole == self.weight.blocks else T.Or(rows <= FEW, block >= whole)
        choose(alone, lambda: self._alone(block), lambda: self._panels(block))

    def _alone(self, block: Any) -> None:
        with T.serial(0, self.arguments.rows) as row:
            self.row(row, [block], self.prepared(row))

    def _panels(self, block: Any) -> None:
        rows, k, most = self.arguments.rows, self.weight.k, self.panel_terms
        panel = self.panel()
        with T.serial(0, -(-k // most)) as number:
            first, terms = number * most, T.min(most, k - number * most)
            self.unpack(panel, block, first, terms)
            height, _ = self.arguments.linear.tile
            with T.serial(0, rows // height) as tile:
                self.tile(panel, block, first, terms, tile * height, height)
            done, half = rows // height * height, height // 2
            with T.serial(0, rows % height // half) as tile:
                self.tile(panel, block, first, terms, done + tile * half, half)
            with T.serial(0, rows % height % half) as row:
                self.tile(panel, block, first, terms, done + rows % height // half * half + row, 1)

    def panel(self) -> Any:
        """Make room for the weights of a panel."""
        return T.alloc_buffer((min(self.panel_terms, self.weight.k), BLOCK), "float32")

    def unpack(self, panel: Any, block: Any, first: Any, terms: Any) -> None:
        """Fill the panel with the values of the weights of k from ``first`` on."""
        weight, stored = self.weight, self.arguments.weights
        if not weight.bits:
            with T.serial(0, terms) as k:
                put(panel, as_float(stored[0][block, first + k, span(0, BLOCK)], BLOCK), k, span(0, BLOCK))
            return
        with T.serial(0, terms // weight.group) as g:
            before = (first // weight.group + g) * weight.words

            def word(at: Any, before: Any = before) -> Any:
                return stored[0][block, before + at, span(0, BLOCK)]

            for w in range(weight.group // weight.per_word):
                for element in range(weight.per_word):
                    value, group = weight.element(word, w, element), first // weight.group + g
                    value = (value - constant(weight.middle, BLOCK)) * weight.scale(stored, block, group)
                    if weight.minimum:
                        value = value + weight.least(stored, block, group)
                    put(panel, value, g * weight.group + w * weight.per_word + element, span(0, BLOCK))

    def begin(self, sums: list[Any], first: Any, top: Any, features: Any, lanes: int) -> None:
        """Emit what the sums of rows from ``top`` on begin with: what is added to the products, and after the first
        panel what they have come to.
        """
        arguments = self.arguments

        def fresh() -> None:
            for row, part in enumerate(sums):
                added = arguments.added(top + row, features, lanes)
                put(part, constant(0, lanes) if added is None else added, span(0, lanes))

        def further() -> None:
            for row, part in enumerate(sums):
                put(part, arguments.y[(*arguments.place(top + row), features)], span(0, lanes))

        if self.weight.k <= self.panel_terms:
            fresh()
        else:
            choose(first == 0, fresh, further)

    def tile(self, panel: Any, block: Any, first: Any, terms: Any, top: Any, height: int) -> None:
        """Emit the products of ``height`` rows from ``top`` on with the weights of a panel; y holds what they come
        to.
        """
        arguments, (_, lanes) = self.arguments, self.arguments.linear.tile
        for left in range(0, BLOCK, lanes):
            features, sums = span(arguments.features(block) + left, lanes), [vector(lanes) for _ in range(height)]
            self.begin(sums, first, top, features, lanes)
            self.products(panel, block, (first, terms), top, left, sums)
            for row, part in enumerate(sums):
                put(arguments.y, get(part, lanes), *arguments.place(top + row), features)

    def products(self, panel: Any, _block: Any, terms: tuple[Any, Any], top: Any, left: int, sums: list[Any]) -> None:
        """Emit the products of ``terms`` (start, number) of k for rows from ``top`` on and the features from ``left``
        of the block on, added to ``sums``, one of each row.
        """
        arguments, (_, lanes) = self.arguments, self.arguments.linear.tile
        with T.serial(0, terms[1]) as k:
            for row, part in enumerate(sums):
                x = splat(arguments.term(top + row, terms[0] + k), lanes)
                put(part, get(part, lanes) + panel[k, span(left, lanes)] * x, span(0, lanes))
