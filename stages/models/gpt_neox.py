"""GPT-NeoX (``model_type: gpt_neox``): RedPajama-INCITE, Pythia. LayerNorm with bias, partly rotated heads, parallel or
sequential residual; the fused QKV projection of the checkpoint goes head by head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stages.models.config_reader import IRRELEVANT, SHARED, UNBUILT_ATTENTION, ConfigReader, classify
from stages.models.family import AttentionCache, Family, Param, copied
from stages.models.rope import Rope, context_window, for_context, read_rope

if TYPE_CHECKING:
    from stages.documents.files import JsonObject
    from stages.models.family import ReferenceModel, WeightValues

# Transformers' names of an activation -> ours.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_pytorch_tanh",
    "gelu_fast": "gelu_pytorch_tanh",
    "gelu_accurate": "gelu_pytorch_tanh",
    "gelu_pytorch_tanh": "gelu_pytorch_tanh",
    "gelu_python_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
# Of transformers' GPTNeoXConfig.
DEFAULTS = {
    "vocab_size": 50432,
    "hidden_size": 6144,
    "intermediate_size": 24576,
    "num_hidden_layers": 44,
    "num_attention_heads": 64,
    "hidden_act": "gelu",
    "max_position_embeddings": 2048,
    "layer_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "use_parallel_residual": True,
    "attention_bias": True,
}
KEYS = classify(
    # transformers writes rope_theta and partial_rotary_factor beside the two of its own names, and reads neither.
    f"""{SHARED} {" ".join(DEFAULTS)} rotary_pct rotary_emb_base rope_scaling rope_parameters
    original_max_position_embeddings head_dim sliding_window layer_types""",
    f"{IRRELEVANT} hidden_dropout classifier_dropout is_decoder",
    UNBUILT_ATTENTION,
)


@dataclass(frozen=True, kw_only=True)
class NeoXConfig(Rope):
    """Sizes and options that determine the graph; ``attention_bias`` is that of QKV and output projection."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    head_dim: int
    norm_eps: float
    activation: str
    parallel_residual: bool
    attention_bias: bool
    tied: bool

    @property
    def attention(self) -> AttentionCache:
        """What the KV cache must know."""
        return AttentionCache(self.num_layers, self.num_heads, self.num_heads, self.head_dim, **self.kernel_options())


