"""The gated activation of an MLP on a CPU: silu(g) * u of the two halves of a row, with an exponential of its own."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T  # noqa: N812

from stages.kernels.cpu.vectors import along, constant, each_row, exp2, kernel, put, span

LANES = 32


@dataclass(frozen=True)
class Gate:
    """Rows [g | u] of ``width`` each, ``rows`` of them (None: known at run time) behind ``outer`` axes of size one."""

    rows: int | None
    outer: int
    width: int


@functools.cache
def gate_kernel(gate: Gate) -> tirx.PrimFunc:
    """Return the kernel of (x, y): y = silu(g) * u, x / (1 + exp(-x)) being silu(x)."""
    with kernel() as made:
        rows = T.int64() if gate.rows is None else gate.rows
        outer = (0,) * gate.outer
        x = made.argument("x", (*(1 for _ in outer), rows, 2 * gate.width), "float32")
        y = made.argument("y", (*(1 for _ in outer), rows, gate.width), "float32")

        def write(row: Any, at: Any, lanes: int) -> None:
            g, u = (x[(*outer, row, span(at + half * gate.width, lanes))] for half in (0, 1))
            power = exp2(g * constant(-math.log2(math.e), lanes), lanes)
            put(y, g / (constant(1, lanes) + power) * u, *outer, row, span(at, lanes))

        with T.sblock("gate"):  # TVM looks into the body of what has one input, and expects a block
            each_row(rows, 20 * gate.width, lambda row: along(gate.width, LANES, partial(write, row)))
    return made.function
