"""graph-build: one exported function of the model (with its batch form) as an IRModule."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stagegraph.stage import Context, In, JsonObject, Out, Stage, StageError, dist_versions, param

if TYPE_CHECKING:
    from stages.documents.graph import Graph, ModelSizes
    from stages.documents.model import ModelDocument
    from stages.documents.params import Register
    from stages.graph.export import Build
    from stages.models.family import AttentionCache
    from stages.targets.table import Target


class GraphBuild(Stage):
    """Compose the model from its family's layers and export one function; one node per function."""

    id = "graph-build"
    profile = "compiler"

    @dataclass(frozen=True)
    class Params:
        """Parameters of graph-build."""

        target: str = param("what the graph is built for", choices="stages.targets.table:TARGETS")
        function: str = param("which function to export", choices="stages.graph:FUNCTIONS")
        sep_embed: bool = param("prefill and decode take embeddings (true) or token ids (false)", default=True)
        prefill_chunk: int = param("longest chunk one prefill call reads, in tokens", default=512, minimum=1)
        max_batch: int = param("most sequences in one batch call", default=4, minimum=1)
        kv_dtype: str = param(
            "dtype of the KV cache; auto takes the compute dtype, int8 (target llvm) a scale for each head of a token",
            default="auto",
            choices=("auto", "float32", "float16", "bfloat16", "int8"),
        )

    inputs = {
        "config": In("config-parse", "config", "the model's config"),
        "params": In("param-register", "params", "the parameters the graph takes"),
    }
    outputs = {
        "module": Out("module.json", "the IRModule, as TVM writes it"),
        "graph": Out("graph.json", "signatures, operator counts, and the sizes the graph is bounded by"),
    }

    def tools(self, params: Params) -> Mapping[str, str]:  # noqa: ARG002
        """The compiler's versions: its operators and kernels end up in the module."""
        return dist_versions("apache-tvm", "apache-tvm-ffi")

    def rows(self, params: Params, facts: JsonObject) -> Mapping[str, str | Sequence[str]]:
        """The function, the target, and the family and scheme of the model on the input ports."""
        rows: dict[str, str | Sequence[str]] = {
            "stages.graph:FUNCTIONS": params.function,
            "stages.graph:RECURRENT": (),
            "stages.graph:HYBRID": (),
            "stages.targets.table:TARGETS": params.target,
        }
        if "family" in facts:
            rows["stages.models:FAMILIES"] = facts["family"]
            other = {"rnn": "RECURRENT", "hybrid": "HYBRID"}.get(facts.get("state", ""))
            if other:
                rows[f"stages.graph:{other}"] = params.function
        if "scheme" in facts:
            rows["stages.quantization.schemes:SCHEMES"] = facts["scheme"]
        return rows

    def run(self, ctx: Context) -> None:
        """Export the function; every parameter that the model and the register see differently is listed at once."""
        import importlib

        import tvm

        from stages.documents.files import write_json
        from stages.graph import FUNCTIONS, OTHERS, cost, views
        from stages.ir.text import without_places
        from stages.problems import ProblemsError

        model: ModelDocument = json.loads(ctx.input("config").read_text("utf-8"))
        registry: Register = json.loads(ctx.input("params").read_text("utf-8"))
        try:
            build, sizes = _build(ctx.params, model, registry)
            exports = {**FUNCTIONS, **OTHERS.get(sizes["state"], {})}
            module_name, _, name = exports[ctx.params.function].partition(":")
            exported = getattr(importlib.import_module(module_name), name)(build)
        except ProblemsError as error:
            raise StageError(*error.problems) from None

        counts = views.operators(exported)
        signatures = views.signatures(exported)
        graph: Graph = {
            **sizes,
            "schema": 1,
            "target": ctx.params.target,
            "functions": signatures,
            "operators": counts,
            "kernels": views.kernels(exported),
        }
        (ctx.out / "module.json").write_text(without_places(tvm.ir.save_json(exported)), "utf-8")
        write_json(ctx.out / "graph.json", graph)
        ctx.view("operators", views.operator_table(counts))
        ctx.view("cost", cost.cost_table(exported))
        ctx.view("ir", views.script(exported))
        ctx.view("structure.json", cost.structure(exported))
        calls = sum(sum(found.values()) for found in counts.values())
        ctx.summary(f"{' '.join(signatures)}: {calls:,} call{'s' * (calls != 1)}")


def _check_attention(build: Build) -> None:
    """Refuse what kernels of ours alone compute where attention has others."""
    if build.special_attention and not build.own_attention:
        raise StageError(
            f"attention {build.special_attention[0]} cannot be built for target {build.row.name}; target llvm can"
        )
    if build.kv_dtype == "int8" and not build.row.cpu_kernels:
        raise StageError(f"kv_dtype: int8 cannot be built for target {build.row.name}; target llvm can")
    if build.kv_dtype == "int8" and not build.own_attention:
        width = build.config.attention.head_dim
        raise StageError(
            f"kv_dtype: int8 needs heads of a multiple of 16 channels, these have {width}: use auto, or frontend: "
            "traced of config-parse, which fills heads up"
        )


