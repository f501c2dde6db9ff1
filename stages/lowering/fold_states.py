"""The pass that computes initial states at compile time: the only part of a graph that depends on no argument."""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm
from tvm import relax as rx
from tvm import tirx

from stages.lowering.rewriter import Rewriter, is_call


@tvm.transform.module_pass(opt_level=0, name="FoldStates")
def fold_states(module: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
    """Make constants of the filled tensors in functions that take no tensors; they would be kernels otherwise."""
    return _States(module).rewritten()


class _States(Rewriter):
    def enter(self, function: rx.Function) -> bool:
        """Pass over the functions of layers: nothing there is constant."""
        return not any(isinstance(param.ty, rx.TensorType | rx.TupleType) for param in function.params)

    def replace(self, call: rx.Call) -> tvm.ir.Constant | None:
        """Return the constant that ``zeros``, ``ones`` or ``full`` of a number makes."""
        value = _filled_with(call)
        if value is None or not all(isinstance(size, tirx.IntImm) for size in call.ty.shape.values):
            return None
        shape = [int(size) for size in call.ty.shape.values]
        return rx.const(np.full(shape, value, str(call.ty.dtype)))


def _filled_with(call: rx.Call) -> Any:
    if is_call(call, "full"):
        return call.args[1].value.numpy() if isinstance(call.args[1], tvm.ir.Constant) else None
    return next((value for name, value in (("zeros", 0), ("ones", 1)) if is_call(call, name)), None)
