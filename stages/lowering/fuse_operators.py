"""Elementwise operators join the kernel they follow, as TVM groups them."""

from __future__ import annotations

import tvm
from tvm import relax as rx


@tvm.transform.module_pass(opt_level=0, name="FuseOperators")
def fuse_operators(module: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
    """Group the calls of kernels, and make one kernel of each group; most models for a CPU have no group left."""
    grouped = rx.transform.FuseOps()(module)
    found = any("Primitive" in (function.attrs or {}) for _, function in grouped.functions_items())
    return rx.transform.FuseTIR()(grouped) if found else grouped
