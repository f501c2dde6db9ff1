"""Kernels of linear layers on a CPU that multiplies bytes: activations are quantized, group by group, as they come.

A group of activations becomes integers of -127 to 127 and one scale. They are multiplied by the weights' codes and
added up in integers (byte_products.py); that a weight's zero is not 0 is made up for by the sum of the activations
times the weight's zero, from which the sums begin. Of groups with a minimum, the minimum times the sum of the
activations is added where they end.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from tvm import tirx
from tvm.script.ir_builder import tirx as T  # noqa: N812

from stages.kernels.cpu.byte_products import DOTS, LARGEST
from stages.kernels.cpu.linear_float import Arguments, LinearLayer, Product
from stages.kernels.cpu.vectors import as_float, constant, each_row, get, kernel, put, span, splat, total, vector
from stages.sizes import N32_BLOCK as BLOCK

PANEL = 1024  # terms of k whose weights are unpacked at once: 32 KiB of bytes, which stay in the first-level cache


def with_bytes(layer: LinearLayer, dot: str) -> LinearLayer:
    """Return ``layer`` with quantized activations, multiplied by the instructions that DOTS has under ``dot``."""
    return replace(layer, dot=dot, tile=DOTS[dot].tile, streams=DOTS[dot].streams)


def offset_factor(layer: LinearLayer) -> int:
    """Return the factor that makes offsets (see :func:`quantizer`) of the sums of a group's integers.

    Of a symmetric group they are what sums of (code - centre) * x must begin from to be of (code - middle) * x. What a
    minimum is multiplied by are the sums themselves.
    """
    weight = layer.weight
    return 1 if weight.minimum else DOTS[layer.dot].centre(weight.width) - weight.middle


@functools.cache
def quantizer(rows: int | None, outer: int, k: int, group: int, times: int) -> tirx.PrimFunc:
    """Return the kernel of (x [.., rows, k] float32, bytes, scales, offsets): bytes int32 [rows, k / 4], four to a
    word; scales float32 and offsets, the sums of the integers times ``times``, int32 [rows, k / group].
    """
    with kernel() as made:
        n: Any = T.int64() if rows is None else rows
        ones, zeros = (1,) * outer, (0,) * outer
        x = made.argument("x", (*ones, n, k), "float32")
        words = made.argument("words", (n, k // 4), "int32")
        scales = made.argument("scales", (n, k // group), "float32")
        offsets = made.argument("offsets", (n, k // group), "int32")

        def row(i: Any) -> None:
            with T.serial(0, k // group) as g:
                peak, part = vector(group), vector(group, "int32")
                packed = vector(group, "int8")
                values = x[(*zeros, i, span(g * group, group))]
                put(peak, T.fabs(values), span(0, group))
                total(peak, group, T.max)
                put(peak, T.max(peak[0], T.float32(1e-20)), 0)
                put(scales, peak[0] * T.float32(1 / LARGEST), i, g)
                scaled = values * splat(T.float32(LARGEST) / peak[0], group)
                put(part, T.Cast(f"int32x{group}", T.nearbyint(scaled)), span(0, group))
                put(packed, T.Cast(f"int8x{group}", get(part, group)), span(0, group))
                four = T.reinterpret(f"int32x{group // 4}", get(packed, group))
                put(words, four, i, span(g * (group // 4), group // 4))
                put(offsets, total(part, group) * T.int32(times), i, g)

        with T.sblock("quantize"):  # TVM looks into the body of what has one input, and expects a block
            each_row(n, 4 * k, row)
    return made.function


@functools.cache
def int8_kernel(linear: LinearLayer) -> tirx.PrimFunc:
    """Return the kernel of (bytes, scales, offsets, stored weight..., [bias], [residual], y)."""
    with kernel() as made:
        ByteProduct(Bytes(made, linear)).emit()
    return made.function


class Bytes(Arguments):
    """Arguments whose activations are quantized."""

    def inputs(self, made: Any, shape: tuple[Any, ...]) -> None:
        """Declare what :func:`quantizer` makes."""
        weight, rows = self.linear.weight, shape[-1]
        groups = weight.k // weight.group
        self.words = made.argument("words", (rows, weight.k // 4), "int32")
        self.scales = made.argument("scales", (rows, groups), "float32")
        self.offsets = made.argument("offsets", (rows, groups), "int32")


class _Panel(NamedTuple):
    """Weights that are unpacked at once: codes, four to a word, and the scales and minima of groups as floats."""

    codes: Any
    scales: Any
    least: Any


class ByteProduct(Product):
    """Products of bytes; the sums of a group become floats when it ends."""

    arguments: Bytes
    panel_terms = PANEL

    def prepared(self, row: Any) -> Any:
        """Return the row: all has been made with the bytes."""
        return row

    def _fours(self, word: Callable[[Any], Any], number: Any, part: int, lanes: int) -> Any:
        """Return the bytes of elements 4 * part to 4 * part + 3 of a word of a group, less the centre."""
        codes = self.weight.fours(word, number, part, lanes)
        return T.bitwise_xor(codes, constant(0x80808080, lanes, "uint32")) if self._centre else codes

    @property
    def _centre(self) -> int:
        """What is taken off codes before they are multiplied."""
        return int(self.dot.centre(self.weight.width))

    @property
    def dot(self) -> Any:
        """How bytes are multiplied."""
        return DOTS[self.arguments.linear.dot]

    def _sums(self, row: Any, group: Any) -> Any:
        """Return fresh sums of integers of a row and group."""
        lanes = self.dot.lanes
        begin = splat(self.arguments.offsets[self.arguments.source(row), group], lanes)
        if self.weight.minimum:  # whose offsets are the sums of activations, and whose codes count from 0
            begin = begin * constant(self._centre, lanes, "int32")
        return self.dot.sums(begin, self.weight.width)

    def sum_of(self, row: Any, group: Any) -> Any:
        """Return the sum of the activations of a row and group, which minima are multiplied by."""
        at = self.arguments.source(row), group
        return as_float(self.arguments.offsets[at], 1) * self.arguments.scales[at]

    def group_values(self, row: Any, blocks: Sequence[Any], g: Any) -> list[Any]:
        """Emit the products of a group's elements, and return their sums, one of each block."""
        arguments, weight, lanes = self.arguments, self.weight, self.dot.lanes
        q_weight, first = arguments.weights[0], g * weight.words
        per_group, fours = weight.group // weight.per_word, weight.per_word // 4
        places = [(number, left) for number in range(len(blocks)) for left in range(0, BLOCK, lanes)]
        self.fetch(blocks, first, weight.words)
        sums = [self._sums(row, g) for _ in places]
        run = min(sums[0].run // fours, per_group)
        words = [
            lambda at, b=blocks[number], left=left: q_weight[b, first + at, span(left, lanes)]
            for number, left in places
        ]

        def add(number: Any) -> None:
            for four in range(fours):
                x = arguments.words[arguments.source(row), (g * per_group + number) * fours + four]
                for word, part in zip(words, sums, strict=True):
                    part.add(self._fours(word, number, four, lanes), x)

        def add_run(number: Any) -> None:
            for part in sums:
                part.start()
            weight.each_word(T.unroll, run, lambda inner: add(number * run + inner))
            for part in sums:
                part.end()

        weight.each_word(T.unroll, per_group // run, add_run)
        values = [vector(BLOCK) for _ in blocks]
        for (number, left), part in zip(places, sums, strict=True):
            value = as_float(part.total(), lanes) * splat(arguments.scales[arguments.source(row), g], lanes)
            put(values[number], value, span(left, lanes))
        return [get(value, BLOCK) for value in values]

    def panel(self) -> _Panel:
        """Make room for a panel."""
        terms = min(self.panel_terms, self.weight.k)
        shape = terms // self.weight.group, BLOCK
        least = T.alloc_buffer(shape, "float32") if self.weight.minimum else None
        return _Panel(T.alloc_buffer((terms // 4, BLOCK), "uint32"), T.alloc_buffer(shape, "float32"), least)

    def unpack(self, panel: _Panel, block: Any, first: Any, terms: Any) -> None:
        """Fill the panel with the weights of k from ``first`` on."""
        weight, weights, fours = self.weight, self.arguments.weights, self.weight.per_word // 4
        per_group = weight.group // weight.per_word
        with T.serial(0, terms // weight.group) as g:
            group = first // weight.group + g

            def unpack(number: Any, g: Any = g, before: Any = group * weight.words) -> None:
                for part in range(fours):
                    codes = self._fours(lambda at: weights[0][block, before + at, span(0, BLOCK)], number, part, BLOCK)
                    put(panel.codes, codes, (g * per_group + number) * fours + part, span(0, BLOCK))

            weight.each_word(T.serial, per_group, unpack)
            put(panel.scales, weight.scale(weights, block, group), g, span(0, BLOCK))
            if weight.minimum:
                put(panel.least, weight.least(weights, block, group), g, span(0, BLOCK))

    def products(
        self, panel: _Panel, _block: Any, terms: tuple[Any, Any], top: Any, left: int, sums: list[Any]
    ) -> None:
        """Emit the products of ``terms``, group by group."""
        with T.serial(0, terms[1] // self.weight.group) as g:
            self._group(panel, (terms[0], g), top, left, sums)

    def _group(self, panel: _Panel, at: tuple[Any, Any], top: Any, left: int, products: list[Any]) -> None:
        """Emit the products of a group, ``at`` (start of the panel, group in it), added to those of each row."""
        arguments, weight, lanes = self.arguments, self.weight, self.dot.lanes
        words, group = weight.group // 4, at[0] // weight.group + at[1]
        width = range(0, arguments.linear.tile[1], lanes)
        parts = [(row, start) for row in range(len(products)) for start in width]
        sums = [self._sums(top + row, group) for row, _ in parts]
        run = min(sums[0].run, words)
        with T.serial(0, words // run) as number:
            for part in sums:
                part.start()
            with T.serial(0, run) as inner:
                word = number * run + inner
                for (row, start), part in zip(parts, sums, strict=True):
                    codes = panel.codes[at[1] * words + word, span(left + start, lanes)]
                    part.add(codes, arguments.words[arguments.source(top + row), group * words + word])
            for part in sums:
                part.end()
        for (row, start), part in zip(parts, sums, strict=True):
            place = at[1], span(left + start, lanes)
            scale = panel.scales[place] * splat(arguments.scales[arguments.source(top + row), group], lanes)
            value = as_float(part.total(), lanes) * scale
            if weight.minimum:
                value = value + panel.least[place] * splat(self.sum_of(top + row, group), lanes)
            put(products[row], products[row][span(start, lanes)] + value, span(start, lanes))
