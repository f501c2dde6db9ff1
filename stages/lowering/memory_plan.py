"""Reads the static memory plan: how much each function will ask of the device beside weights and KV cache."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import tvm
from tvm import relax as rx

from stages.lowering.rewriter import bound_values
from stages.lowering.scratch import scratch_of, size_of


def planned_bytes(module: tvm.IRModule) -> dict[str, int]:
    """Return function -> bytes it allocates, its results among them, at the upper bounds of its symbolic sizes.

    ``module`` has been through StaticPlanBlockMemory, which shares storage between what is not alive at once; with it
    counts what the kernel that needs most allocates for itself. A size without a bound counts as nothing.
    """
    functions = [(var.name_hint, fn) for var, fn in module.functions_items() if isinstance(fn, rx.Function)]
    scratch = scratch_of(module)
    return {name: _bytes_of(function, scratch) for name, function in sorted(functions, key=lambda pair: pair[0])}


def _bytes_of(function: rx.Function, scratch: Callable[[rx.Call, Callable[[Any], int]], int]) -> int:
    bounds = dict(function.attrs["tir_var_upper_bound"]) if "tir_var_upper_bound" in (function.attrs or {}) else {}
    storage, result = (tvm.ir.Op.get(f"relax.{name}") for name in ("memory.alloc_storage", "builtin.alloc_tensor"))
    total = largest = 0

    def size(dim: Any) -> int:
        return size_of(dim, lambda var: int(bounds.get(var.name, 0)))

    for call in bound_values(function):
        if not isinstance(call, rx.Call):
            continue
        if isinstance(call.op, tvm.ir.GlobalVar):
            largest = max(largest, scratch(call, size))
        elif call.op in (storage, result):
            dims = call.args[0].values
            width = tvm.DataType(call.args[1].value).itemsize if call.op == result else 1
            total += width * math.prod(size(dim) for dim in dims)
    return total + largest
