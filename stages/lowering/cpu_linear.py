"""Linear layers on a CPU: x @ w.T of a matrix in layout n32, with the bias and the sum after it, becomes one kernel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import tvm
import tvm_ffi
from tvm import relax as rx

from stages.kernels.cpu.linear_float import LinearLayer, linear_kernel
from stages.kernels.cpu.linear_int8 import int8_kernel, offset_factor, quantizer, with_bytes
from stages.kernels.cpu.stored import Stored
from stages.lowering.rewriter import KernelCall, Rewriter, bound_values, is_call, read_by, rows_of
from stages.sizes import N32_BLOCK as BLOCK
from stages.targets.processor import byte_product

_FLOATS = ("float32", "float16")


def cpu_linear(features: Collection[str], activations: str = "float") -> tvm.transform.Pass:
    """Return the pass, for a processor with ``features`` (LLVM's names). With ``activations`` ``int8``, those of
    layers with quantized weights are quantized too; the processor must be able to multiply bytes.
    """
    dot = byte_product(features) if activations == "int8" else ""

    @tvm.transform.module_pass(opt_level=0, name="CPULinear")
    def run(module: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        return _Linears(module, features, dot).rewritten()

    return run


def register_tile(features: Collection[str]) -> tuple[int, int]:
    """Return (rows, lanes) of the accumulators that leave registers for a row of weights and an activation."""
    if "avx512f" in features:
        return 8, 32  # 16 of 32 registers of 16 lanes
    if "avx2" in features:
        return 6, 16  # 12 of 16 registers of 8 lanes
    return 6, 8  # 12 registers of 4 lanes


def row_streams(features: Collection[str], bits: int) -> int:
    """Return how many blocks of features one row is multiplied by at once, of weights of ``bits`` (0: floats).

    Measured on two cores that memory gives 24 GB/s: 4 streams read 18 % faster than one. Unpacking needs the registers
    of two of them.
    """
    if "avx512f" not in features:
        return 1
    return 2 if bits else 4


def _uses(function: rx.Function) -> Counter[Any]:
    """Count how often each variable of ``function`` is read."""
    return Counter(read for value in (*bound_values(function), function.body.body) for read in read_by(value))


class _Linears(Rewriter):
    def __init__(self, module: tvm.IRModule, features: Collection[str], dot: str) -> None:
        super().__init__(module)
        self.features = features
        self.dot = dot
        self.uses: Counter[Any] = Counter()

    def enter(self, function: rx.Function) -> bool:
        """Count uses: a value with several users is not fused into one of them."""
        self.uses = _uses(function)
        return True

    def replace(self, call: rx.Call) -> KernelCall | None:
        """Return the call of a kernel for a product, and for the sum of a product and something else."""
        if is_call(call, "matmul"):
            return self._linear(call)
        if is_call(call, "add"):
            left, right = call.args
            return self._join(left, right) or self._join(right, left)
        return None

    def _linear(self, matmul: rx.Call) -> KernelCall | None:
        """Return the call of a kernel in place of ``matmul``, None where it is not x @ w.T of a stored matrix."""
        x, w = matmul.args
        transpose, rows = self.bound(w, "permute_dims"), rows_of(x)
        plain = transpose is not None and transpose.attrs.axes is None
        weight = self.bound(transpose.args[0], "call_tir") if plain else None
        if weight is None or rows is None or any(size != 1 for size in rows[0][:-1]):
            return None
        stored = _stored(weight)
        if stored is None:
            return None
        for var in (w, transpose.args[0]):
            if self.uses[var] == 1:
                self.drop(var)
        count = 1 if rows[0][-1] == 1 else None
        tile, streams = register_tile(self.features), row_streams(self.features, stored.bits)
        layer = LinearLayer(stored, count, len(rows[0]) - 1, tile=tile, streams=streams)
        inputs = [x]
        if self.dot and stored.bits:
            layer = with_bytes(layer, self.dot)
            inputs = quantized(self, x, count, layer)
        return _call(layer, [*inputs, *weight.args[1].fields], [*x.ty.shape.values[:-1], stored.n])

    def _join(self, product: Any, addend: Any) -> KernelCall | None:
        """Return the call that also adds ``addend`` to what the kernel behind ``product`` makes, or None."""
        call = self.values.get(product) if isinstance(product, rx.Var) else None
        if not isinstance(call, KernelCall) or call.key.residual or self.uses[product] != 1:
            return None
        layer, vector = call.key, self.uncast(addend)
        if not layer.bias and vector.ty.ndim == 1 and str(vector.ty.dtype) in _FLOATS:
            layer, added = replace(layer, bias=str(vector.ty.dtype)), vector
        elif addend.ty.dtype == "float32" and tvm_ffi.structural_equal(addend.ty.shape, product.ty.shape):
            layer, added = replace(layer, residual=True), addend
        else:
            return None
        self.drop(product)
        return _call(layer, [*call.arguments, added], call.shape)


def quantized(rewriter: Rewriter, x: Any, count: int | None, layer: LinearLayer) -> list[Any]:
    """Emit the quantization of ``count`` rows (None: known at run time) that ``layer`` reads; return bytes, scales and
    offsets.
    """
    weight = layer.weight
    size = count, layer.outer, weight.k, weight.group, offset_factor(layer)
    kernel = rewriter.kernel(size, lambda: quantizer(*size), "quantize_rows")
    rows, groups = x.ty.shape.values[-2], weight.k // weight.group
    shapes = [((rows, weight.k // 4), "int32"), ((rows, groups), "float32"), ((rows, groups), "int32")]
    types = [rx.TensorType(shape, dtype) for shape, dtype in shapes]
    made = rewriter.emit(rx.call_tir(kernel, rx.Tuple([x]), out_ty=types))
    return [rewriter.emit(rx.TupleGetItem(made, i)) for i in range(3)]


def _call(layer: LinearLayer, arguments: Sequence[Any], shape: Sequence[Any]) -> KernelCall:
    make = int8_kernel if layer.dot else linear_kernel
    return KernelCall(layer, lambda: make(layer), "linear", arguments, shape)


def _stored(call: rx.Call) -> Stored | None:
    """Return what ``call`` rebuilds a matrix from, if that is a matrix in blocks of features."""
    if not call.args[0].name_hint.startswith("dequantize"):
        return None
    n, k = (int(size) for size in call.ty.shape.values)
    return stored_as([field.ty for field in call.args[1].fields], k, n)


def stored_as(tensors: Sequence[rx.TensorType], k: int, n: int = 0) -> Stored | None:
    """Return what a matrix of rows of ``k`` is stored as, if in blocks of features: ``n`` of them, or all there are."""
    if any(tensor.ndim != 3 or int(tensor.shape.values[2]) != BLOCK for tensor in tensors):
        return None
    columns = [int(tensor.shape.values[1]) for tensor in tensors]
    n = n or int(tensors[0].shape.values[0]) * BLOCK
    dtype = str(tensors[-1].dtype)
    if len(tensors) == 1:
        return Stored(n, k, dtype)
    words, groups, *least = columns
    if least and str(tensors[1].dtype) == "uint32":
        return Stored(n, k, dtype, 32 * words // k, 32, minimum=True, levels=True)
    bits, group = 32 * words // k, k // groups
    if dtype == "uint8":
        return Stored(n, k, dtype, bits, group, mxfp4=True)
    return Stored(n, k, dtype, bits, group, minimum=bool(least)) if bits in (4, 8) else None
