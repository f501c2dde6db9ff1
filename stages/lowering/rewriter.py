"""What passes that replace single calls share: one rewriter over all functions of a module, and a look at bindings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import tvm
from tvm import relax as rx
from tvm import tirx
from tvm.relax.expr_functor import PyExprMutator


def bound_values(function: rx.Function) -> Iterator[Any]:
    """Return what is bound in ``function``, in order. A visitor would also be called for every part of every type,
    which takes longer than most passes.
    """
    for block in function.body.blocks:
        for binding in block.bindings:
            yield binding.value


class Rewriter(PyExprMutator):
    """Visits the calls of one module; a subclass, decorated as a ``mutator``, overrides ``replace``. Equal kernels are
    made once.
    """

    def __init__(self, module: tvm.IRModule) -> None:
        super().__init__(module)
        self.module = module
        self.kernels: dict[Any, tvm.ir.GlobalVar] = {}

    def rewritten(self) -> tvm.IRModule:
        """Return the module after all replacements, without what they made unused."""
        for var, function in self.module.functions_items():
            if isinstance(function, rx.Function):
                self.enter(function)
                changed = self.visit_expr(function)
                self.builder_.update_func(var, rx.analysis.remove_all_unused(changed))
        return self.builder_.get()

    def enter(self, function: rx.Function) -> None:
        """Look at a function before it is visited."""

    def visit_call_(self, call: rx.Call) -> Any:
        """Visit the arguments, then ask for a replacement."""
        visited = self.visit_expr_post_order(call)
        replacement = self.replace(visited, call)
        return visited if replacement is None else replacement

    def replace(self, call: rx.Call, before: rx.Call) -> Any:
        """Return what takes the place of ``call``, None for itself; ``before`` is the call as it was in the module."""
        raise NotImplementedError

    def bound(self, value: Any, name: str) -> Any:
        """Return the call of the operator ``relax.<name>`` that ``value`` is bound to, else None."""
        call = self.lookup_binding(value) if isinstance(value, rx.Var) else None
        return call if is_call(call, name) else None

    def uncast(self, value: Any) -> Any:
        """Return ``value``, or what it is cast from."""
        cast = self.bound(value, "astype")
        return value if cast is None else cast.args[0]

    def call_kernel(self, key: Any, make: Any, name: str, arguments: list[Any], shape: Any) -> rx.Call:
        """Return the call of the kernel of ``key``, which ``make()`` makes if it is new; the result is float32."""
        if key not in self.kernels:
            self.kernels[key] = self.builder_.add_func(make(), name)
        return rx.call_tir(self.kernels[key], rx.Tuple(arguments), out_ty=rx.TensorType(shape, "float32"))


def is_call(value: Any, name: str) -> bool:
    """Say whether ``value`` is a call of the operator ``relax.<name>``."""
    return isinstance(value, rx.Call) and value.op == tvm.ir.Op.get(f"relax.{name}")


def rows_of(value: Any) -> tuple[tuple[int | None, ...], int] | None:
    """Return the sizes of the rows of a float32 tensor, None for those known at run time, and their static width; None
    for what is no such tensor.
    """
    ty = value.ty
    if not isinstance(ty, rx.TensorType) or str(ty.dtype) != "float32" or ty.shape is None or ty.ndim < 2:
        return None
    *rows, width = (int(size) if isinstance(size, tirx.IntImm) else None for size in ty.shape.values)
    return None if width is None else (tuple(rows), width)
