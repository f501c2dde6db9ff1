"""Kernels of mixture-of-experts layers on a CPU, which read the weights of the selected experts only.

The matrices of all experts lie one under the other in blocks of features, so that an expert is a run of blocks.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T  # noqa: N812

from stages.kernels.cpu.linear_float import Arguments, LinearLayer, Product
from stages.kernels.cpu.linear_int8 import ByteProduct, Bytes
from stages.kernels.cpu.vectors import kernel, put
from stages.sizes import N32_BLOCK as BLOCK


@dataclass(frozen=True)
class Experts:
    """Layers of ``count`` experts that lie in ``linear.weight``. ``linear.rows`` is the number of rows of the result,
    None where it is known at run time; ``each`` of them after another are of one row of x.
    """

    linear: LinearLayer
    count: int
    each: int

    @property
    def blocks(self) -> int:
        """Blocks of features of an expert."""
        return self.linear.weight.blocks // self.count


@functools.cache
def order_kernel(count: int) -> tirx.PrimFunc:
    """Return the kernel of (chosen, order, starts): ``order`` [rows] are rows by the expert that was chosen for them,
    those of expert e from ``starts[e]`` to ``starts[e + 1]``.
    """
    with kernel() as made:
        rows = T.int64()
        chosen = made.argument("chosen", (rows,), "int32")
        order = made.argument("order", (rows,), "int32")
        starts = made.argument("starts", (count + 1,), "int32")
        ends = T.alloc_buffer((count,), "int32")
        with T.sblock("order"):  # TVM looks into the body of what has one input, and expects a block
            with T.serial(0, count + 1) as e:
                put(starts, T.int32(0), e)
            with T.serial(0, rows) as row:
                e = _within(chosen[row], count) + 1
                put(starts, starts[e] + 1, e)
            with T.serial(0, count) as e:
                put(starts, starts[e] + starts[e + 1], e + 1)
            with T.serial(0, count) as e:
                put(ends, starts[e], e)
            with T.serial(0, rows) as row:
                e = _within(chosen[row], count)
                put(order, T.Cast("int32", row), ends[e])
                put(ends, ends[e] + 1, e)
    return made.function


def _within(expert: Any, count: int) -> Any:
    """Return the number of an expert, clipped: whatever was computed, nothing wild is read."""
    return T.max(T.min(expert, T.int32(count - 1)), T.int32(0))


@functools.cache
def experts_kernel(experts: Experts) -> tirx.PrimFunc:
    """Return the kernel of (x, chosen, stored weight..., y), or, where the number of rows is known at run time, of (x,
    order, starts, stored weight..., y). Where activations are bytes, x is bytes, scales and offsets.
    """
    kinds: dict[tuple[bool, bool], tuple[Any, Any]] = {  # rows are known, activations are bytes
        (True, False): (_Chosen, _RowByRow),
        (True, True): (_ChosenBytes, _BytesByRow),
        (False, False): (_Ordered, _Grouped),
        (False, True): (_OrderedBytes, _GroupedBytes),
    }
    arguments, product = kinds[experts.linear.rows is not None, bool(experts.linear.dot)]
    with kernel() as made:
        product(arguments(made, experts)).emit()
    return made.function


class _Routed(Arguments):
    """Arguments whose rows of x are read by several rows of y."""

    def __init__(self, made: Any, experts: Experts) -> None:
        self.linear, self.experts = experts.linear, experts
        weight, rows = self.linear.weight, self.linear.rows
        tokens: Any = T.int64() if rows is None else rows // experts.each
        self.outer = ()
        self.inputs(made, (tokens,))
        self.numbers(made, tokens * experts.each)
        self.weights = [made.argument(*tensor) for tensor in weight.tensors]
        self.bias = self.residual = None
        self.y = made.argument("y", (tokens * experts.each, experts.blocks * BLOCK), "float32")

    def numbers(self, made: Any, rows: Any) -> None:
        """Declare which experts are chosen."""
        raise NotImplementedError

    def source(self, row: Any) -> Any:
        """Return which row of the activations a row is the product of."""
        return T.floordiv(self.place(row)[0], self.experts.each)

    def features(self, block: Any) -> Any:
        """Return which feature of its expert is the first of a block."""
        return block % self.experts.blocks * BLOCK


class _Chosen(_Routed):
    """Rows in their own order."""

    def numbers(self, made: Any, rows: Any) -> None:
        """Declare the expert of each row."""
        self.rows = rows
        self.chosen = made.argument("chosen", (rows,), "int32")


class _Ordered(_Routed):
    """Rows of one expert after another: ``rows`` of them from ``first`` on."""

    first: Any

    def numbers(self, made: Any, rows: Any) -> None:
        """Declare what :func:`order_kernel` makes."""
        self.order = made.argument("order", (rows,), "int32")
        self.starts = made.argument("starts", (self.experts.count + 1,), "int32")

    def place(self, row: Any) -> tuple[Any, ...]:
        """Return where y has a row of the expert."""
        return (self.order[self.first + row],)


class _ChosenBytes(_Chosen, Bytes):
    """Rows in their own order, of quantized activations."""


class _OrderedBytes(_Ordered, Bytes):
    """Rows of one expert after another, of quantized activations."""


class _RowByRow(Product):
    """A few rows, of experts that are hardly the same: each reads its expert's weights."""

    arguments: _Chosen

    def emit(self) -> None:
        """Emit the kernel: rows and blocks of features on all threads."""
        experts, rows = self.arguments.experts, self.arguments.rows
        prepared = [self.prepared(row) for row in range(rows)]
        for row in range(rows):
            with T.parallel(0, experts.blocks) as block:
                first = _within(self.arguments.chosen[row], experts.count) * experts.blocks
                self.row(row, [first + block], prepared[row])


class _Grouped(Product):
    """Rows expert by expert: a block of weights is unpacked once for all of them."""

    arguments: _Ordered

    def emit(self) -> None:
        """Emit the kernel: blocks of features on all threads."""
        arguments, experts = self.arguments, self.arguments.experts
        with T.parallel(0, experts.blocks) as block, T.serial(0, experts.count) as expert:
            arguments.first = arguments.starts[expert]
            arguments.rows = arguments.starts[expert + 1] - arguments.first
            with T.If(arguments.rows > 0), T.Then():
                self.rows(expert * experts.blocks + block)


class _BytesByRow(ByteProduct):
    """A few rows of quantized activations, each of which reads its expert's weights."""

    arguments: _ChosenBytes

    def emit(self) -> None:
        """Emit the kernel: blocks of features of all rows on all threads."""
        experts = self.arguments.experts
        with T.parallel(0, self.arguments.rows * experts.blocks) as at:
            row = T.floordiv(at, experts.blocks)
            first = _within(self.arguments.chosen[row], experts.count) * experts.blocks
            self.row(row, [first + at % experts.blocks], self.prepared(row))


class _GroupedBytes(_Grouped, ByteProduct):
    """Rows of quantized activations, expert by expert."""

    arguments: _OrderedBytes
