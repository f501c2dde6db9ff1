"""A weight is rebuilt inside the kernel that multiplies by it: ``dequantize`` and the matmul after it become one."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax as rx
from tvm.relax.dpl import GlobalVarPattern, TuplePattern, is_op, wildcard
from tvm.relax.transform import PatternCheckContext

_REBUILDER = "dequantize"  # what the names of kernels begin with that rebuild a weight
# Arguments of the kernel beside x and the weight: bias, residual and the like, from earlier fusion.
_MOST_EXTRA_ARGUMENTS = 4


def fuse_dequantize_matmul() -> tvm.transform.Pass:
    """Return the pass; it comes after FuseOps and FuseTIR, for the matmul may carry elementwise work already."""
    patterns = [_pattern(stored, extra) for stored in (2, 1) for extra in range(_MOST_EXTRA_ARGUMENTS + 1)]
    fuse = rx.transform.FuseOpsByPattern(patterns, bind_constants=False)
    steps = tvm.transform.Sequential([fuse, rx.transform.FuseTIR()])

    @tvm.transform.module_pass(opt_level=0, name="FuseDequantizeMatmul")
    def run(module: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        found = any(var.name_hint.startswith(_REBUILDER) for var in module.get_global_vars())
        return steps(module) if found else module  # looking for patterns takes longer than the rest of this phase

    return run


def _pattern(stored: int, extra: int) -> tuple[str, Any, dict[str, Any], Any]:
    """Match a matmul kernel of (x, weight, ``extra`` more) whose weight is rebuilt from ``stored`` tensors."""
    call_tir = is_op("relax.call_tir")
    rebuilder, kernel = GlobalVarPattern(), GlobalVarPattern()
    weight = call_tir(rebuilder, TuplePattern([wildcard() for _ in range(stored)]), add_constraint=False)
    arguments = TuplePattern([wildcard(), weight, *(wildcard() for _ in range(extra))])
    root = call_tir(kernel, arguments, add_constraint=False)
    return "dequantize_matmul", root, {"rebuilder": rebuilder, "kernel": kernel}, _is_linear


def _is_linear(context: PatternCheckContext) -> bool:
    rebuilder, kernel = (context.annotated_expr[name].name_hint for name in ("rebuilder", "kernel"))
    return rebuilder.startswith(_REBUILDER) and "NT_matmul" in kernel
