"""The one list of passes, in phases, and the function that runs it from merged graphs to a module ready to compile."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

import tvm
from tvm import relax as rx

from stages.lowering.cpu_experts import cpu_experts
from stages.lowering.cpu_gate import cpu_gate
from stages.lowering.cpu_linear import cpu_linear
from stages.lowering.cpu_norm import cpu_norm
from stages.lowering.cpu_softmax import cpu_softmax
from stages.lowering.cuda_graph import capture_cuda_graphs
from stages.lowering.fold_states import fold_states
from stages.lowering.fuse_dequantize import fuse_dequantize_matmul
from stages.lowering.fuse_operators import fuse_operators
from stages.lowering.fuse_transpose import fuse_transpose_matmul
from stages.lowering.legalize import legalize
from stages.lowering.memory_plan import planned_bytes
from stages.lowering.metadata import attach_metadata
from stages.lowering.name_kernels import name_kernels
from stages.lowering.plain_names import plain_names
from stages.lowering.scatter_get_item import scatter_tuple_get_item
from stages.lowering.schedules.rules import schedule_kernels
from stages.targets.table import Target

if TYPE_CHECKING:
    from stages.documents.files import JsonObject


def phases(
    row: Target, features: Collection[str] = (), activations: str = "float", *, cuda_graph: bool = False
) -> dict[str, list[Any]]:
    """Return phase -> passes, in order, for a processor with ``features`` and the arithmetic of ``activations``.

    ``finalize`` comes after the memory plan has been read; ``cuda_graph`` is as in :func:`lower`.
    """
    passes = rx.transform
    return {
        "graph": [
            *(_for_cpu(features, activations) if row.cpu_kernels else []),
            fuse_transpose_matmul,
            rx.backend.DispatchSampling(),
            rx.backend.DispatchSortScan(),
            fold_states,
        ],
        "kernels": [
            legalize,
            # Before fusion and scheduling hide that a kernel only reshapes: what is recognised becomes a view.
            passes.RewriteDataflowReshape(),
            passes.AnnotateTIROpPattern(),
            fuse_operators,
            passes.DeadCodeElimination(),
            fuse_dequantize_matmul,
            scatter_tuple_get_item,
            plain_names,
        ],
        "schedule": [schedule_kernels(row.schedules)],
        "plan": [
            passes.ToNonDataflow(),
            passes.RemovePurityChecking(),
            passes.CallTIRRewrite(),
            passes.StaticPlanBlockMemory(),
        ],
        "finalize": [
            *([capture_cuda_graphs] if cuda_graph else []),
            passes.LowerAllocTensor(),
            passes.KillAfterLastUse(),
            passes.LowerRuntimeBuiltin(),
            # The KV cache's sizes are computed from symbolic shapes, which the shape lowering alone does not cover.
            passes.ComputePrimValue(),
            passes.VMShapeLower(),
            name_kernels,
            passes.AttachGlobalSymbol(),
        ],
    }


def _for_cpu(features: Collection[str], activations: str) -> list[Any]:
    """Return the passes that put our kernels in place of operators."""
    return [cpu_linear(features, activations), cpu_experts(features, activations), cpu_norm, cpu_gate, cpu_softmax]


def lower(
    module: tvm.IRModule,
    row: Target,
    target: tvm.target.Target,
    describe: Callable[[Mapping[str, int]], JsonObject],
    progress: Callable[[int, int], None],
    features: Collection[str] = (),
    activations: str = "float",
    *,
    cuda_graph: bool = False,
    schedule: Callable[[tvm.IRModule], tvm.IRModule] | None = None,
) -> tvm.IRModule:
    """Return ``module`` lowered for ``target``, with ``_metadata``: what ``describe`` makes of the planned bytes of
    each function. ``progress`` is called with phases done and in all; ``features`` are what the processor that runs the
    host code has (LLVM's names), ``activations`` is ``float``, or ``int8`` for quantized ones; ``cuda_graph`` replays
    what has static sizes; ``schedule`` takes the place of the phase of that name, and comes to the same.
    """
    steps = phases(row, features, activations, cuda_graph=cuda_graph)
    with target:
        for number, (phase, passes) in enumerate(steps.items()):
            progress(number, len(steps))
            if phase == "finalize":
                module = attach_metadata(describe(planned_bytes(module)))(module)
            if phase == "schedule" and schedule:
                module = schedule(module)
            else:
                module = tvm.transform.Sequential(passes, name=phase)(module)
    progress(len(steps), len(steps))
    return module
