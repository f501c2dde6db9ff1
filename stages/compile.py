"""compile: the exported functions of a model, lowered together and compiled to one library for one target."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stagegraph.stage import Context, In, Out, Stage, StageError, dist_versions, param

if TYPE_CHECKING:
    from pathlib import Path

    from stages.codegen.library import Built
    from stages.targets.toolchain import Program

# What all graphs of one library must agree on; it goes into the metadata under "model".
SHARED = (
    "attention_thread_bytes",
    "cache_bytes_per_token",
    "cache_workspace_bytes",
    "compute_dtype",
    "context_window",
    "family",
    "hidden_size",
    "kv_dtype",
    "max_batch",
    "num_layers",
    "page_size",
    "prefill_chunk",
    "scheme",
    "sep_embed",
    "state",
    "state_bytes",
    "vocab_size",
)
OLDEST_ARCH = 75  # of those that CUDA 13 still compiles for
STEPS = 6  # of progress beside kernels: five lowering phases, then all that follows code generation


class Compile(Stage):
    """Merge, lower, generate code, link; needs no GPU for CUDA code."""

    id = "compile"
    profile = "compiler"

    @dataclass(frozen=True)
    class Params:
        """Parameters of compile."""

        target: str = param("what the library runs on", choices="stages.targets.table:TARGETS")
        opt: int = param("optimisation level of LLVM and ptxas, 0 to 3", default=3, minimum=0)
        mcpu: str = param(
            "processor of the host code: auto is this machine's, else a level of x86-64 with added features, as in "
            "x86-64-v3 or x86-64-v4+avx512vnni",
            default="auto",
        )
        archs: tuple[int, ...] = param("CUDA architectures to compile for (80 is sm_80)", default=(80, 86, 89, 90))
        fast_math: bool = param("trade accuracy of CUDA arithmetic for speed", default=False)
        cuda_graph: bool = param(
            "replay the kernels of a decode step between two attentions as CUDA graphs; the library then works with "
            "the weights of its first call only",
            default=False,
        )
        toolchain: str = param(
            "where the CUDA toolkit comes from: Python packages (pypi) or the system; auto prefers the packages",
            default="auto",
            choices=("auto", "pypi", "system"),
        )
        activations: str = param(
            "arithmetic of layers with quantized weights: int8 quantizes what they read too, in groups, which is "
            "faster and less exact; llvm only",
            default="float",
            choices=("float", "int8"),
        )

    inputs = {
        "module": In("graph-build", "module", "the exported functions", many=True),
        "graph": In("graph-build", "graph", "their signatures and sizes", many=True),
        "params": In("param-register", "params", "the parameters the library takes"),
    }
    outputs = {
        "library": Out("model.so", "the shared library that TVM's runtime loads"),
        "metadata": Out("metadata.json", "what it was built for and with"),
    }
    parts = {"kernel": "stages.codegen.library", "schedule": "stages.codegen.schedules"}

    def resolve(self, params: Params) -> Params:
        """Name this machine's processor and toolchain; drop what the target has no use for."""
        from stages.targets import host, toolchain

        problems = [] if params.mcpu == "auto" else host.problems(params.mcpu)
        try:
            toolchain.cxx()
        except toolchain.ToolchainError as error:
            problems.append(str(error))
        if params.opt > 3:
            problems.append(f"opt: {params.opt} is not an optimisation level; choose 0 to 3")
        mcpu = host.host_cpu() if params.mcpu == "auto" else params.mcpu
        archs: tuple[int, ...] = ()
        fast_math, kind = False, "none"
        if params.target == "cuda":
            archs, fast_math, kind = tuple(sorted(set(params.archs))), params.fast_math, params.toolchain
            if not archs:
                problems.append("archs: name at least one CUDA architecture, such as 80")
            problems += [
                f"archs: {arch} is not an architecture that CUDA 13 compiles for; it starts at {OLDEST_ARCH}"
                for arch in archs
                if arch < OLDEST_ARCH
            ]
            if kind == "auto":
                found = toolchain.toolkit()
                kind = found.kind if found else "missing"
        if params.activations == "int8" and (params.target != "llvm" or not host.multiplies_bytes(mcpu)):
            built_for = mcpu if params.target == "llvm" else params.target
            problems.append(
                f"activations: int8 cannot be built for {built_for}: it takes target llvm and a processor with "
                "avx512vnni or avxvnni; use float"
            )
        if problems:
            raise StageError(*problems)
        cuda_graph = params.cuda_graph and params.target == "cuda"
        return dataclasses.replace(
            params, mcpu=mcpu, archs=archs, fast_math=fast_math, cuda_graph=cuda_graph, toolchain=kind
        )

    def tools(self, params: Params) -> Mapping[str, str]:
        """The versions of TVM, the C++ compiler and, for CUDA, the toolkit with the packages it is made of."""
        from stages.targets import toolchain

        cxx = toolchain.cxx()
        tools = {**dist_versions("apache-tvm", "apache-tvm-ffi"), "c++": cxx.version if cxx else "missing"}
        if params.target == "cuda":
            toolkit = toolchain.toolkit(params.toolchain)
            tools |= {"cuda": toolkit.version if toolkit else "missing", **_packages(toolkit)}
        return tools

    def rows(self, params: Params, facts: Mapping[str, Any]) -> Mapping[str, str | Sequence[str]]:  # noqa: ARG002
        """The target."""
        return {"stages.targets.table:TARGETS": params.target}

    def run(self, ctx: Context) -> None:
        """Build the library and prove what is in it."""
        from stages.codegen import describe
        from stages.targets import host

        graphs = [json.loads(instance.path.read_text("utf-8")) for instance in ctx.inputs("graph")]
        registry = json.loads(ctx.input("params").read_text("utf-8"))
        _check_agreement(graphs, registry, ctx.params.target, ctx.params.activations)
        _, floats = takes_bytes(registry)
        if ctx.params.activations == "int8" and floats:
            ctx.warn(
                f"activations: int8 does not reach {len(floats):,} layers, whose rows are not of whole groups: they "
                f"compute in floats ({', '.join(floats[:3])}{', ...' if len(floats) > 3 else ''})"
            )
        cxx, toolkit = _compilers(ctx.params)
        mcpu, _ = host.parse(ctx.params.mcpu)
        programs = {"c++": cxx, **({"cuda": toolkit} if toolkit else {})}
        metadata = {
            "schema": 1,
            "target": {
                name: getattr(ctx.params, name)
                for name in ("target", "opt", "archs", "fast_math", "cuda_graph", "activations")
            },
            "cpu": {"mcpu": mcpu, "features": list(host.required_features(ctx.params.mcpu))},
            "toolchain": {
                name: {"kind": program.kind, "version": program.version, "packages": _packages(program)}
                for name, program in programs.items()
            },
            "tools": dist_versions("apache-tvm", "apache-tvm-ffi"),
            "functions": sorted(name for graph in graphs for name in graph["functions"]),
            "params": [{key: param[key] for key in ("name", "shape", "dtype")} for param in registry["params"]],
            "model": {
                **{name: graphs[0][name] for name in SHARED},
                "layout": registry["layout"],
                "activations": ctx.params.activations,
            },
        }
        library = ctx.out / "model.so"
        found, built = _build(ctx, metadata, cxx, toolkit, library)
        metadata |= found
        (ctx.out / "metadata.json").write_text(
            json.dumps(metadata, allow_nan=False, indent=1, sort_keys=True) + "\n", "utf-8"
        )
        for name, text in describe.views(metadata, graphs, built).items():
            ctx.view(name, text)
        ctx.summary(describe.summary(metadata, library.stat().st_size))
        ctx.progress(STEPS, STEPS, "steps")