def parse(raw: JsonObject) -> NeoXConfig:
    """Return the config of a raw config.json; :class:`~stages.models.family.ConfigError` lists all that is wrong."""
    read = ConfigReader(raw, KEYS, DEFAULTS, "gpt_neox")
    hidden, heads = read.integer("hidden_size"), read.integer("num_attention_heads")
    head_dim = hidden // max(heads, 1)
    if heads and hidden % heads:
        read.problem(f"hidden_size = {hidden} is not a multiple of num_attention_heads = {heads}")
    read.must_be("head_dim", head_dim, "it is hidden_size / num_attention_heads")
    layers, positions = read.integer("num_hidden_layers"), read.integer("max_position_embeddings")
    read.no_window(layers, positions)
    config = NeoXConfig(
        **read_rope(read, head_dim, positions, theta_key="rotary_emb_base", share_key="rotary_pct"),
        vocab_size=read.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=read.integer("intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        head_dim=head_dim,
        norm_eps=read.number("layer_norm_eps"),
        max_positions=positions,
        activation=read.activation(ACTIVATIONS),
        parallel_residual=read.flag("use_parallel_residual"),
        attention_bias=read.flag("attention_bias"),
        tied=read.flag("tie_word_embeddings"),
    )
    read.finish()
    return config


def params(config: NeoXConfig) -> tuple[Param, ...]:
    """Return the parameters in packed order; names are the checkpoint's, QKV is reordered to all q, all k, all v."""
    h, ff, rows = config.hidden_size, config.intermediate_size, config.vocab_size
    reorder = f"interleaved_qkv:{config.num_heads}"
    found = [copied("gpt_neox.embed_in.weight", (rows, h), "embedding")]
    for i in range(config.num_layers):
        block = f"gpt_neox.layers.{i}"
        found += [
            *_norm(f"{block}.input_layernorm", h),
            *_linear(
                f"{block}.attention.query_key_value",
                3 * h,
                h,
                reorder,
                bias=config.attention_bias,
                reads=f"{block}.input_layernorm.weight",
            ),
            *_linear(f"{block}.attention.dense", h, h, bias=config.attention_bias),
            *_norm(f"{block}.post_attention_layernorm", h),
            *_linear(f"{block}.mlp.dense_h_to_4h", ff, h, reads=f"{block}.post_attention_layernorm.weight"),
            *_linear(f"{block}.mlp.dense_4h_to_h", h, ff),
        ]
    found += _norm("gpt_neox.final_layer_norm", h)
    return (*found, *(() if config.tied else (copied("embed_out.weight", (rows, h), "head"),)))


def _norm(name: str, features: int) -> list[Param]:
    return [copied(f"{name}.weight", (features,), "norm"), copied(f"{name}.bias", (features,), "bias")]


def _linear(name: str, n: int, k: int, transform: str = "copy", *, bias: bool = True, reads: str = "") -> list[Param]:
    found = [copied(f"{name}.weight", (n, k), "linear", transform, reads)]
    return [*found, copied(f"{name}.bias", (n,), "bias", transform)] if bias else found


def causal_lm(config: NeoXConfig, make: Any) -> Any:
    """Return the graph's module composed of the layers of ``make``; its attribute order is that of :func:`params`."""
    from stages.models import layers

    h, ff, eps, bias = config.hidden_size, config.intermediate_size, config.norm_eps, config.attention_bias
    form = layers.ParallelDecoderLayer if config.parallel_residual else layers.DecoderLayer

    def decoder_layer(block: str) -> layers.DecoderLayer:
        return form(
            make.layer_norm(f"{block}.input_layernorm", h, eps),
            layers.Attention(
                make.linear(f"{block}.attention.query_key_value", 3 * h, h, bias=bias),
                make.linear(f"{block}.attention.dense", h, h, bias=bias),
                num_heads=config.num_heads,
                num_kv_heads=config.num_heads,
                head_dim=config.head_dim,
            ),
            make.layer_norm(f"{block}.post_attention_layernorm", h, eps),
            layers.MLP(
                make.linear(f"{block}.mlp.dense_h_to_4h", ff, h, bias=True),
                make.linear(f"{block}.mlp.dense_4h_to_h", h, ff, bias=True),
                config.activation,
            ),
        )

    return layers.CausalLM(
        make.embedding("gpt_neox.embed_in", config.vocab_size, h),
        [decoder_layer(f"gpt_neox.layers.{i}") for i in range(config.num_layers)],
        make.layer_norm("gpt_neox.final_layer_norm", h, eps),
        None if config.tied else make.head("embed_out", config.vocab_size, h),
    )


def to_reference(config: NeoXConfig, tensors: WeightValues) -> ReferenceModel:
    """Return transformers' class name, config keywords and state dict."""
    keywords = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "layer_norm_eps": config.norm_eps,
        "hidden_act": config.activation,
        "use_parallel_residual": config.parallel_residual,
        "attention_bias": config.attention_bias,
        "rope_parameters": {**config.reference(), "partial_rotary_factor": config.rotary_dim / config.head_dim},
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.tied,
    }
    state = dict(tensors)
    head = state.pop("embed_out.weight", state["gpt_neox.embed_in.weight"])
    return "GPTNeoXForCausalLM", keywords, {**state, "lm_head.weight": head}


FAMILY = Family(
    name="gpt_neox",
    architectures=("GPTNeoXForCausalLM",),
    config=NeoXConfig,
    parse=parse,
    context_window=context_window,
    for_context=for_context,
    params=params,
    causal_lm=causal_lm,
    to_reference=to_reference,
    keys=KEYS,
    recomputed=("*.attention.masked_bias", "*.attention.bias"),
    aliases={"embed_out.weight": "lm_head.weight"},
    tied=("embed_out.weight", "gpt_neox.embed_in.weight"),
    supports=(
        "parallel and sequential residual",
        "partly rotated heads",
        "rope scaling linear, dynamic, yarn, longrope and llama3",
        "gelu exact or by tanh, relu, silu",
        "tied embeddings",
    ),
)
