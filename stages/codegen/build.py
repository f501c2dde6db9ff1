"""From exported graphs to a library and its metadata: merged, lowered, compiled kernel by kernel, linked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from stages.codegen import library as libraries
from stages.codegen.library import CodegenError, Compilers, build_library
from stages.documents.graph import ModelSizes
from stages.ir.compat import load_json
from stages.lowering.merge import merge
from stages.lowering.pipeline import lower
from stages.lowering.schedules.cache import scheduled
from stages.problems import ProblemsError
from stages.targets import processor, toolchain
from stages.targets.backends import DeviceCodeError, load_backend, packages
from stages.targets.table import TARGETS
from stages.targets.tvm_target import build_target

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from stages.codegen.library import Built, KernelText, Spread
    from stages.documents.files import JsonObject
    from stages.documents.graph import Graph
    from stages.documents.library import Compiler, Described, DeviceContents, Metadata
    from stages.documents.params import Register
    from stages.memo import Memo
    from stages.targets.backends import Backend
    from stages.targets.toolchain import Program

TVM = ("apache-tvm", "apache-tvm-ffi")  # distributions
STEPS = 6  # of progress beside kernels: five lowering phases, then all that follows code generation


class BuildError(ProblemsError):
    """A library that cannot be built, and what to do."""


@dataclass(frozen=True)
class BuildOptions:
    """How a library is built: the parameters of compile, resolved."""

    target: str
    opt: int
    mcpu: str
    archs: tuple[int, ...]
    fast_math: bool
    cuda_graph: bool
    toolchain: str
    activations: str


@dataclass(frozen=True)
class _Tools:
    """What a library is built with: the C++ compiler and, for a device, its backend and toolkit."""

    cxx: Program
    backend: Backend | None
    toolkit: Program | None


def build(
    modules: Sequence[str],
    graphs: Sequence[Graph],
    registry: Register,
    options: BuildOptions,
    versions: Callable[..., dict[str, str]],
    memo: Memo,
    library: Path,
    spread: Spread | None = None,
) -> tuple[Metadata, list[Built]]:
    """Write ``library``, of the exported ``modules`` (texts) with their ``graphs``; return its metadata and kernels.

    ``versions`` returns the versions of installed distributions by name, ``spread`` is that of
    :func:`~stages.codegen.library.build_library`. :class:`BuildError` for what is missing or cannot be compiled.
    """
    tools = _find_tools(options)
    metadata = _described(graphs, registry, options, tools, versions)
    memory: dict[str, int] = {}

    def describe(planned: Mapping[str, int]) -> JsonObject:
        memory.update(planned)
        return {**metadata, "memory": dict(planned)}

    try:
        compilers = _compilers(options, tools, versions)
        built = _build(modules, options, compilers, describe, memo, library, spread)
        none: DeviceContents = {"device_code": [], "device_kernels": {}}
        contents = tools.backend.contents(library) if tools.backend else none
    except DeviceCodeError as error:
        raise BuildError(str(error)) from None
    except CodegenError as error:
        raise BuildError(*error.problems) from None
    on_device = [name for kernel in built for name in kernel.code.entry_points]
    names = sorted(on_device or [kernel.name for kernel in built])
    return {**metadata, **contents, "memory": memory, "kernels": names}, built


def compile_texts(
    kernels: Sequence[KernelText],
    options: BuildOptions,
    versions: Callable[..., dict[str, str]],
    memo: Memo,
    folder: Path,
) -> None:
    """Compile kernels of such a library, and keep them; :class:`BuildError` for what is missing or cannot be."""
    try:
        libraries.compile_texts(kernels, _compilers(options, _find_tools(options), versions), memo, folder)
    except DeviceCodeError as error:
        raise BuildError(str(error)) from None
    except CodegenError as error:
        raise BuildError(*error.problems) from None


def _find_tools(options: BuildOptions) -> _Tools:
    """Find the compilers; what is missing fails here, with what to install."""
    cxx, backend = toolchain.cxx(), load_backend(options.target)
    toolkit = backend.toolkit(options.toolchain) if backend else None
    missing = [] if cxx else [toolchain.INSTALL_CXX]
    if backend and toolkit is None:
        missing.append(backend.INSTALL)
    if cxx is None or missing:
        raise BuildError(*missing)
    return _Tools(cxx, backend, toolkit)


def _toolchain(tools: _Tools, versions: Callable[..., dict[str, str]]) -> dict[str, Compiler]:
    """Return the compilers as metadata tells them: name -> where it comes from, its version and its packages'."""
    found: dict[str, Compiler] = {"c++": {"kind": tools.cxx.kind, "version": tools.cxx.version, "packages": {}}}
    if tools.backend and tools.toolkit:
        kind, _, version = tools.toolkit
        parts = packages(tools.backend, tools.toolkit, versions)
        found[tools.backend.NAME] = {"kind": kind, "version": version, "packages": parts}
    return found


