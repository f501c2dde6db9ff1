"""Loop schedules: the rules a target names in its row, tried in order on every kernel that has no schedule yet."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import tvm

# Names as targets use them -> where the rule is, to be imported only for such a target.
RULES: dict[str, str] = {
    "cpu-matmul": "stages.lowering.schedules.cpu_matmul:CPUMatmul",
    "cpu-elementwise": "stages.lowering.schedules.cpu_elementwise:CPUElementwise",
    "cpu-reduction": "tvm.s_tir.dlight.cpu:Reduction",
    "cuda-tensor-matmul": "stages.lowering.schedules.tensor_matmul:TensorMatmul",
    "gpu-matmul": "tvm.s_tir.dlight.gpu:Matmul",
    "gpu-gemv": "tvm.s_tir.dlight.gpu:GEMV",
    "gpu-reduction": "tvm.s_tir.dlight.gpu:Reduction",
    "gpu-general-reduction": "tvm.s_tir.dlight.gpu:GeneralReduction",
    "gpu-fallback": "tvm.s_tir.dlight.gpu:Fallback",
}


def schedule_kernels(names: Sequence[str]) -> tvm.transform.Pass:
    """Return the pass that schedules kernels by the rules ``names``; one that no rule takes stays as it is."""
    from tvm.s_tir import dlight

    return dlight.ApplyDefaultSchedule(*(_rule(name) for name in names))


def _rule(name: str) -> object:
    module, _, attribute = RULES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)()
