"""The library of compiled kernels for a conversion: reused where one is kept, else compiled."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages.quantization import native
from stages.targets import host, toolchain

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from stages.keeper import Keeper

KIND = "kernels"


def load(keeper: Keeper, names: Sequence[str], scratch: Path, tools: Mapping[str, str]) -> native.Kernels | None:
    """Return the kernels ``names`` for this machine; None without a C++ compiler: NumPy does the same, slower.

    ``tools`` are the versions of what compiles them.
    """
    cxx = toolchain.cxx()
    if cxx is None:
        return None
    cpu = host.host_cpu()
    document = {"cpu": cpu, "cxx": cxx.version, "tools": dict(tools), "names": [*names]}
    part = keeper.recall(KIND, document)
    if part is None:
        library = scratch / "kernels.so"
        try:
            native.build(library, cpu, cxx.path, names, toolchain.environment())
        except native.KernelError as error:
            keeper.warn(f"kernels could not be compiled, NumPy did the work: {error}")
            return None
        part = keeper.remember(KIND, document, library)
        library.unlink()
    return native.Kernels(part.path)
