"""The decoder that Llama, Mistral, Qwen2 and Qwen3 share: RMSNorm, grouped-query attention, rotary positions, gated
SiLU MLP. A family of this form says in its own module which keys it honours and which options it has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stages.models.config_reader import ABSENT, FULL, SLIDING
from stages.models.family import AttentionCache, Param, copied
from stages.models.rope import Rope, context_window, for_context, read_rope

if TYPE_CHECKING:
    from stages.documents.files import JsonObject
    from stages.models.config_reader import ConfigReader
    from stages.models.family import WeightValues

SILU = {"silu": "silu", "swish": "silu"}  # transformers' two names of one activation


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(Rope):
    """Sizes and options that determine the graph.

    ``qkv_bias``, ``out_bias`` and ``mlp_bias`` say which projections have one; with ``qk_norm`` every head of q and k
    is normalised. ``sliding_window`` 0 means none; layers below ``full_layers`` never slide.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_eps: float
    tied: bool
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int = 0
    full_layers: int = 0

    @property
    def attention(self) -> AttentionCache:
        """What the KV cache must know."""
        return AttentionCache(
            self.num_layers,
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
            sliding_window=self.sliding_window,
            full_layers=tuple(range(self.full_layers)),
            **self.kernel_options(),
        )


def read_sizes(read: ConfigReader) -> dict[str, Any]:
    """Return the fields that every family of this form reads alike."""
    hidden, heads = read.integer("hidden_size"), read.integer("num_attention_heads")
    positions = read.integer("max_position_embeddings")
    channels = read.integer("head_dim", null=hidden // max(heads, 1))
    groups = read.integer("num_key_value_heads", null=heads)
    if heads and groups and heads % groups:
        read.problem(f"num_attention_heads = {heads} is not a multiple of num_key_value_heads = {groups}")
    if read.value("head_dim") in (None, ABSENT) and heads and hidden % heads:
        read.problem(f"hidden_size = {hidden} is not a multiple of num_attention_heads = {heads}")
    read.activation(SILU)
    return {
        "vocab_size": read.integer("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": read.integer("intermediate_size"),
        "num_layers": read.integer("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": groups,
        "head_dim": channels,
        "rms_eps": read.number("rms_norm_eps"),
        "max_positions": positions,
        "tied": read.flag("tie_word_embeddings"),
        **read_rope(read, channels, positions),
    }


def read_window(read: ConfigReader, layers: int) -> dict[str, Any]:
    """Return the window of the families that switch it on with ``use_sliding_window``, for later layers."""
    none = {"sliding_window": 0, "full_layers": 0}
    window = read.integer("sliding_window", null=0) if read.flag("use_sliding_window") else 0
    first = min(read.whole("max_window_layers"), layers) if window else layers
    kinds = read.layer_kinds(layers)  # no list is made here: config.json may ask for any number of layers
    full = first if kinds is None else kinds.count(FULL)
    if full == layers:
        return none
    if not window:
        read.problem(f"layer_types has {SLIDING}, but use_sliding_window and sliding_window give no window")
        return none
    if kinds is not None and SLIDING in kinds[:full]:
        read.problem(f"layer_types mixes its kinds; only layers of {FULL} before those of {SLIDING} are supported")
    return {"sliding_window": window, "full_layers": full}


def params(config: DecoderConfig) -> tuple[Param, ...]:
    """Return the parameters in packed order; q, k and v are one matrix, and so are gate and up."""
    h, ff, d = config.hidden_size, config.intermediate_size, config.head_dim
    q, kv = config.num_heads * d, config.num_kv_heads * d
    found = [copied("model.embed_tokens.weight", (config.vocab_size, h), "embedding")]
    for i in range(config.num_layers):
        block = f"model.layers.{i}"
        attention, mlp = f"{block}.self_attn", f"{block}.mlp"
        qkv = [(f"{attention}.{name}_proj", rows) for name, rows in (("q", q), ("k", kv), ("v", kv))]
        gate_up = [(f"{mlp}.gate_proj", ff), (f"{mlp}.up_proj", ff)]
        found += [
            copied(f"{block}.input_layernorm.weight", (h,), "norm"),
            *_stacked(f"{attention}.qkv_proj", qkv, h, bias=config.qkv_bias, reads=f"{block}.input_layernorm.weight"),
            *_stacked(f"{attention}.o_proj", [(f"{attention}.o_proj", h)], q, bias=config.out_bias),
        ]
        if config.qk_norm:
            found += [copied(f"{attention}.{name}_norm.weight", (d,), "norm") for name in ("q", "k")]
        norm = f"{block}.post_attention_layernorm.weight"
        found += [
            copied(norm, (h,), "norm"),
            *_stacked(f"{mlp}.gate_up_proj", gate_up, h, bias=config.mlp_bias, reads=norm),
            *_stacked(f"{mlp}.down_proj", [(f"{mlp}.down_proj", h)], ff, bias=config.mlp_bias),
        ]
    found.append(copied("model.norm.weight", (h,), "norm"))
    head = () if config.tied else (copied("lm_head.weight", (config.vocab_size, h), "head"),)
    return (*found, *head)


def _stacked(name: str, parts: list[tuple[str, int]], columns: int, *, bias: bool, reads: str = "") -> list[Param]:
    """Return the weight, and the bias if there is one, of projections laid under one another."""
    rows, transform = sum(rows for _, rows in parts), "copy" if len(parts) == 1 else "concat0"
    weights, biases = (tuple(f"{part}.{leaf}" for part, _ in parts) for leaf in ("weight", "bias"))
    matrices, vectors = tuple((n, columns) for _, n in parts), tuple((n,) for _, n in parts)
    found = [Param(f"{name}.weight", (rows, columns), "linear", weights, matrices, transform, reads=reads)]
    if bias:
        found.append(Param(f"{name}.bias", (rows,), "bias", biases, vectors, transform))
    return found


def causal_lm(config: DecoderConfig, make: Any) -> Any:
    """Return the graph's module composed of the layers of ``make``; its attribute order is that of :func:`params`."""
    from stages.models import layers

    h, ff, d, eps = config.hidden_size, config.intermediate_size, config.head_dim, config.rms_eps
    q, fused = config.num_heads * d, (config.num_heads + 2 * config.num_kv_heads) * d

    def attention(name: str) -> layers.Attention:
        return layers.Attention(
            make.linear(f"{name}.qkv_proj", fused, h, bias=config.qkv_bias),
            make.linear(f"{name}.o_proj", h, q, bias=config.out_bias),
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=d,
            q_norm=make.norm(f"{name}.q_norm", d, eps) if config.qk_norm else None,
            k_norm=make.norm(f"{name}.k_norm", d, eps) if config.qk_norm else None,
        )

    def decoder_layer(block: str) -> layers.DecoderLayer:
        return layers.DecoderLayer(
            make.norm(f"{block}.input_layernorm", h, eps),
            attention(f"{block}.self_attn"),
            make.norm(f"{block}.post_attention_layernorm", h, eps),
            layers.GatedMLP(
                make.linear(f"{block}.mlp.gate_up_proj", 2 * ff, h, bias=config.mlp_bias),
                make.linear(f"{block}.mlp.down_proj", h, ff, bias=config.mlp_bias),
            ),
        )

    return layers.CausalLM(
        make.embedding("model.embed_tokens", config.vocab_size, h),
        [decoder_layer(f"model.layers.{i}") for i in range(config.num_layers)],
        make.norm("model.norm", h, eps),
        None if config.tied else make.head("lm_head", config.vocab_size, h),
    )


def reference(config: DecoderConfig, tensors: WeightValues, **options: Any) -> tuple[JsonObject, WeightValues]:
    """Return the keywords of transformers' config, with ``options`` of the family, and the model's state dict."""
    keywords = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_eps,
        "rope_parameters": config.reference(),
        "max_position_embeddings": config.max_positions,
        "hidden_act": "silu",
        "tie_word_embeddings": config.tied,
        **options,
    }
    state = dict(tensors)
    if config.tied:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    return keywords, state


# What the records of the families of this form share.
FORM: dict[str, Any] = {
    "config": DecoderConfig,
    "context_window": context_window,
    "for_context": for_context,
    "params": params,
    "causal_lm": causal_lm,
    "tied": ("lm_head.weight", "model.embed_tokens.weight"),
}
