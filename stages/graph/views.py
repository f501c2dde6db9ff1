"""The views of an exported graph: signatures, the table of operators, readable IR."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import tvm
from tvm import relax as rx
from tvm import tirx

from stages.documents.graph import Signature


def signatures(module: tvm.IRModule) -> dict[str, Signature]:
    """Return function name -> {"inputs": [[name, type]], "output": type}; packed parameters are one entry."""
    return {name: _signature(function) for name, function in relax_functions(module)}


def _signature(function: rx.Function) -> Signature:
    inputs = [(str(var.name), type_text(var.ty)) for var in function.params]
    return {"inputs": inputs, "output": type_text(function.ret_ty)}


def type_text(ty: Any) -> str:
    """Return a type as people read it: ``float32[1, seq_len, 128]``."""
    if isinstance(ty, rx.TensorType):
        return f"{ty.dtype}[{_dims(ty.shape.values[:])}]"
    if isinstance(ty, rx.ShapeType):
        return f"shape[{_dims(ty.values)}]"
    if isinstance(ty, rx.TupleType):
        if len(ty.fields) > 4:
            return f"tuple of {len(ty.fields)}"
        return f"({', '.join(type_text(field) for field in ty.fields)})"
    return "object"


def _dims(dims: Any) -> str:
    return ", ".join(map(dim_text, dims))


def dim_text(dim: Any) -> str:
    """Return a size as people read it; what TVM prints of a name takes a hundred times as long as the name."""
    if isinstance(dim, tirx.IntImm):
        return str(dim.value)
    return str(dim.name if isinstance(dim, tirx.Var) else dim)


def operators(module: tvm.IRModule) -> dict[str, dict[str, int]]:
    """Return function name -> operator -> how often it is called; a kernel call counts under the kernel's name."""
    return {name: _count(function) for name, function in relax_functions(module)}


def _count(function: rx.Function) -> dict[str, int]:
    return dict(sorted(Counter(map(operator_name, calls(function))).items()))


def bindings(function: rx.Function) -> Iterator[Any]:
    """Yield the bindings of an exported function in order; TVM's own visitor takes a quadratic time on packed
    parameters, whose types it walks again for each of them.
    """
    for block in function.body.blocks:
        yield from block.bindings[:]  # a list: an array's own iterator takes three times as long


def calls(function: rx.Function) -> Iterator[rx.Call]:
    """Yield the calls that are bound, which in an exported function are all."""
    for binding in bindings(function):
        if isinstance(binding.value, rx.Call):
            yield binding.value


def operator_name(call: rx.Call) -> str:
    """Return the name of the operator, kernel or packed function of a call."""
    name = getattr(call.op, "name", None) or getattr(call.op, "global_symbol", None) or call.op.name_hint
    if name in {"relax.call_tir", "relax.call_pure_packed", "relax.call_dps_packed"}:
        callee = call.args[0]
        return str(getattr(callee, "name_hint", None) or callee.global_symbol)
    return str(name).removeprefix("relax.")


def kernels(module: tvm.IRModule) -> list[str]:
    """Return the names of the module's kernels (PrimFuncs), sorted."""
    return sorted(var.name_hint for var, function in module.functions_items() if isinstance(function, tirx.PrimFunc))


def operator_table(counts: dict[str, dict[str, int]]) -> str:
    """Render :func:`operators` as a Markdown table."""
    names = sorted({operator for found in counts.values() for operator in found})
    lines = ["| operator | " + " | ".join(counts) + " |", "|---|" + "---:|" * len(counts)]
    for operator in names:
        cells = [operator, *(str(found.get(operator, "")) for found in counts.values())]
        lines += [f"| {' | '.join(cells)} |"]
    return "\n".join(lines) + "\n"


def script(module: tvm.IRModule) -> str:
    """Return the module as TVMScript text, to be read (it does not parse back)."""
    return str(module.script(show_meta=False))


def relax_functions(module: tvm.IRModule) -> list[tuple[str, rx.Function]]:
    """Return the functions by name, sorted; kernels left out."""
    found = [(var.name_hint, fn) for var, fn in module.functions_items() if isinstance(fn, rx.Function)]
    return sorted(found, key=lambda pair: pair[0])
