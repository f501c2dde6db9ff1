"""Shared by all exported functions: the build they are exported for, and the export of an nn.Module to an IRModule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import tvm
from tvm import relax as rx
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op
from tvm.relax.frontend.nn.llm.kv_cache import PagedKVCache

from stages.documents.params import Register
from stages.ir.compat import exporting
from stages.kernels.cpu import kv_cache, sliding_window
from stages.kernels.cpu.kv_cache import Heads
from stages.kernels.cpu.kv_cache_int8 import Int8Heads
from stages.models.layers import CausalLM, LayerFactory
from stages.problems import ProblemsError
from stages.sizes import DTYPE_BYTES, PAGE_SIZE
from stages.targets.table import Target

VERIFY_CHUNK = 64  # see Build.verify_chunk
tensor = nn.spec.Tensor
# Of one function: name -> spec of a tensor, of a list of them or an object.
FunctionInputs: TypeAlias = Mapping[str, Any]
Specs: TypeAlias = Mapping[str, FunctionInputs]  # by function


class Int8Cache(PagedKVCache):
    """A cache in 8 bits: what goes in and comes out is cut into the heads that the runtime is told of."""

    def attention_with_fused_qkv(self, layer_id: int, qkv: Tensor, num_qo_heads: int, sm_scale: float) -> Tensor:
        """Attend with ``qkv`` [b, s, heads, dim], heads of q, k and v: [b, s, num_qo_heads, dim]."""
        batch, seq, count, dim = qkv.shape
        queries, keys, width = Int8Heads(num_qo_heads, (int(count) - num_qo_heads) // 2, int(dim)).stored
        cut = op.reshape(qkv, (batch, seq, queries + 2 * keys, width))
        y = op.reshape(
            super().attention_with_fused_qkv(layer_id, cut, queries, sm_scale), (batch, seq, queries * width)
        )
        wanted = num_qo_heads * int(dim)
        y = op.wrap_nested(rx.op.strided_slice(y._expr, [2], [0], [wanted]), "attended")  # noqa: SLF001 - as TVM's own do
        return op.reshape(y, (batch, seq, num_qo_heads, dim))


class GraphError(ProblemsError):
    """The composed model and the registered parameters disagree."""


@dataclass(frozen=True)
class Build:
    """One model on one target: its config, the registered parameters, and the sizes the graph is bounded by.

    ``compose(config, factory)`` is the family's ``causal_lm``; ``target`` is what TVM makes of ``row``.
    """

    config: Any
    compose: Callable[[Any, LayerFactory], CausalLM]
    registry: Register
    row: Target
    target: tvm.target.Target
    compute_dtype: str
    kv_dtype: str
    sep_embed: bool
    prefill_chunk: int
    max_batch: int
    context_window: int

    @property
    def verify_chunk(self) -> int:
        """The most tokens that one call gives all logits of: enough for matrix products to be fast, and not so many
        that their logits take much memory (64 of 150,000 are 38 MB).
        """
        return min(self.prefill_chunk, VERIFY_CHUNK)

    @property
    def sliding(self) -> bool:
        """Whether some layers forget: the context is longer than the model's sliding window."""
        attention = self.config.attention
        forgets: bool = 0 < attention.sliding_window < self.context_window
        return forgets and len(attention.full_layers) < attention.num_layers

    @property
    def special_attention(self) -> tuple[str, ...]:
        """The features of the model's attention that only the kernels of this project compute."""
        attention = getattr(self.config, "attention", None)
        if attention is None:
            return ()
        kinds = {
            "scores with a soft cap": attention.softcap,
            "with sinks": attention.sinks,
            "within chunks": attention.chunk,
            "to tokens that an indexer chooses": attention.words,
        }
        return tuple(what for what, value in kinds.items() if value)

    @property
    def cache_kinds(self) -> list[str]:
        """TVM's name for the attention of each layer of the KV cache."""
        attention = self.config.attention
        full = attention.full_layers if self.sliding else ()
        return [
            sliding_window.FULL if number in full else sliding_window.WITHIN for number in range(attention.num_layers)
        ]

    @property
    def own_attention(self) -> bool:
        """Whether attention and the KV cache use this project's kernels (kernels/cpu/attention.py) instead of TVM's."""
        attention = getattr(self.config, "attention", None)
        return attention is not None and self.row.cpu_kernels and kv_cache.fits(attention.head_dim)

    @property
    def heads(self) -> Heads:
        """The heads of attention, as the kernels of its cache know them."""
        attention = self.config.attention
        of = Int8Heads if self.kv_dtype == "int8" else Heads
        return of(attention.num_heads, attention.num_kv_heads, attention.head_dim)

    @property
    def cache(self) -> nn.spec.Object:
        """Spec of the KV cache that functions take."""
        return nn.spec.Object(object_type=Int8Cache if self.kv_dtype == "int8" else PagedKVCache)

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes of one token of one sequence in the KV cache, k and v of all layers; 0 for a model without a cache."""
        if getattr(self.config, "attention", None) is None:
            return 0
        _, keys, width = self.heads.stored
        return len(self.cache_kinds) * 2 * keys * width * DTYPE_BYTES[self.compute_dtype]

    @property
    def cache_workspace_bytes(self) -> int:
        """What the KV cache takes beside its tokens: a page; q, k, v, output, two sums of scores of a chunk."""
        if getattr(self.config, "attention", None) is None:
            return 0
        queries, keys, width = self.heads.stored
        rows = 2 * (queries + keys) * width * DTYPE_BYTES[self.compute_dtype]
        sums = 2 * queries * DTYPE_BYTES["float32"]
        return PAGE_SIZE * self.cache_bytes_per_token + self.prefill_chunk * (rows + sums)

    @property
    def attention_thread_bytes(self) -> int:
        """What each thread of a processor allocates in attention of ours beside the cache.

        Scores of four rows against all tokens, or against a chunk, whose keys are then there a second time, transposed.
        """
        if not self.own_attention:
            return 0
        tokens = self.max_batch * self.context_window
        head_dim: int = self.config.attention.head_dim
        return DTYPE_BYTES["float32"] * max(4 * tokens, (4 + head_dim) * self.prefill_chunk)

    @property
    def state_bytes(self) -> int:
        """Bytes of one step of one sequence in the recurrent state; 0 for a model with a KV cache only."""
        model: Any = self.model()[0]
        states = getattr(model, "states", ())
        size = sum(each.width * DTYPE_BYTES[each.dtype] for each in states)
        return int(size * model.state_layers) if states else 0

    def model(self) -> tuple[CausalLM, LayerFactory]:
        """Compose the model; :class:`GraphError` lists every parameter that differs from the register."""
        factory = LayerFactory(self.registry, self.compute_dtype)
        model = self.compose(self.config, factory)
        if factory.problems:
            raise GraphError(*factory.problems)
        return model, factory

    def states(self, tokens: list[Any]) -> nn.spec.Tensor:
        """Return the spec of the input for ``tokens`` [b, s]: embeddings, or ids if prefill and decode embed."""
        if self.sep_embed:
            return tensor([*tokens, self.config.hidden_size], self.compute_dtype)
        return tensor(tokens, "int32")


def export_prefill(
    build: Build, wrap: Callable[[Any], nn.Module], state: nn.spec.Object, **more: FunctionInputs
) -> tvm.IRModule:
    """Export ``prefill``, ``batch_prefill`` and ``more``; ``state`` is what they read the chunks into."""
    states = build.states([1, "seq_len"])
    positions = tensor(["batch_size"], "int32")
    return export_model(
        build,
        wrap,
        {
            "prefill": {"states": states, "cache": state},
            "batch_prefill": {"states": states, "logit_positions": positions, "cache": state},
            **more,
        },
    )


def export_decode(build: Build, wrap: Callable[[Any], nn.Module], state: nn.spec.Object) -> tvm.IRModule:
    """Export ``decode`` and ``batch_decode``; ``state`` is what they add a token to."""
    return export_model(
        build,
        wrap,
        {
            "decode": {"states": build.states([1, 1]), "cache": state},
            "batch_decode": {"states": build.states(["batch_size", 1]), "cache": state},
        },
    )


def export_model(build: Build, wrap: Callable[[CausalLM], nn.Module], spec: Specs) -> tvm.IRModule:
    """Export the methods named in ``spec`` of ``wrap(model)``; every function takes the packed parameters last."""
    model, factory = build.model()
    module, params = _export(build, wrap(model), spec, "packed")
    made = [factory.names[parameter] for _, parameter in params]
    registered = [entry["name"] for entry in build.registry["params"]]
    if made != registered:
        raise GraphError(*_order_problems(made, registered))
    return module


def export_plain(build: Build, module: nn.Module, spec: Specs) -> tvm.IRModule:
    """Export the methods named in ``spec`` of a module without parameters."""
    return _export(build, module, spec, "none")[0]


def _export(
    build: Build, module: nn.Module, spec: Specs, params: str
) -> tuple[tvm.IRModule, list[tuple[str, nn.Parameter]]]:
    # The exporter pops "$" out of what it is given.
    modes = {"param_mode": params, "effect_mode": "none"}
    raw = {name: {**arguments, "$": dict(modes)} for name, arguments in spec.items()}
    with build.target, exporting():
        exported, named, _ = module.export_tvm(spec=nn.spec.ModuleSpec.from_raw(raw, module), allow_extern=True)
    # Memory is planned for these bounds; the names are those of the specs' symbolic dimensions.
    bounds = {"seq_len": build.prefill_chunk, "batch_size": build.max_batch, "verify_len": build.verify_chunk}
    for var, function in exported.functions_items():
        if isinstance(function, rx.Function):
            exported[var] = function.with_attr("tir_var_upper_bound", bounds)
    return exported, named


def _order_problems(made: list[str], registered: list[str]) -> list[str]:
    unused = [f"{name}: registered, but the model does not use it" for name in registered if name not in set(made)]
    missing = [f"{name}: used by the model, but not registered" for name in made if name not in set(registered)]
    if unused or missing:
        return unused + missing
    at = next(i for i, pair in enumerate(zip(made, registered, strict=True)) if pair[0] != pair[1])
    return [f"parameter {at}: the model packs {made[at]} where {registered[at]} is registered"]
