"""The pass that replaces rms_norm and layer_norm by kernels on a CPU."""

from __future__ import annotations

import tvm
from tvm import relax as rx

from stages.kernels.cpu.norm import Norm, norm_kernel
from stages.lowering.rewriter import KernelCall, Rewriter, is_call, rows_of


@tvm.transform.module_pass(opt_level=0, name="CPUNorm")
def cpu_norm(module: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
    """Replace every norm of float32 rows by a call of a kernel."""
    return _Norms(module).rewritten()


class _Norms(Rewriter):
    def replace(self, call: rx.Call) -> KernelCall | None:
        """Return the call of the kernel of a norm."""
        centred = is_call(call, "nn.layer_norm")
        rows = rows_of(call.args[0]) if centred or is_call(call, "nn.rms_norm") else None
        if rows is None or [int(axis) for axis in call.attrs.axes] not in ([-1], [len(rows[0])]):
            return None
        x, *parameters = call.args
        parameters = [self.uncast(parameter) for parameter in parameters]
        if rows[0].count(None) > 1 or any(parameter.ty.ndim != 1 for parameter in parameters):
            return None
        norm = Norm(*rows, float(call.attrs.epsilon), str(parameters[0].ty.dtype), centred)
        name = "layer_norm" if centred else "rms_norm"
        return KernelCall(norm, lambda: norm_kernel(norm), name, [x, *parameters], x.ty.shape.values)
