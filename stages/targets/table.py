"""The targets a bundle can be built for, as data: adding one is a row here, and one in ``backends.py`` for a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Target:
    """One kind of target, and all that the stages must know of it.

    ``kind`` is TVM's target kind; ``device`` what TVM calls the device that kernels run on; ``compute_dtype`` the dtype
    of all arithmetic, empty where the scheme's model dtype is used; ``layout`` how its kernels want matrices stored
    (stages/quantization/layouts.py); ``schedules`` names, in order, the scheduling rules tried on every kernel (see
    stages/lowering/schedules/rules.py). ``cpu_kernels``: the kernels of stages/kernels/cpu take the place of TVM's.
    ``long_windows``: contexts longer than a model's sliding window are known to be computed exactly.
    ``commits_memory``: the device takes memory when it is allocated, not when it is written to. ``export_attributes``
    are what TVM must be told of a device to export graphs, none of which depend on it; ``limits`` the attributes that
    kernels are generated for; ``needs`` what pip installs beside TVM where a bundle runs.
    """

    name: str
    kind: str
    device: str
    compute_dtype: str
    layout: str
    schedules: tuple[str, ...]
    cpu_kernels: bool = False
    long_windows: bool = False
    commits_memory: bool = False
    export_attributes: Mapping[str, str] = field(default_factory=dict)
    limits: Mapping[str, int] = field(default_factory=dict)
    needs: tuple[str, ...] = ()


TARGETS: dict[str, Target] = {
    "llvm": Target(
        name="llvm",
        kind="llvm",
        device="cpu",
        compute_dtype="float32",
        layout="n32",
        schedules=("cpu-matmul", "cpu-reduction", "cpu-elementwise"),
        cpu_kernels=True,
        long_windows=True,
    ),
    "cuda": Target(
        name="cuda",
        kind="cuda",
        device="cuda",
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
        commits_memory=True,
        # Unasked, TVM looks for a GPU and complains that there is none.
        export_attributes={"arch": "sm_80"},
        # What every architecture from sm_70 on grants a block without opting in.
        limits={
            "max_threads_per_block": 1024,
            "max_shared_memory_per_block": 49152,
            "thread_warp_size": 32,
            "registers_per_block": 65536,
        },
        needs=("nvidia-cuda-runtime==13.0.*",),
    ),
}
