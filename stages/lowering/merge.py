"""Join the modules of single functions into one, sharing equal kernels. Before lowering: after it little is shared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import tvm
from tvm import relax as rx
from tvm import tirx
from tvm.relax.expr_functor import PyExprMutator, mutator

from stages.ir.compat import global_var
from stages.ir.content import anonymous


def merge(modules: Sequence[tvm.IRModule]) -> tvm.IRModule:
    """Return one module with every relax function of ``modules`` and their kernels, clashing names made unique.

    Kernels lose their ``global_symbol``: duplicates are not allowed, and the last phase attaches new ones.
    :class:`ValueError` if two modules define the same function.
    """
    builder = rx.BlockBuilder()
    functions: dict[str, rx.Function] = {}
    for module in modules:
        items = module.functions_items()
        kernels = {
            var.name_hint: builder.add_func(anonymous(function), var.name_hint)
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


def with_kernels(module: tvm.IRModule, kernels: Mapping[str, tuple[str, tirx.PrimFunc]]) -> tvm.IRModule:
    """Return ``module`` with ``kernels`` (name of one of its own -> new name, kernel) in place of all of its own."""
    named = {name: (global_var(name, kernel), kernel) for name, kernel in kernels.values()}
    rename = _Rename({old: named[new][0] for old, (new, _) in kernels.items()})
    functions = {var: function for var, function in module.functions_items() if isinstance(function, rx.Function)}
    renamed = {var: rename.visit_expr(function) for var, function in functions.items()}
    replaced = module.clone()
    for old in kernels:
        del replaced[old]
    replaced.update(tvm.IRModule(dict(named.values()) | renamed))
    return replaced


@mutator
class _Rename(PyExprMutator):
    """Points calls at the kernels of the merged module."""

    def __init__(self, kernels: Mapping[str, tvm.ir.GlobalVar]) -> None:
        super().__init__()
        self.kernels = kernels

    def visit_global_var_(self, var: tvm.ir.GlobalVar) -> Any:
        return self.kernels.get(var.name_hint, var)