def _build(params: Any, model: ModelDocument, registry: Register) -> tuple[Build, ModelSizes]:
    """Return the build, and the sizes that all graphs of one library share."""
    from stages.graph.export import Build
    from stages.models import described
    from stages.quantization.schemes import SCHEMES
    from stages.sizes import PAGE_SIZE
    from stages.targets.table import TARGETS
    from stages.targets.tvm_target import export_target

    (family, config), scheme, target = described(model), SCHEMES[registry["scheme"]], TARGETS[params.target]
    if registry["target"] != params.target:
        raise StageError(
            f"the parameters are registered for target {registry['target']}, this graph is for {params.target}"
        )
    compute_dtype = target.compute_dtype or scheme.model_dtype
    kv_dtype = compute_dtype if params.kv_dtype == "auto" else params.kv_dtype
    if kv_dtype not in (compute_dtype, "int8"):
        raise StageError(
            f"kv_dtype: {kv_dtype} does not fit: target {target.name} computes {scheme.name} in {compute_dtype}, "
            "and the cache kernels know one dtype; use auto"
        )
    if family.state == "rnn" and params.kv_dtype != "auto":
        raise StageError(f"kv_dtype: {family.name} is recurrent and has no KV cache; its state has dtypes of its own")
    _check_experts(config, target)
    chunk = _chunk(params, model["context_window"], None if family.state == "rnn" else config.attention)
    build = Build(
        config=config,
        compose=family.causal_lm,
        registry=registry,
        row=target,
        target=export_target(target),
        context_window=model["context_window"],
        sep_embed=params.sep_embed,
        prefill_chunk=chunk,
        max_batch=params.max_batch,
        compute_dtype=compute_dtype,
        kv_dtype=kv_dtype,
    )
    _check_attention(build)
    return build, {
        "attention_thread_bytes": build.attention_thread_bytes,
        "cache_bytes_per_token": build.cache_bytes_per_token,
        "cache_workspace_bytes": build.cache_workspace_bytes,
        "compute_dtype": compute_dtype,
        "context_window": model["context_window"],
        "family": model["family"],
        "hidden_size": model["hidden_size"],
        "kv_dtype": None if family.state == "rnn" else kv_dtype,
        "max_batch": params.max_batch,
        "num_layers": model["num_layers"],
        "page_size": None if family.state == "rnn" else PAGE_SIZE,
        "prefill_chunk": chunk,
        "scheme": registry["scheme"],
        "sep_embed": params.sep_embed,
        "state": family.state,
        "state_bytes": build.state_bytes,
        "verify_chunk": build.verify_chunk if family.state == "kv" else None,
        "vocab_size": model["vocab_size"],
    }


def _check_experts(config: Any, target: Target) -> None:
    """Refuse a mixture where no kernel of ours reads the chosen experts alone."""
    if getattr(config, "mixture", False) and not target.cpu_kernels:
        raise StageError(f"target {target.name}: layers of chosen experts are built for target llvm alone so far")


def _chunk(params: Any, context_window: int, attention: AttentionCache | None) -> int:
    """Return the longest chunk, of a model with ``attention`` or a recurrent one, as the context bounds it."""
    chunk: int = min(params.prefill_chunk, context_window)
    if attention is None:
        return chunk
    if 0 < attention.sliding_window < context_window:
        _check_window(attention.sliding_window, params.target)
        # A token of a chunk sees all before it in the chunk and at least one before the chunk: the kernels are right
        # only if that is within its window.
        chunk = min(chunk, attention.sliding_window - 1)
    if chunk < params.max_batch:
        bounded = f", bounded to {chunk} by the context," if chunk < params.prefill_chunk else ""
        raise StageError(
            f"prefill_chunk: {params.prefill_chunk}{bounded} is less than max_batch: {params.max_batch}; a call for a "
            "batch reads a token of each sequence, and no call may read more than a chunk: "
            f"let a chunk have at least {params.max_batch} tokens, or lower max_batch to {chunk}"
        )
    return chunk


def _check_window(window: int, target: str) -> None:
    """Refuse a context longer than the model's sliding window where that is not known to be exact."""
    from stages.targets.table import TARGETS

    if not TARGETS[target].long_windows or window == 1:
        reason = "a window of one token" if window == 1 else f"contexts beyond it on target {target}"
        raise StageError(
            f"sliding_window = {window} of config.json: {reason} cannot be built; set context_window of config-parse "
            f"to at most {window}, where the window has no effect"
        )