def takes_bytes(registry: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Return the layers that can read activations as int8, and those whose quantized weights are read by floats."""
    logical = registry["logical"]
    head = "head" if any(entry["kind"] == "head" for entry in logical) else "embedding"  # tied: the table is the head
    layers = [entry for entry in logical if entry["quantize"] and entry["kind"] in ("linear", head)]
    direct = [entry["layout"] == "n32" for entry in layers]
    names = [(entry["name"], takes) for entry, takes in zip(layers, direct, strict=True)]
    return [name for name, takes in names if takes], [name for name, takes in names if not takes]


def _check_agreement(
    graphs: Sequence[Mapping[str, Any]], registry: Mapping[str, Any], target: str, activations: str
) -> None:
    """Refuse graphs of different builds, and functions that occur twice or that nothing stands for."""
    problems = []
    for name in (*SHARED, "target"):
        values = {json.dumps(graph[name]) for graph in graphs}
        if len(values) > 1:
            problems.append(
                f"the graphs disagree on {name}: {', '.join(sorted(values))}; give every graph-build the same"
            )
    if target != graphs[0]["target"]:
        problems.append(f"the graphs are built for target {graphs[0]['target']}, the library for {target}")
    if registry["scheme"] != graphs[0]["scheme"]:
        problems.append(f"the graphs take {graphs[0]['scheme']} parameters, registered are {registry['scheme']}")
    if activations == "int8" and not takes_bytes(registry)[0]:
        problems.append(
            f"activations: int8 has no effect: no layer of this model in {registry['scheme']} has a kernel for it, "
            "which takes weights of 4 or 8 bits with float32 or float16 scales, in rows of whole groups; use float"
        )
    functions = [name for graph in graphs for name in graph["functions"]]
    problems += [f"two graphs export {name}" for name in sorted({n for n in functions if functions.count(n) > 1})]
    if problems:
        raise StageError(*problems)


def _packages(program: Program | None) -> dict[str, str]:
    """Return the versions of the packages that a packaged toolkit is made of; a system's has the one version."""
    from stages.targets import toolchain

    return dist_versions(*toolchain.CUDA_PACKAGES) if program and program.kind == "pypi" else {}


def _compilers(params: Any) -> tuple[Program, Program | None]:
    """Return the C++ compiler and, for CUDA, the toolkit; what is missing fails here, with what to install."""
    from stages.targets import toolchain

    cxx = toolchain.cxx()
    toolkit = toolchain.toolkit(params.toolchain) if params.target == "cuda" else None
    missing = [] if cxx else [toolchain.INSTALL_CXX]
    if params.target == "cuda" and toolkit is None:
        missing.append(toolchain.INSTALL_CUDA)
    if cxx is None or missing:
        raise StageError(*missing)
    return cxx, toolkit


def _build(
    ctx: Context, metadata: Mapping[str, Any], cxx: Program, toolkit: Program | None, library: Path
) -> tuple[dict[str, Any], list[Built]]:
    """Write the library; return what only its making tells (memory plan, kernels, device code), and its kernels."""
    from stages.codegen.library import CodegenError, Compilers, build_library
    from stages.codegen.schedules import scheduled
    from stages.lowering.compat import load_json
    from stages.lowering.merge import merge
    from stages.lowering.pipeline import lower
    from stages.targets import cuda, host, toolchain
    from stages.targets.cuda import CudaError
    from stages.targets.table import TARGETS
    from stages.targets.tvm_target import build_target

    params, row = ctx.params, TARGETS[ctx.params.target]
    mcpu, features = host.parse(params.mcpu)
    try:
        target = build_target(row, mcpu, features, opt=params.opt, arch=min(params.archs, default=0))
    except ValueError as error:
        raise StageError(str(error)) from None
    memory: dict[str, int] = {}

    def plan(planned: Mapping[str, int]) -> dict[str, Any]:
        memory.update(planned)
        return {**metadata, "memory": dict(planned)}

    module = merge([load_json(instance.path.read_text("utf-8")) for instance in ctx.inputs("module")])
    available = host.required_features(params.mcpu)
    options = {name: getattr(params, name) for name in ("opt", "archs", "fast_math")}
    how = {"target": str(target), "tools": metadata["tools"]}
    document = {**how, **options, "toolchain": {}}
    try:
        compile_device = None
        if toolkit is not None:
            cuda.load_cuda_side(toolkit, cxx)
            compile_device = functools.partial(cuda.compile_fatbin, toolkit=toolkit, **options)
            document["toolchain"] = metadata["toolchain"]  # an object of TVM's alone does not depend on it
        lowered = lower(
            module,
            row,
            target,
            plan,
            lambda done, _: ctx.progress(done, STEPS, "steps"),
            available,
            params.activations,
            cuda_graph=params.cuda_graph,
            schedule=lambda module: scheduled(module, row.schedules, how, ctx, library.parent),
        )
        compilers = Compilers(target, compile_device, document, cxx.path, toolchain.environment())
        built = build_library(lowered, compilers, ctx, library)
    except CudaError as error:
        raise StageError(str(error)) from None
    except CodegenError as error:
        raise StageError(*error.problems) from None
    on_device = [name for kernel in built for name in kernel.code.entry_points]
    names = sorted(on_device or [kernel.name for kernel in built])
    return {"memory": memory, "kernels": names, **_device(library)}, built


def _device(library: Path) -> dict[str, Any]:
    """Return what device code the finished library holds, and the figures of its kernels."""
    from stages.targets import cubin, fatbin

    code = fatbin.entries(library)
    try:
        kernels = fatbin.kernels(library)
    except cubin.CubinError as error:
        raise StageError(f"the library's device code cannot be read: {error}") from None
    figures = {f"sm_{arch}": {name: kernel.document() for name, kernel in kernels[arch].items()} for arch in kernels}
    return {"device_code": [entry.document() for entry in code], "device_kernels": figures}
