"""Reads the static memory plan: how much each function will ask of the device beside weights and KV cache."""

from __future__ import annotations

import math
from typing import Any

import tvm
from tvm import relax as rx
from tvm import tirx


def planned_bytes(module: tvm.IRModule) -> dict[str, int]:
    """Return function -> bytes of the storages it allocates, at the upper bounds of its symbolic sizes.

    ``module`` has been through StaticPlanBlockMemory. A storage whose size is still symbolic there counts as nothing.
    """
    functions = [(var.name_hint, fn) for var, fn in module.functions_items() if isinstance(fn, rx.Function)]
    return {name: _bytes_of(function) for name, function in sorted(functions, key=lambda pair: pair[0])}


def _bytes_of(function: rx.Function) -> int:
    total = 0

    def visit(node: Any) -> None:
        nonlocal total
        if isinstance(node, rx.Call) and node.op == tvm.ir.Op.get("relax.memory.alloc_storage"):
            sizes = node.args[0].values
            if all(isinstance(size, tirx.IntImm) for size in sizes):
                total += math.prod(int(size) for size in sizes)

    rx.analysis.post_order_visit(function, visit)
    return total
