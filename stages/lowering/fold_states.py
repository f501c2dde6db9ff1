"""Computes at compile time what a state begins with: the one place of a graph that depends on no argument."""

from __future__ import annotations

import tvm
from tvm import relax as rx


@tvm.transform.module_pass(opt_level=0, name="FoldStates")
def fold_states(module: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
    """Fold constants in the functions that take no tensors: visiting the layers of all others finds nothing to fold."""
    others = {var: function for var, function in module.functions_items() if _takes_tensors(function)}
    folded = module.clone()
    for var in others:
        del folded[var]
    folded = rx.transform.FoldConstant()(folded)
    folded.update(tvm.IRModule(others))
    return folded


def _takes_tensors(function: tvm.ir.BaseFunc) -> bool:
    return isinstance(function, rx.Function) and any(
        isinstance(param.ty, rx.TensorType | rx.TupleType) for param in function.params
    )
