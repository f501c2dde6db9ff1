"""Fields of a tuple are taken where they are first used, not all at a function's entry: registers live shorter."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax as rx
from tvm.relax.expr_functor import PyExprMutator, mutator


@tvm.transform.module_pass(opt_level=0, name="ScatterTupleGetItem")
def scatter_tuple_get_item(module: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
    """Move every ``x = tuple[i]`` of the packed parameters down to its first use."""
    scattered = module.clone()
    for var, function in module.functions_items():
        if isinstance(function, rx.Function):
            scattered[var] = rx.analysis.remove_all_unused(_Scatter(function).visit_expr(function))
    return scattered


@mutator
class _Scatter(PyExprMutator):
    """Drops the binding of each field and binds it anew in front of the first expression that uses it."""

    def __init__(self, function: rx.Function) -> None:
        super().__init__()
        self.packed = [param for param in function.params if isinstance(param.ty, rx.TupleType)]
        self.fields: dict[rx.Var, rx.TupleGetItem] = {}

    def visit_var_binding_(self, binding: rx.VarBinding) -> None:
        value = binding.value
        if isinstance(value, rx.TupleGetItem) and any(value.tuple_value.same_as(param) for param in self.packed):
            self.fields[binding.var] = value
        else:
            super().visit_var_binding_(binding)

    def visit_var_(self, var: rx.Var) -> Any:
        return self._at_first_use(var) if var in self.fields else super().visit_var_(var)

    def visit_dataflow_var_(self, var: rx.Var) -> Any:
        return self._at_first_use(var) if var in self.fields else super().visit_dataflow_var_(var)

    def _at_first_use(self, var: rx.Var) -> rx.Var:
        taken = self.builder_.emit(self.fields.pop(var), name_hint=var.name)
        self.set_var_remap(var, taken)
        return taken
