"""compile: the exported functions of a model, lowered together and compiled to one library for one target."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stagegraph.stage import Context, In, JsonObject, Out, Piece, Stage, StageError, dist_versions, param

if TYPE_CHECKING:
    from stages.codegen.library import KernelText
    from stages.documents.graph import Graph
    from stages.documents.params import Register

# What parameters of devices become for a target without one.
PROCESSOR_ALONE: JsonObject = {"archs": (), "fast_math": False, "cuda_graph": False, "toolchain": "none"}


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
        "module": In("graph-build", "module", "the exported functions", many=True, every="function"),
        "graph": In("graph-build", "graph", "their signatures and sizes", many=True),
        "params": In("param-register", "params", "the parameters the library takes"),
    }
    outputs = {
        "library": Out("model.so", "the shared library that TVM's runtime loads"),
        "metadata": Out("metadata.json", "what it was built for and with"),
    }
    parts = {"kernel": "stages.codegen.library", "schedule": "stages.lowering.schedules.cache"}

    def resolve(self, params: Params) -> Params:
        """Name this machine's processor and toolchain; drop what the target has no use for."""
        from stages.targets import processor, toolchain
        from stages.targets.backends import load_backend
        from stages.targets.table import TARGETS

        problems = [] if params.mcpu == "auto" else processor.problems(params.mcpu)
        try:
            toolchain.cxx()
        except toolchain.ToolchainError as error:
            problems.append(str(error))
        if params.opt > 3:
            problems.append(f"opt: {params.opt} is not an optimisation level; choose 0 to 3")
        mcpu = processor.host_cpu() if params.mcpu == "auto" else params.mcpu
        resolved, backend = dict(PROCESSOR_ALONE), load_backend(params.target)
        if backend:
            resolved, wrong = backend.resolve(params)
            problems += wrong
        row = TARGETS[params.target]
        byte_products = row.cpu_kernels and processor.byte_product(processor.required_features(mcpu))
        if params.activations == "int8" and not byte_products:
            built_for = f"mcpu {mcpu}" if row.cpu_kernels else f"target {params.target}"
            problems.append(
                f"activations: int8 cannot be built for {built_for}: it takes target llvm and a processor of level "
                "x86-64-v3 or higher (AVX2); use float"
            )
        if problems:
            raise StageError(*problems)
        return dataclasses.replace(params, mcpu=mcpu, **resolved)

    def tools(self, params: Params) -> Mapping[str, str]:
        """The versions of TVM, the C++ compiler and, for a device, the toolkit with the packages it is made of."""
        from stages.targets import toolchain
        from stages.targets.backends import load_backend, packages

        cxx, backend = toolchain.cxx(), load_backend(params.target)
        tools = {**dist_versions("apache-tvm", "apache-tvm-ffi"), "c++": cxx.version if cxx else "missing"}
        if backend:
            toolkit = backend.toolkit(params.toolchain)
            version = toolkit.version if toolkit else "missing"
            tools |= {backend.NAME: version, **packages(backend, toolkit, dist_versions)}
        return tools

    def rows(self, params: Params, facts: JsonObject) -> Mapping[str, str | Sequence[str]]:  # noqa: ARG002
        """Return the target, and the backend of its device."""
        return {"stages.targets.table:TARGETS": params.target, "stages.targets.backends:BACKENDS": params.target}

    def make(self, ctx: Context, what: Sequence[Sequence[Any]]) -> None:
        """Compile some of the library's kernels."""
        from stages.codegen.build import BuildError, BuildOptions, compile_texts
        from stages.codegen.library import KernelText

        options = BuildOptions(**dataclasses.asdict(ctx.params))
        try:
            compile_texts([KernelText(*kernel) for kernel in what], options, dist_versions, ctx, ctx.out)
        except BuildError as error:
            raise StageError(*error.problems) from None

    def run(self, ctx: Context) -> None:
        """Build the library, and check its contents."""
        from stages.codegen import agreement, views
        from stages.codegen.build import STEPS, BuildError, BuildOptions, build
        from stages.documents.files import write_json

        graphs: list[Graph] = [json.loads(instance.path.read_text("utf-8")) for instance in ctx.inputs("graph")]
        registry: Register = json.loads(ctx.input("params").read_text("utf-8"))
        options = BuildOptions(**dataclasses.asdict(ctx.params))
        problems = agreement.disagreements(graphs, registry, options.target, options.activations)
        if problems:
            raise StageError(*problems)
        _, floats = agreement.takes_bytes(registry)
        if options.activations == "int8" and floats:
            ctx.warn(
                f"activations: int8 does not reach {len(floats):,} layers, whose rows are not of whole groups: they "
                f"compute in floats ({', '.join(floats[:3])}{', ...' if len(floats) > 3 else ''})"
            )
        modules = [instance.path.read_text("utf-8") for instance in ctx.inputs("module")]
        library = ctx.out / "model.so"
        try:
            metadata, built = build(
                modules, graphs, registry, options, dist_versions, ctx, library, lambda lists: _elsewhere(ctx, lists)
            )
        except BuildError as error:
            raise StageError(*error.problems) from None
        write_json(ctx.out / "metadata.json", metadata)
        for name, text in views.views(metadata, graphs, built).items():
            ctx.view(name, text)
        ctx.summary(views.summary(metadata, library.stat().st_size))
        ctx.progress(STEPS, STEPS, "steps")


def _elsewhere(ctx: Context, lists: Sequence[Sequence[KernelText]]) -> list[Any] | None:
    """Have kernels compiled by other machines, which need none of the inputs; None where there are none."""
    nothing: dict[str, Sequence[str]] = dict.fromkeys(Compile.inputs, ())
    return ctx.map("kernel", [Piece(f"{len(kernels)} kernels", kernels, nothing) for kernels in lists])
