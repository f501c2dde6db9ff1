"""matmul(x, permute_dims(w)) becomes one kernel ``NT_matmul``, so that no transposed copy of a weight is made."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax as rx
from tvm import te, tirx
from tvm.relax.expr_functor import PyExprMutator, mutator

SUMS = "float32"  # half precision loses a digit over every thousand terms


@tvm.transform.module_pass(opt_level=0, name="FuseTransposeMatmul")
def fuse_transpose_matmul(module: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
    """Rewrite every matmul whose right side [k, n] is the transpose of a matrix [n, k]; the transposes die."""
    rewriter = _Rewriter(module)
    for var, function in module.functions_items():
        if isinstance(function, rx.Function):
            rewriter.builder_.update_func(var, rx.analysis.remove_all_unused(rewriter.visit_expr(function)))
    return rewriter.builder_.get()


@mutator
class _Rewriter(PyExprMutator):
    """Visits the calls of one module."""

    def visit_call_(self, call: rx.Call) -> Any:
        call = self.visit_expr_post_order(call)
        if call.op != tvm.ir.Op.get("relax.matmul"):
            return call
        weight = self._transposed(call.args[1])
        if weight is None:
            return call
        out_dtype = str(call.attrs.out_dtype or "") or str(call.args[0].ty.dtype)
        product = self.builder_.call_te(_nt_matmul, call.args[0], weight, primfunc_name_hint="NT_matmul")
        return product if out_dtype == SUMS else rx.op.astype(self.builder_.normalize(product), out_dtype)

    def _transposed(self, operand: Any) -> Any:
        """Return w [n, k] if ``operand`` is bound to its plain transpose."""
        bound = self.lookup_binding(operand) if isinstance(operand, rx.Var) else None
        if not isinstance(bound, rx.Call) or bound.op != tvm.ir.Op.get("relax.permute_dims"):
            return None
        axes = bound.attrs.axes
        matrix = bound.args[0]
        plain = axes is None or [int(axis) for axis in axes] == [1, 0]
        return matrix if plain and matrix.ty.ndim == 2 else None


def _nt_matmul(x: te.Tensor, w: te.Tensor) -> te.Tensor:
    """Return x [..., k] @ w [n, k].T, the exact products summed in float32, and in float32."""
    k = te.reduce_axis((0, x.shape[-1]), name="k")

    def element(*index: tirx.Var) -> tirx.PrimExpr:
        *rows, n = index
        return te.sum(x[(*rows, k)].astype(SUMS) * w[n, k].astype(SUMS), axis=k)

    return te.compute((*x.shape[:-1], w.shape[0]), element, name="NT_matmul")
