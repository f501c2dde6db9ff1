"""The pass that replaces mixture-of-experts layers by kernels on a CPU."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import tvm
from tvm import relax as rx
from tvm import tirx

from stages.kernels.cpu.experts import Experts, experts_kernel, order_kernel
from stages.kernels.cpu.linear_float import LinearLayer
from stages.kernels.cpu.linear_int8 import with_bytes
from stages.lowering.cpu_linear import quantized, register_tile, stored_as
from stages.lowering.rewriter import KernelCall, Rewriter, is_call
from stages.sizes import N32_BLOCK as BLOCK
from stages.targets.processor import byte_product


def cpu_experts(features: Collection[str], activations: str = "float") -> tvm.transform.Pass:
    """Return the pass, for a processor with ``features`` (LLVM's names); ``activations`` are as in
    :func:`~stages.lowering.cpu_linear.cpu_linear`.
    """
    dot = byte_product(features) if activations == "int8" else ""

    @tvm.transform.module_pass(opt_level=0, name="CPUExperts")
    def run(module: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        return _Experts(module, features, dot).rewritten()

    return run


class _Experts(Rewriter):
    def __init__(self, module: tvm.IRModule, features: Collection[str], dot: str) -> None:
        super().__init__(module)
        self.features = features
        self.dot = dot
        self.orders: dict[tuple[Any, int], list[Any]] = {}

    def enter(self, _function: rx.Function) -> bool:
        """Forget the orders of another function."""
        self.orders.clear()
        return True

    def replace(self, call: rx.Call) -> KernelCall | None:
        """Return the call of a kernel in place of a layer of experts whose matrices are in blocks of features."""
        if not is_call(call, "call_tir") or not call.args[0].name_hint.startswith("expert_linear"):
            return None
        # Beside tensors, a number of rows that is known at run time is an argument.
        x, chosen, *weight = (each for each in call.args[1].fields if isinstance(each.ty, rx.TensorType))
        rows, features = call.ty.shape.values
        tokens, k = x.ty.shape.values
        stored = stored_as([each.ty for each in weight], int(k))
        each = tvm.sym.Analyzer().simplify(tirx.floordiv(rows, tokens))
        if stored is None or int(features) % BLOCK or not isinstance(each, tirx.IntImm):
            return None
        count = int(rows) if isinstance(rows, tirx.IntImm) else None
        linear, read = LinearLayer(stored, count, 0, tile=register_tile(self.features)), [x]
        if self.dot and stored.bits:
            linear = with_bytes(linear, self.dot)
            read = quantized(self, x, None if count is None else int(tokens), linear)
        layer = Experts(linear, stored.n // int(features), int(each))
        numbers = [chosen] if count is not None else self._order(chosen, layer.count)
        return KernelCall(layer, lambda: experts_kernel(layer), "experts", [*read, *numbers, *weight], [rows, features])

    def _order(self, chosen: Any, count: int) -> list[Any]:
        """Emit the order of rows by expert, once for all layers of a mixture."""
        if (chosen, count) not in self.orders:
            kernel = self.kernel(count, lambda: order_kernel(count), "order_experts")
            types = [rx.TensorType(shape, "int32") for shape in (chosen.ty.shape.values, (count + 1,))]
            made = self.emit(rx.call_tir(kernel, rx.Tuple([chosen]), out_ty=types))
            self.orders[chosen, count] = [self.emit(rx.TupleGetItem(made, number)) for number in range(2)]
        return self.orders[chosen, count]
