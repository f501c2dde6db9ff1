"""The library of compiled kernels for a conversion: reused where one is kept, else compiled."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages.quantization import compiled
from stages.targets import processor, toolchain

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from stages.memo import Memo

KIND = "kernels"


def load(memo: Memo, names: Sequence[str], scratch: Path, tools: Mapping[str, str]) -> compiled.Kernels | None:
    """Return the kernels ``names`` for this machine; None without a C++ compiler: NumPy does the same, slower.

    ``tools`` are the versions of what compiles them.
    """
    cxx = toolchain.cxx()
    if cxx is None:
        return None
    cpu = processor.host_cpu()
    document = {"cpu": cpu, "cxx": cxx.version, "tools": dict(tools), "names": [*names]}
    part = memo.recall(KIND, document)
    if part is None:
        library = scratch / "kernels.so"
        try:
            compiled.build(library, cpu, cxx.path, names, toolchain.environment())
        except compiled.KernelError as error:
            memo.warn(f"kernels could not be compiled, NumPy did the work: {error}")
            return None
        part = memo.remember(KIND, document, library)
        library.unlink()
    return compiled.Kernels(part.path)
