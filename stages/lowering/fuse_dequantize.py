"""The pass that fuses ``dequantize`` with the matmul after it, so that weights are unpacked inside that kernel."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax as rx
from tvm.relax.dpl import GlobalVarPattern, TuplePattern, is_op, wildcard
from tvm.relax.transform import PatternCheckContext

from stages.lowering.rewriter import is_call

_REBUILDER = "dequantize"  # what the names of kernels begin with that rebuild a weight


@tvm.transform.module_pass(opt_level=0, name="FuseDequantizeMatmul")
def fuse_dequantize_matmul(module: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
    """Fuse; it comes after FuseOps and FuseTIR, for the matmul may carry elementwise work already."""
    if not any(var.name_hint.startswith(_REBUILDER) for var in module.get_global_vars()):
        return module
    functions = [function for _, function in module.functions_items() if isinstance(function, rx.Function)]
    found = sorted(set().union(*(_forms(function) for function in functions)), reverse=True)
    if not found:
        return module
    fuse = rx.transform.FuseOpsByPattern([_pattern(*form) for form in found], bind_constants=False)
    return tvm.transform.Sequential([fuse, rx.transform.FuseTIR()])(module)


def _forms(function: rx.Function) -> set[tuple[int, int]]:
    """Return what kinds of pairs ``function`` has: the number of tensors a weight is rebuilt from, and of arguments of
    the matmul beside x and the weight. To search for what is not there takes as long as for what is.
    """
    rebuilt: dict[Any, int] = {}
    found: set[tuple[int, int]] = set()
    for block in function.body.blocks:
        for binding in block.bindings:
            if is_call(binding.value, "call_tir"):
                kernel, arguments = binding.value.args[0].name_hint, list(binding.value.args[1].fields)
                if kernel.startswith(_REBUILDER):
                    rebuilt[binding.var] = len(arguments)
                elif "NT_matmul" in kernel:
                    found |= {(rebuilt[weight], len(arguments) - 2) for weight in arguments[1:2] if weight in rebuilt}
    return found


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
