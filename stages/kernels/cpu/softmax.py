"""Softmax over the last axis on a CPU, in lanes: its sum keeps the small terms that one long sum would lose."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T  # noqa: N812

from stages.kernels.cpu.norm import unravel
from stages.kernels.cpu.vectors import along, constant, each_row, exp2, kernel, put, span, splat, total, vector

LANES = 32


@dataclass(frozen=True)
class SoftmaxKernel:
    """The softmax of rows of ``width``, whose sizes are ``rows`` (None: known at run time, at most one)."""

    rows: tuple[int | None, ...]
    width: int


@functools.cache
def softmax_kernel(softmax: SoftmaxKernel) -> tirx.PrimFunc:
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
