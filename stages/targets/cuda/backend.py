"""CUDA as a backend (:class:`stages.targets.backends.Backend`): what is asked of compile's parameters and a toolkit."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from stages.targets import toolchain

if TYPE_CHECKING:
    from pathlib import Path

    from stages.documents.library import DeviceContents
    from stages.targets.backends import DeviceCompiler
    from stages.targets.toolchain import Program

NAME = "cuda"
PACKAGES = toolchain.CUDA_PACKAGES
INSTALL = toolchain.INSTALL_CUDA
# What CUDA 13.0 compiles for (nvrtcGetSupportedArchs). Of newer ones the toolkit has the last word.
ARCHS = (75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121)


def resolve(params: Any) -> tuple[dict[str, Any], list[str]]:
    """Return architectures sorted and the toolkit's kind named, and what is wrong with the architectures."""
    archs, kind = tuple(sorted(set(params.archs))), params.toolchain
    problems = [] if archs else ["archs: name at least one CUDA architecture, such as 80"]
    problems += [
        f"archs: {arch} is not an architecture that CUDA 13 compiles for; it knows {', '.join(map(str, ARCHS))}"
        for arch in archs
        if arch not in ARCHS and arch <= ARCHS[-1]
    ]
    if kind == "auto":
        installed = toolchain.toolkit()
        kind = installed.kind if installed else "missing"
    return {"archs": archs, "fast_math": params.fast_math, "cuda_graph": params.cuda_graph, "toolchain": kind}, problems


def toolkit(kind: str) -> Program | None:
    """Return the CUDA toolkit of ``kind`` ``pypi`` or ``system``, or None."""
    return toolchain.toolkit(kind)


def attributes(params: Any) -> dict[str, str]:
    """Return the lowest architecture: kernels are generated for it."""
    return {"arch": f"sm_{min(params.archs)}"}


def prepare(toolkit: Program, cxx: Program, params: Any) -> DeviceCompiler:
    """Load TVM's CUDA side; return what compiles CUDA source to a fatbin for all architectures."""
    from stages.targets.backends import DeviceCompiler
    from stages.targets.cuda import device_code

    device_code.load_cuda_side(toolkit, cxx)
    device_code.check_archs(toolkit, params.archs)
    options = {"archs": params.archs, "opt": params.opt, "fast_math": params.fast_math}
    compile_source = functools.partial(device_code.compile_fatbin, toolkit=toolkit, **options)
    return DeviceCompiler(compile_source, device_code.LOADER, "fatbin")


def contents(library: Path) -> DeviceContents:
    """Return the fatbins of a library by kind and architecture, and the figures of their kernels."""
    from stages.targets.backends import DeviceCodeError
    from stages.targets.cuda import cubin, fatbin

    code = fatbin.entries(library)
    try:
        kernels = fatbin.kernels(library)
    except cubin.CubinError as error:
        raise DeviceCodeError(f"the library's device code cannot be read: {error}") from None
    figures = {f"sm_{arch}": {name: kernel.document() for name, kernel in kernels[arch].items()} for arch in kernels}
    return {"device_code": [entry.document() for entry in code], "device_kernels": figures}
