"""The pass that fuses elementwise operators into the kernel before them, as TVM groups them."""

from __future__ import annotations

import tvm
from tvm import relax as rx

from stages.lowering.rewriter import bound_values, is_call

_OPAQUE = 8  # TVM's pattern of kernels that join nothing


@tvm.transform.module_pass(opt_level=0, name="FuseOperators")
def fuse_operators(module: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
    """Group calls of kernels and make one kernel of each group, in functions with two that may join: with our own
    kernels most functions have none. Kernels that nothing calls any more stay.
    """
    part = module.clone()
    for var, function in module.functions_items():
        if isinstance(function, rx.Function) and not _may_join(module, function):
            del part[var]
    fused = module.clone()
    if any(isinstance(function, rx.Function) for _, function in part.functions_items()):
        fused.update(tvm.transform.Sequential([rx.transform.FuseOps(), rx.transform.FuseTIR()])(part))
    return fused


def _may_join(module: tvm.IRModule, function: rx.Function) -> bool:
    called = [module[value.args[0]] for value in bound_values(function) if is_call(value, "call_tir")]
    return sum(int(kernel.attrs["op_pattern"]) != _OPAQUE for kernel in called) > 1
