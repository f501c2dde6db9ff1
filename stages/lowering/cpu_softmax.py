"""Softmax on a CPU, over the last axis, in lanes: its sum keeps the small terms that one long sum would lose."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import relax as rx
from tvm import tirx

from stages.lowering.cpu_norm import unravel
from stages.lowering.cpu_vectors import T, along, constant, each_row, exp2, kernel, put, span, splat, total, vector
from stages.lowering.rewriter import KernelCall, Rewriter, is_call, rows_of

LANES = 32


@dataclass(frozen=True)
class Softmax:
    """The softmax of rows of ``width``, whose sizes are ``rows`` (None: known at run time, at most one)."""

    rows: tuple[int | None, ...]
    width: int


@tvm.transform.module_pass(opt_level=0, name="CPUSoftmax")
def cpu_softmax(module: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
    """Replace every softmax of float32 rows by a call of a kernel."""
    return _Softmaxes(module).rewritten()


class _Softmaxes(Rewriter):
    def replace(self, call: rx.Call) -> KernelCall | None:
        """Return the call of the kernel of a softmax over the last axis."""
        rows = rows_of(call.args[0]) if is_call(call, "nn.softmax") else None
        if rows is None or rows[0].count(None) > 1 or int(call.attrs.axis) not in (-1, len(rows[0])):
            return None
        softmax = Softmax(*rows)
        return KernelCall(softmax, lambda: softmax_kernel(softmax), "softmax", call.args, call.ty.shape.values)


@functools.cache
def softmax_kernel(softmax: Softmax) -> tirx.PrimFunc:
    """Return the kernel of (x, y)."""
    with kernel() as made:
        sizes = [T.int64() if size is None else size for size in softmax.rows]
        x = made.argument("x", (*sizes, softmax.width), "float32")
        y = made.argument("y", (*sizes, softmax.width), "float32")
        count: Any = math.prod(size for size in sizes if isinstance(size, int))
        for size in sizes:
            count = count if isinstance(size, int) else count * size
        with T.sblock("softmax"):  # TVM looks into the body of what has one input, and expects a block
            each_row(count, 16 * softmax.width, lambda row: _row(softmax.width, x, y, unravel(row, sizes)))
    return made.function


def _row(width: int, x: Any, y: Any, row: tuple[Any, ...]) -> None:
    peak, sums, part = vector(LANES), vector(LANES), vector(LANES)
    put(peak, constant(float("-inf"), LANES), span(0, LANES))

    def largest(at: Any, lanes: int) -> None:
        put(peak, T.max(peak[span(0, lanes)], x[(*row, span(at, lanes))]), span(0, lanes))

    along(width, LANES, largest)
    put(peak, total(peak, LANES, T.max), 0)

    def add(sum_of: Any, at: Any, lanes: int) -> None:
        power = (x[(*row, span(at, lanes))] - splat(peak[0], lanes)) * constant(math.log2(math.e), lanes)
        put(y, exp2(power, lanes), *row, span(at, lanes))
        put(sum_of, sum_of[span(0, lanes)] + y[(*row, span(at, lanes))], span(0, lanes))

    # Each lane adds up sums of some terms: a term goes through about 2 sqrt(n) additions instead of n.
    runs = math.isqrt(width // LANES)
    put(sums, constant(0, LANES), span(0, LANES))
    whole = width // (LANES * runs) if runs else 0
    with T.serial(0, whole) as block:
        put(part, constant(0, LANES), span(0, LANES))
        with T.serial(0, runs) as run:
            add(part, (block * runs + run) * LANES, LANES)
        put(sums, sums[span(0, LANES)] + part[span(0, LANES)], span(0, LANES))
    done = whole * runs * LANES
    along(width - done, LANES, lambda at, lanes: add(sums, done + at, lanes))
    put(sums, T.float32(1) / total(sums, LANES), 0)

    def scale(at: Any, lanes: int) -> None:
        put(y, y[(*row, span(at, lanes))] * splat(sums[0], lanes), *row, span(at, lanes))

    along(width, LANES, scale)
