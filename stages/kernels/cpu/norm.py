"""rms_norm and layer_norm over the last axis on a CPU, in lanes, rows on all threads."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T  # noqa: N812

from stages.kernels.cpu.vectors import (
    along,
    as_float,
    constant,
    each_row,
    kernel,
    put,
    span,
    splat,
    total,
    vector,
)

LANES = 32


@dataclass(frozen=True)
class Norm:
    """A norm of rows of ``width``, whose sizes are ``rows`` (None: known at run time, at most one), with parameters of
    ``dtype``: the weight, and the bias where the mean is subtracted.
    """

    rows: tuple[int | None, ...]
    width: int
    epsilon: float
    dtype: str
    centred: bool


@functools.cache
def norm_kernel(norm: Norm) -> tirx.PrimFunc:
    """Return the kernel of (x, weight, [bias], y)."""
    with kernel() as made:
        sizes = [T.int64() if size is None else size for size in norm.rows]
        x = made.argument("x", (*sizes, norm.width), "float32")
        weight = made.argument("weight", (norm.width,), norm.dtype)
        bias = made.argument("bias", (norm.width,), norm.dtype) if norm.centred else None
        y = made.argument("y", (*sizes, norm.width), "float32")
        count: Any = 1
        for size in sizes:
            count = size if isinstance(count, int) and count == 1 else count * size
        each_row(count, 2 * norm.width, lambda row: _row(norm, x, weight, bias, y, unravel(row, sizes)))
    return made.function


def unravel(row: Any, sizes: list[Any]) -> tuple[Any, ...]:
    """Return the index of a row numbered through all ``sizes``."""
    index: list[Any] = []
    for size in reversed(sizes[1:]):
        index.append(row % size if not isinstance(size, int) or size > 1 else 0)
        row = row // size if not isinstance(size, int) or size > 1 else row
    return (row, *reversed(index)) if not (isinstance(sizes[0], int) and sizes[0] == 1) else (0, *reversed(index))


def _row(norm: Norm, x: Any, weight: Any, bias: Any, y: Any, row: tuple[Any, ...]) -> None:
    mean = _mean(norm, lambda at, lanes: x[(*row, span(at, lanes))]) if norm.centred else None

    def centred(at: Any, lanes: int) -> Any:
        value = x[(*row, span(at, lanes))]
        return value if mean is None else value - splat(mean[0], lanes)

    scale = _mean(norm, lambda at, lanes: centred(at, lanes) * centred(at, lanes))
    put(scale, T.float32(1) / T.sqrt(scale[0] + T.float32(norm.epsilon)), 0)

    def write(at: Any, lanes: int) -> None:
        value = centred(at, lanes) * splat(scale[0], lanes) * as_float(weight[span(at, lanes)], lanes)
        if bias is not None:
            value = value + as_float(bias[span(at, lanes)], lanes)
        put(y, value, *row, span(at, lanes))

    along(norm.width, LANES, write)


def _mean(norm: Norm, term: Any) -> Any:
    """Emit the mean of ``term(start, lanes)`` over a row; return where it is."""
    sums, mean = vector(LANES), vector(1)
    put(sums, constant(0, LANES), span(0, LANES))

    def add(at: Any, lanes: int) -> None:
        put(sums, sums[span(0, lanes)] + term(at, lanes), span(0, lanes))

    along(norm.width, LANES, add)
    put(mean, total(sums, LANES) * T.float32(1 / norm.width), 0)
    return mean
