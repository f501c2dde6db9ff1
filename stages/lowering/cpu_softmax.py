"""The pass that replaces softmax by a kernel on a CPU."""

from __future__ import annotations

import tvm
from tvm import relax as rx

from stages.kernels.cpu.softmax import SoftmaxKernel, softmax_kernel
from stages.lowering.rewriter import KernelCall, Rewriter, is_call, rows_of


@tvm.transform.module_pass(opt_level=0, name="CPUSoftmax")
def cpu_softmax(module: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
    """Replace every softmax of float32 rows by a call of a kernel."""
    return _Softmaxes(module).rewritten()


class _Softmaxes(Rewriter):
    def replace(self, call: rx.Call) -> KernelCall | None:
        """Return the call of the kernel of a softmax over the last axis."""
        rows = rows_of(call.args[0]) if is_call(call, "nn.softmax") else None
        if rows is None or rows[0].count(None) > 1 or int(call.attrs.axis) not in (-1, len(rows[0])):
            return None
        softmax = SoftmaxKernel(*rows)
        return KernelCall(softmax, lambda: softmax_kernel(softmax), "softmax", call.args, call.ty.shape.values)
