"""Join the modules of single functions into one, sharing equal kernels. Before lowering: after it little is shared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tvm
from tvm import relax as rx
from tvm import tirx
from tvm.relax.expr_functor import PyExprMutator, mutator


def _unchanged(name: str, kernel: tirx.PrimFunc) -> tuple[str, tirx.PrimFunc]:
    return name, kernel


def merge(
    modules: Sequence[tvm.IRModule],
    named: Callable[[str, tirx.PrimFunc], tuple[str, tirx.PrimFunc]] = _unchanged,
) -> tvm.IRModule:
    """Return one module with every relax function of ``modules`` and their kernels, clashing names made unique.

    Kernels lose their ``global_symbol``: duplicates are not allowed, and the last phase attaches new ones. ``named``
    may give a kernel another name and other attributes. :class:`ValueError` if two modules define the same function.
    """
    builder = rx.BlockBuilder()
    functions: dict[str, rx.Function] = {}
    for module in modules:
        items = sorted(module.functions_items(), key=lambda item: item[0].name_hint)
        kernels = {
            var.name_hint: _add(builder, *named(var.name_hint, _anonymous(function)))
            for var, function in items
            if isinstance(function, tirx.PrimFunc)
        }
        for var, function in items:
            if isinstance(function, rx.Function):
                if var.name_hint in functions:
                    raise ValueError(f"two graphs define the function {var.name_hint}")
                functions[var.name_hint] = _Rename(kernels).visit_expr(function)
    merged = builder.get()
    for name, function in functions.items():
        merged[name] = function
    return merged


def _add(builder: rx.BlockBuilder, name: str, kernel: tirx.PrimFunc) -> tvm.ir.GlobalVar:
    return builder.add_func(kernel, name)


def _anonymous(kernel: tirx.PrimFunc) -> tirx.PrimFunc:
    return kernel.without_attr("global_symbol") if kernel.attrs and "global_symbol" in kernel.attrs else kernel


@mutator
class _Rename(PyExprMutator):
    """Points calls at the kernels of the merged module."""

    def __init__(self, kernels: Mapping[str, tvm.ir.GlobalVar]) -> None:
        super().__init__()
        self.kernels = kernels

    def visit_global_var_(self, var: tvm.ir.GlobalVar) -> Any:
        return self.kernels.get(var.name_hint, var)
