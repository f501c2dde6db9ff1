"""The pass that fuses matmul(x, permute_dims(w)) into a kernel ``NT_matmul``, which needs no transposed weight."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax as rx
from tvm import te, tirx
from tvm.relax.utils import gen_call_tir_inputs

from stages.lowering.rewriter import KernelCall, Rewriter, is_call

SUMS = "float32"  # half precision loses a digit over every thousand terms


@tvm.transform.module_pass(opt_level=0, name="FuseTransposeMatmul")
def fuse_transpose_matmul(module: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
    """Rewrite every matmul whose right side [k, n] is the transpose of a matrix [n, k]; the transposes die."""
    return _Products(module).rewritten()


class _Products(Rewriter):
    def replace(self, call: rx.Call) -> rx.Expr | KernelCall | None:
        """Return the call of a kernel for a product with a transposed matrix."""
        weight = self._transposed(call.args[1]) if is_call(call, "matmul") else None
        if weight is None:
            return None
        x, sizes = call.args[0], _sizes(call.args[0], weight)
        if sizes is None:
            return None
        shape = [*x.ty.shape.values[:-1], weight.ty.shape.values[0]]
        product = KernelCall(sizes, lambda: _kernel(x, weight), "NT_matmul", [x, weight], shape)
        out_dtype = str(call.attrs.out_dtype or "") or str(x.ty.dtype)
        return product if out_dtype == SUMS else self.builder.normalize(rx.op.astype(self.emit(product), out_dtype))

    def _transposed(self, operand: Any) -> Any:
        """Return w [n, k] if ``operand`` is bound to its plain transpose."""
        bound = self.bound(operand, "permute_dims")
        if bound is None:
            return None
        axes, matrix = bound.attrs.axes, bound.args[0]
        plain = axes is None or [int(axis) for axis in axes] == [1, 0]
        return matrix if plain and matrix.ty.ndim == 2 else None


def _kernel(x: rx.Var, weight: rx.Var) -> tirx.PrimFunc:
    return gen_call_tir_inputs(_nt_matmul, x, weight)[0]


def _sizes(*tensors: Any) -> Any:
    """Return what kernels of such ``tensors`` have in common: dtypes and sizes, with symbolic ones numbered; None if a
    size is neither a number nor a symbol.
    """
    symbols: dict[Any, str] = {}

    def size(dim: Any) -> Any:
        return int(dim) if isinstance(dim, tirx.IntImm) else symbols.setdefault(dim, f"s{len(symbols)}")

    dims = [tensor.ty.shape.values for tensor in tensors]
    if not all(isinstance(dim, tirx.IntImm | tirx.Var) for shape in dims for dim in shape):
        return None
    return tuple((str(tensor.ty.dtype), *map(size, shape)) for tensor, shape in zip(tensors, dims, strict=True))


def _nt_matmul(x: te.Tensor, w: te.Tensor) -> te.Tensor:
    """Return x [..., k] @ w [n, k].T, the exact products summed in float32, and in float32."""
    k = te.reduce_axis((0, x.shape[-1]), name="k")

    def element(*index: tirx.Var) -> tirx.PrimExpr:
        *rows, n = index
        return te.sum(x[(*rows, k)].astype(SUMS) * w[n, k].astype(SUMS), axis=k)

    return te.compute((*x.shape[:-1], w.shape[0]), element, name="NT_matmul")
