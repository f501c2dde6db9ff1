"""The targets a bundle can be built for, as data. A new one is a new row (and, where needed, its schedules)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Target:
    """One kind of target.

    ``kind`` is TVM's target kind; ``compute_dtype`` the dtype of all arithmetic, empty where the scheme's model dtype
    is used; ``layout`` how its kernels want matrices stored (stages/quantization/layouts.py); ``limits`` the target
    attributes that kernels are generated for; ``schedules`` names, in order, the scheduling rules tried on every kernel
    (see stages/lowering/schedules/rules.py).
    """

    name: str
    kind: str
    compute_dtype: str
    layout: str
    schedules: tuple[str, ...]
    limits: Mapping[str, int] = field(default_factory=dict)


TARGETS: dict[str, Target] = {
    "llvm": Target(
        name="llvm",
        kind="llvm",
        compute_dtype="float32",
        layout="n32",
        schedules=("cpu-matmul", "cpu-reduction", "cpu-elementwise"),
    ),
    "cuda": Target(
        name="cuda",
        kind="cuda",
        compute_dtype="",
        layout="nk",
        schedules=(
            "cuda-tensor-matmul",
            "gpu-matmul",
            "gpu-gemv",
            "gpu-reduction",
            "gpu-general-reduction",
            "gpu-fallback",
        ),
        # What every architecture from sm_70 on grants a block without opting in.
        limits={
            "max_threads_per_block": 1024,
            "max_shared_memory_per_block": 49152,
            "thread_warp_size": 32,
            "registers_per_block": 65536,
        },
    ),
}
