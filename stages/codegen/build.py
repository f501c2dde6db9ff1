"""From exported graphs to a library and its metadata: merged, lowered, compiled kernel by kernel, linked."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stages.codegen.agreement import SHARED
from stages.codegen.library import CodegenError, Compilers, build_library
from stages.ir.compat import load_json
from stages.lowering.merge import merge
from stages.lowering.pipeline import lower
from stages.lowering.schedules.cache import scheduled
from stages.targets import processor, toolchain
from stages.targets.cuda import cubin, device_code, fatbin
from stages.targets.cuda.device_code import CudaError
from stages.targets.table import TARGETS
from stages.targets.tvm_target import build_target

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from stages.codegen.library import Built
    from stages.memo import Memo
    from stages.targets.toolchain import Program

STEPS = 6  # of progress beside kernels: five lowering phases, then all that follows code generation


class BuildError(ValueError):
    """A library that cannot be built; ``problems`` says what is wrong and what to do."""

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


@dataclass(frozen=True)
class Options:
    """How a library is built: the parameters of compile, resolved."""

    target: str
    opt: int
    mcpu: str
    archs: tuple[int, ...]
    fast_math: bool
    cuda_graph: bool
    toolchain: str
    activations: str


def build(
    modules: Sequence[str],
    graphs: Sequence[Mapping[str, Any]],
    registry: Mapping[str, Any],
    options: Options,
    versions: Callable[..., dict[str, str]],
    memo: Memo,
    library: Path,
) -> tuple[dict[str, Any], list[Built]]:
    """Write ``library``, of the exported ``modules`` (texts) with their ``graphs``; return its metadata and kernels.

    ``versions`` returns the versions of installed distributions by name. :class:`BuildError` for what is missing or
    cannot be compiled.
    """
    cxx, toolkit = _compilers(options)
    metadata = _metadata(graphs, registry, options, versions, {"c++": cxx, **({"cuda": toolkit} if toolkit else {})})
    memory: dict[str, int] = {}

    def describe(planned: Mapping[str, int]) -> dict[str, Any]:
        memory.update(planned)
        return {**metadata, "memory": dict(planned)}

    try:
        built = _build(modules, options, metadata, (cxx, toolkit), describe, memo, library)
    except CudaError as error:
        raise BuildError(str(error)) from None
    except CodegenError as error:
        raise BuildError(*error.problems) from None
    on_device = [name for kernel in built for name in kernel.code.entry_points]
    names = sorted(on_device or [kernel.name for kernel in built])
    return metadata | {"memory": memory, "kernels": names, **_device(library)}, built


def _metadata(
    graphs: Sequence[Mapping[str, Any]],
    registry: Mapping[str, Any],
    options: Options,
    versions: Callable[..., dict[str, str]],
    programs: Mapping[str, Program],
) -> dict[str, Any]:
    """Return what is known of the library before it is built."""
    mcpu, _ = processor.parse(options.mcpu)
    packages = {
        name: versions(*toolchain.CUDA_PACKAGES) if program.kind == "pypi" else {} for name, program in programs.items()
    }
    return {
        "schema": 1,
        "target": {
            name: getattr(options, name)
            for name in ("target", "opt", "archs", "fast_math", "cuda_graph", "activations")
        },
        "cpu": {"mcpu": mcpu, "features": list(processor.required_features(options.mcpu))},
        "toolchain": {
            name: {"kind": program.kind, "version": program.version, "packages": packages[name]}
            for name, program in programs.items()
        },
        "tools": versions("apache-tvm", "apache-tvm-ffi"),
        "functions": sorted(name for graph in graphs for name in graph["functions"]),
        "params": [{key: param[key] for key in ("name", "shape", "dtype")} for param in registry["params"]],
        "model": {
            **{name: graphs[0][name] for name in SHARED},
            "layout": registry["layout"],
            "activations": options.activations,
        },
    }


def _compilers(options: Options) -> tuple[Program, Program | None]:
    """Return the C++ compiler and, for CUDA, the toolkit; what is missing fails here, with what to install."""
    cxx = toolchain.cxx()
    toolkit = toolchain.toolkit(options.toolchain) if options.target == "cuda" else None
    missing = [] if cxx else [toolchain.INSTALL_CXX]
    if options.target == "cuda" and toolkit is None:
        missing.append(toolchain.INSTALL_CUDA)
    if cxx is None or missing:
        raise BuildError(*missing)
    return cxx, toolkit


def _build(
    modules: Sequence[str],
    options: Options,
    metadata: Mapping[str, Any],
    programs: tuple[Program, Program | None],
    describe: Callable[[Mapping[str, int]], dict[str, Any]],
    memo: Memo,
    library: Path,
) -> list[Built]:
    """Merge, lower and compile ``modules`` into ``library``; return its kernels."""
    row, (cxx, toolkit) = TARGETS[options.target], programs
    mcpu, features = processor.parse(options.mcpu)
    try:
        target = build_target(row, mcpu, features, opt=options.opt, arch=min(options.archs, default=0))
    except ValueError as error:
        raise BuildError(str(error)) from None
    module = merge([load_json(text) for text in modules])
    flags = {name: getattr(options, name) for name in ("opt", "archs", "fast_math")}
    how = {"target": str(target), "tools": metadata["tools"]}
    document = {**how, **flags, "toolchain": {}}
    compile_device = None
    if toolkit is not None:
        device_code.load_cuda_side(toolkit, cxx)
        compile_device = functools.partial(device_code.compile_fatbin, toolkit=toolkit, **flags)
        document["toolchain"] = metadata["toolchain"]  # an object of TVM's alone does not depend on it
    lowered = lower(
        module,
        row,
        target,
        describe,
        lambda done, _: memo.progress(done, STEPS, "steps"),
        processor.required_features(options.mcpu),
        options.activations,
        cuda_graph=options.cuda_graph,
        schedule=lambda module: scheduled(module, row.schedules, how, memo, library.parent),
    )
    compilers = Compilers(target, compile_device, document, cxx.path, toolchain.environment())
    return build_library(lowered, compilers, memo, library)


def _device(library: Path) -> dict[str, Any]:
    """Return what device code the finished library holds, and the figures of its kernels."""
    code = fatbin.entries(library)
    try:
        kernels = fatbin.kernels(library)
    except cubin.CubinError as error:
        raise BuildError(f"the library's device code cannot be read: {error}") from None
    figures = {f"sm_{arch}": {name: kernel.document() for name, kernel in kernels[arch].items()} for arch in kernels}
    return {"device_code": [entry.document() for entry in code], "device_kernels": figures}
