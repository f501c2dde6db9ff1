"""Base of passes that replace single calls: a rewriter over all functions of a module, and queries of bindings."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import relax as rx
from tvm import tirx

from stages.ir.compat import global_var


def bound_values(function: rx.Function) -> Iterator[Any]:
    """Return what is bound in ``function``, in order. A visitor would also be called for every part of every type,
    which takes longer than most passes.
    """
    for block in function.body.blocks:
        for binding in block.bindings[:]:  # a list: an array's own iterator takes three times as long
            yield binding.value


def read_by(value: Any) -> Iterator[Any]:
    """Return what a value is made of, through tuples: variables, each as often as it is read, and constants."""
    if isinstance(value, rx.Call | rx.Tuple):
        for part in (value.args if isinstance(value, rx.Call) else value.fields)[:]:
            yield from read_by(part)
    else:
        yield value.tuple_value if isinstance(value, rx.TupleGetItem) else value


def with_blocks(function: rx.Function, blocks: Sequence[rx.BindingBlock]) -> rx.Function:
    """Return ``function`` with other bindings."""
    body = rx.SeqExpr(blocks, function.body.body)
    return rx.Function(function.params, body, function.ret_ty, function.is_pure, function.attrs)


@dataclass(frozen=True)
class KernelCall:
    """A call of the kernel of ``key``, which ``make()`` makes and ``name`` names; the result is float32 of ``shape``.

    A pass binds it like a call; it becomes one after the last binding, so what is dropped until then is never made.
    """

    key: Any
    make: Callable[[], tirx.PrimFunc]
    name: str
    arguments: Sequence[Any]
    shape: Sequence[Any]


class Rewriter:
    """Goes through the calls of one module; a subclass overrides ``replace``. Variables stay: a replacement is bound to
    the same one, as its value has the same type. Equal kernels are made once.
    """

    def __init__(self, module: tvm.IRModule) -> None:
        self.module = module
        self.builder = rx.BlockBuilder()
        for var in module.get_global_vars():
            self.builder.get_unique_name(var.name_hint)
        self.kernels: dict[Any, tvm.ir.GlobalVar] = {}
        self.made: dict[tvm.ir.GlobalVar, tirx.PrimFunc] = {}
        self.values: dict[rx.Var, Any] = {}
        self.added: list[rx.Var] = []

    def rewritten(self) -> tvm.IRModule:
        """Return the module after all replacements, without what they made unused."""
        rewritten = self.module.clone()
        for var, function in self.module.functions_items():
            if isinstance(function, rx.Function):
                rewritten[var] = self._rewrite(function)
        rewritten.update(tvm.IRModule(self.made))
        return rewritten

    def _rewrite(self, function: rx.Function) -> rx.Function:
        self.values = {}
        if not self.enter(function):
            return function
        blocks = [(block, self._replaced(block)) for block in function.body.blocks]
        if all(binding is not None for _, bound in blocks for _, binding in bound):
            return function
        return rx.analysis.remove_all_unused(with_blocks(function, [self._block(*block) for block in blocks]))

    def _replaced(self, block: rx.BindingBlock) -> list[tuple[rx.Var, rx.Binding | None]]:
        """Return the variables of a block with their bindings, None where what ``values`` has is to be bound."""
        bound: list[tuple[rx.Var, rx.Binding | None]] = []
        for binding in block.bindings[:]:
            var, value = binding.var, binding.value
            new = self.replace(value) if isinstance(value, rx.Call) else None
            bound += [(added, None) for added in self.added]
            bound.append((var, binding if new is None else None))
            self.values[var] = value if new is None else new
            self.added.clear()
        return bound

    def _block(self, block: rx.BindingBlock, bound: list[tuple[rx.Var, rx.Binding | None]]) -> rx.BindingBlock:
        remaining = [(var, binding) for var, binding in bound if var in self.values]
        return type(block)(
            [binding or rx.VarBinding(var, self._called(self.values[var])) for var, binding in remaining]
        )

    def _called(self, value: Any) -> Any:
        """Return ``value``, the call itself where it is one of a kernel."""
        if not isinstance(value, KernelCall):
            return value
        kernel = self.kernel(value.key, value.make, value.name)
        out = rx.TensorType(value.shape, "float32")
        return self.builder.normalize(rx.call_tir(kernel, rx.Tuple(value.arguments), out_ty=out))

    def enter(self, _function: rx.Function) -> bool:
        """Look at a function before its calls are replaced; say whether they are."""
        return True

    def replace(self, call: rx.Call) -> rx.Expr | KernelCall | None:
        """Return what takes the place of ``call``, None for itself."""
        raise NotImplementedError

    def emit(self, value: Any) -> rx.Var:
        """Bind ``value`` in front of the call that is being replaced."""
        value = self._called(value) if isinstance(value, KernelCall) else self.builder.normalize(value)
        self.added.append(rx.DataflowVar("lv", value.ty))
        self.values[self.added[-1]] = value
        return self.added[-1]

    def drop(self, var: rx.Var) -> None:
        """Remove the unused binding of ``var``."""
        del self.values[var]

    def kernel(self, key: Any, make: Callable[[], tirx.PrimFunc], name: str) -> tvm.ir.GlobalVar:
        """Return the kernel of ``key``, which ``make()`` makes if it is new."""
        if key not in self.kernels:
            kernel = make()
            self.kernels[key] = global_var(self.builder.get_unique_name(name), kernel)
            self.made[self.kernels[key]] = kernel
        return self.kernels[key]

    def bound(self, var: Any, name: str) -> Any:
        """Return the call of the operator ``relax.<name>`` that ``var`` is bound to, else None."""
        call = self.values.get(var) if isinstance(var, rx.Var) else None
        return call if is_call(call, name) else None

    def uncast(self, value: Any) -> Any:
        """Return ``value``, or what it is cast from."""
        cast = self.bound(value, "astype")
        return value if cast is None else cast.args[0]


operator = functools.cache(tvm.ir.Op.get)


def is_call(value: Any, name: str) -> bool:
    """Say whether ``value`` is a call of the operator ``relax.<name>``."""
    return isinstance(value, rx.Call) and value.op.same_as(operator(f"relax.{name}"))


def rows_of(value: Any) -> tuple[tuple[int | None, ...], int] | None:
    """Return the sizes of the rows of a float32 tensor, None for those known at run time, and their static width; None
    for what is no such tensor.
    """
    ty = value.ty
    if not isinstance(ty, rx.TensorType) or str(ty.dtype) != "float32" or ty.shape is None or ty.ndim < 2:
        return None
    *rows, width = (int(size) if isinstance(size, tirx.IntImm) else None for size in ty.shape.values)
    return None if width is None else (tuple(rows), width)