def _described(
    graphs: Sequence[Graph],
    registry: Register,
    options: BuildOptions,
    tools: _Tools,
    versions: Callable[..., dict[str, str]],
) -> Described:
    """Return what is known of the library before it is built."""
    mcpu, _ = processor.parse(options.mcpu)
    return {
        "schema": 1,
        "target": {
            "target": options.target,
            "opt": options.opt,
            "archs": options.archs,
            "fast_math": options.fast_math,
            "cuda_graph": options.cuda_graph,
            "activations": options.activations,
        },
        "toolchain": _toolchain(tools, versions),
        "tools": versions(*TVM),
        "cpu": {"mcpu": mcpu, "features": list(processor.required_features(options.mcpu))},
        "functions": sorted(name for graph in graphs for name in graph["functions"]),
        "params": [{"name": p["name"], "shape": p["shape"], "dtype": p["dtype"]} for p in registry["params"]],
        "model": {**_sizes(graphs[0]), "layout": registry["layout"], "activations": options.activations},
    }


def _sizes(graph: Graph) -> ModelSizes:
    """Return the part of a graph's document that all graphs of a library share."""
    return cast("ModelSizes", {name: value for name, value in graph.items() if name in ModelSizes.__annotations__})


def _compilers(options: BuildOptions, tools: _Tools, versions: Callable[..., dict[str, str]]) -> Compilers:
    """Return the compilers, and all that tells what they make."""
    mcpu, features = processor.parse(options.mcpu)
    attributes = tools.backend.attributes(options) if tools.backend else {}
    try:
        target = build_target(TARGETS[options.target], mcpu, features, opt=options.opt, attributes=attributes)
    except ValueError as error:
        raise BuildError(str(error)) from None
    document: dict[str, Any] = {
        "target": str(target),
        "tools": versions(*TVM),
        **{name: getattr(options, name) for name in ("opt", "archs", "fast_math")},
        "toolchain": {},  # an object of TVM's alone does not depend on it
    }
    device = None
    if tools.backend and tools.toolkit:
        device = tools.backend.prepare(tools.toolkit, tools.cxx, options)
        document["toolchain"] = _toolchain(tools, versions)
    return Compilers(target, device, document, tools.cxx.path, toolchain.environment())


def _build(
    modules: Sequence[str],
    options: BuildOptions,
    compilers: Compilers,
    describe: Callable[[Mapping[str, int]], JsonObject],
    memo: Memo,
    file: Path,
    spread: Spread | None,
) -> list[Built]:
    """Merge, lower and compile ``modules`` into the library ``file``; return its kernels."""
    row, how = TARGETS[options.target], {name: compilers.document[name] for name in ("target", "tools")}
    lowered = lower(
        merge([load_json(text) for text in modules]),
        row,
        compilers.target,
        describe,
        lambda done, _: memo.progress(done, STEPS, "steps"),
        processor.required_features(options.mcpu),
        options.activations,
        cuda_graph=options.cuda_graph,
        schedule=lambda module: scheduled(module, row.schedules, how, memo, file.parent),
    )
    return build_library(lowered, compilers, memo, file, spread)
