"""The gate of an MLP on a CPU: silu(g) * u of the two halves of a row, in lanes, with an exponential of its own."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import tvm
from tvm import relax as rx
from tvm import tirx

from stages.lowering.cpu_vectors import T, along, constant, each_row, exp2, kernel, put, span
from stages.lowering.rewriter import KernelCall, Rewriter, is_call, rows_of

LANES = 32


@dataclass(frozen=True)
class Gate:
    """Rows [g | u] of ``width`` each, ``rows`` of them (None: known at run time) behind ``outer`` axes of size one."""

    rows: int | None
    outer: int
    width: int


@tvm.transform.module_pass(opt_level=0, name="CPUGate")
def cpu_gate(module: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
    """Replace silu(g) * u, where g and u are the halves of one tensor, by a call of a kernel."""
    return _Gates(module).rewritten()


class _Gates(Rewriter):
    def replace(self, call: rx.Call) -> KernelCall | None:
        """Return the call of the kernel of a gated product."""
        silu = self.bound(call.args[0], "nn.silu") if is_call(call, "multiply") else None
        if silu is None:
            return None
        halves = [self._half(value) for value in (silu.args[0], call.args[1])]
        if [half and half[1] for half in halves] != [0, 1] or not halves[0][0].same_as(halves[1][0]):
            return None
        both = halves[0][0]
        rows = rows_of(both)
        if rows is None or any(size != 1 for size in rows[0][:-1]):
            return None
        gate = Gate(rows[0][-1], len(rows[0]) - 1, rows[1] // 2)
        shape = [*both.ty.shape.values[:-1], gate.width]
        return KernelCall(gate, lambda: gate_kernel(gate), "silu_gate", [both], shape)

    def _half(self, value: Any) -> Any:
        """Return (tensor, which half) if ``value`` is a half of a tensor along the last axis."""
        item = self.values.get(value) if isinstance(value, rx.Var) else None
        if not isinstance(item, rx.TupleGetItem):
            return None
        split = self.bound(item.tuple_value, "split")
        if split is None or int(split.attrs.axis) not in (-1, split.args[0].ty.ndim - 1):
            return None
        width = split.args[0].ty.shape.values[-1]
        sections = split.attrs.indices_or_sections
        even = isinstance(width, tirx.IntImm) and (
            int(sections) == 2
            if isinstance(sections, int | tirx.IntImm)
            else [2 * int(at) for at in sections] == [int(width)]
        )
        return (split.args[0], item.index) if even else None


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
