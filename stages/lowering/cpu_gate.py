"""The pass that replaces silu(g) * u by a kernel of the gated activation on a CPU."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax as rx
from tvm import tirx

from stages.kernels.cpu.gate import Gate, gate_kernel
from stages.lowering.rewriter import KernelCall, Rewriter, is_call, rows_of


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
