"""Qwen, first generation (``model_type: qwen``): fused QKV with bias, RMSNorm, rotary positions, gated SiLU MLP.

Both generations of its config.json keys are read. Within ``seq_length`` positions dynamic NTK and log-n attention are
identities, so the model equals Qwen2 with renamed tensors: that is its reference. Beyond, dynamic NTK is another base.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from stages.checkpoint.errors import ConfigError
from stages.models.config_reader import SHARED, ConfigReader, classify
from stages.models.family import AttentionCache, Family, Param, copied

if TYPE_CHECKING:
    from stages.documents.files import JsonObject
    from stages.documents.model import RopeParameters
    from stages.models.family import ReferenceModel, WeightValues


@dataclass(frozen=True)
class QWenConfig:
    """Sizes and options that determine the graph; ``intermediate_size`` is that of one branch of the gated MLP.

    ``log_n`` is what :class:`~stages.models.family.AttentionCache` calls so.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    head_dim: int
    rms_eps: float
    rope_theta: float
    seq_length: int
    use_dynamic_ntk: bool
    use_logn_attn: bool
    log_n: int = 0

    @property
    def attention(self) -> AttentionCache:
        """What the KV cache must know."""
        from stages.models.frequencies import frequencies

        found, _ = frequencies(self.rope_parameters, self.head_dim)
        return AttentionCache(self.num_layers, self.num_heads, self.num_heads, self.head_dim, found, log_n=self.log_n)

    @property
    def rope_parameters(self) -> RopeParameters:
        """Transformers' words for its rotary positions."""
        return {"rope_type": "default", "rope_theta": self.rope_theta}


# Of the published QWenConfig, of the second generation of its keys; seq_length has none.
DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "kv_channels": 128,
    "layer_norm_epsilon": 1e-6,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "no_bias": True,
    "tie_word_embeddings": False,
    "scale_attn_weights": True,
}
LOG_N = 32767  # positions of the published table of logarithms
# What the first generation takes instead; its sizes are the same under other names.
EARLY = {"layer_norm_epsilon": 1e-5, "use_dynamic_ntk": False, "use_logn_attn": False}
KEYS = classify(
    f"""{SHARED} {" ".join(DEFAULTS)} seq_length padded_vocab_size n_embd ffn_hidden_size n_layer n_head
    activation hidden_act pos_emb apply_residual_connection_post_layernorm""",
    # The positions' limit is seq_length: the model's own code reads neither max_position_embeddings nor n_positions.
    """initializer_range use_cache attn_dropout_prob emb_dropout_prob attn_pdrop embd_pdrop resid_pdrop
    bias_dropout_fusion onnx_safe bf16 fp16 fp32 use_cache_kernel use_flash_attn softmax_in_fp32
    max_position_embeddings n_positions""",
    "quantization_bit use_cache_quantization rope_scaling n_inner is_encoder_decoder extra_vocab_file",
)


def parse(raw: JsonObject) -> QWenConfig:
    """Return the config of a raw config.json; :class:`~stages.models.family.ConfigError` lists all that is wrong."""
    early = EARLY if "n_embd" in raw else {}
    read = ConfigReader(raw, KEYS, {**DEFAULTS, **early}, "qwen")
    hidden, heads = read.integer("hidden_size", "n_embd"), read.integer("num_attention_heads", "n_head")
    head_dim = read.integer("kv_channels")
    intermediate = read.integer("intermediate_size", "ffn_hidden_size")
    vocab = read.integer("vocab_size")
    rows = read.integer("padded_vocab_size", null=vocab)
    if hidden and heads and heads * head_dim != hidden:
        read.problem(f"hidden_size {hidden} is not {heads} attention heads x {head_dim} channels (kv_channels)")
    if head_dim % 2:
        read.problem(f"kv_channels = {head_dim} is odd; rotary positions turn pairs of channels")
    if intermediate % 2:
        read.problem(f"intermediate_size = {intermediate} is odd; it is the width of two equal branches together")
    if rows and rows < vocab:
        read.problem(f"padded_vocab_size {rows} is smaller than vocab_size {vocab}")
    read.must_be("rotary_pct", 1.0, "all channels of a head are rotated")
    read.must_be("no_bias", True, "only the fused QKV projection has a bias")
    read.must_be("tie_word_embeddings", False, "the output head is a tensor of its own")
    read.must_be("scale_attn_weights", True, "scores are scaled by 1/sqrt(kv_channels)")
    read.must_be("pos_emb", "rotary", "positions are rotary")
    read.must_be("activation", "swiglu", "the MLP is w1(x) * silu(w2(x))")
    read.must_be("hidden_act", "silu", "the MLP is w1(x) * silu(w2(x))")
    read.must_be("apply_residual_connection_post_layernorm", False, "the residual is taken before the norm")
    config = QWenConfig(
        vocab_size=rows,
        hidden_size=hidden,
        intermediate_size=intermediate // 2,
        num_layers=read.integer("num_hidden_layers", "n_layer"),
        num_heads=heads,
        head_dim=head_dim,
        rms_eps=read.number("layer_norm_epsilon"),
        rope_theta=read.number("rotary_emb_base"),
        seq_length=read.integer("seq_length"),
        use_dynamic_ntk=read.flag("use_dynamic_ntk"),
        use_logn_attn=read.flag("use_logn_attn"),
    )
    read.finish()
    return config


def context_window(config: QWenConfig, requested: int) -> int:
    """Return the number of positions to build for, ``seq_length`` for 0; ConfigError if the model has fewer."""
    longest, reason = LOG_N, f"for which the model's own code has no logarithms beyond {LOG_N}"
    if not config.use_dynamic_ntk:
        longest, reason = config.seq_length, "beyond which the model was not trained, without use_dynamic_ntk"
    elif not config.use_logn_attn:
        longest = requested
    if requested > max(longest, config.seq_length):
        raise ConfigError(
            f"context_window = {requested} exceeds seq_length = {config.seq_length} of config.json, {reason}: "
            f"choose context_window <= {max(longest, config.seq_length)}"
        )
    return requested or config.seq_length


def for_context(config: QWenConfig, window: int) -> tuple[QWenConfig, str]:
    """Return ``config`` with the base and the log-n attention of so many positions, and what to say of that.

    The model's own code chooses the base by the length of a prompt and keeps it for the whole answer.
    """
    if window <= config.seq_length:
        return config, ""
    alpha = 2 ** math.ceil(math.log2(window / config.seq_length) + 1) - 1
    base = config.rope_theta * alpha ** (config.head_dim / (config.head_dim - 2))
    return replace(config, rope_theta=base, log_n=config.seq_length if config.use_logn_attn else 0), (
        f"use_dynamic_ntk: all sequences use the base for a prompt of {window} tokens, the context_window; the model's "
        f"own code uses another for shorter prompts: if prompts stay within seq_length = {config.seq_length}, "
        "set context_window to that"
    )


def params(config: QWenConfig) -> tuple[Param, ...]:
    """Return the parameters in packed order; names are the checkpoint's, except the fused gate and up projection."""
    h, ff, rows = config.hidden_size, config.intermediate_size, config.vocab_size
    found = [copied("transformer.wte.weight", (rows, h), "embedding")]
    for i in range(config.num_layers):
        block = f"transformer.h.{i}"
        found += [
            copied(f"{block}.ln_1.weight", (h,), "norm"),
            copied(f"{block}.attn.c_attn.weight", (3 * h, h), "linear", reads=f"{block}.ln_1.weight"),
            copied(f"{block}.attn.c_attn.bias", (3 * h,), "bias"),
            copied(f"{block}.attn.c_proj.weight", (h, h), "linear"),
            copied(f"{block}.ln_2.weight", (h,), "norm"),
            Param(
                f"{block}.mlp.gate_up_proj.weight",
                (2 * ff, h),
                "linear",
                (f"{block}.mlp.w2.weight", f"{block}.mlp.w1.weight"),  # w2 is the side that goes through SiLU
                ((ff, h), (ff, h)),
                "concat0",
                reads=f"{block}.ln_2.weight",
            ),
            copied(f"{block}.mlp.c_proj.weight", (h, ff), "linear"),
        ]
    return (*found, copied("transformer.ln_f.weight", (h,), "norm"), copied("lm_head.weight", (rows, h), "head"))


def causal_lm(config: QWenConfig, make: Any) -> Any:
    """Return the graph's module composed of the layers of ``make``; its attribute order is that of :func:`params`."""
    from stages.models import layers

    h, ff = config.hidden_size, config.intermediate_size

    def decoder_layer(block: str) -> layers.DecoderLayer:
        qkv = make.linear(f"{block}.attn.c_attn", 3 * h, h, bias=True)
        out = make.linear(f"{block}.attn.c_proj", h, h)
        heads = {"num_heads": config.num_heads, "num_kv_heads": config.num_heads, "head_dim": config.head_dim}
        gate_up = make.linear(f"{block}.mlp.gate_up_proj", 2 * ff, h)
        return layers.DecoderLayer(
            make.norm(f"{block}.ln_1", h, config.rms_eps),
            layers.Attention(qkv, out, **heads),
            make.norm(f"{block}.ln_2", h, config.rms_eps),
            layers.GatedMLP(gate_up, make.linear(f"{block}.mlp.c_proj", h, ff)),
        )

    return layers.CausalLM(
        make.embedding("transformer.wte", config.vocab_size, h),
        [decoder_layer(f"transformer.h.{i}") for i in range(config.num_layers)],
        make.norm("transformer.ln_f", h, config.rms_eps),
        make.head("lm_head", config.vocab_size, h),
    )


def to_reference(config: QWenConfig, tensors: WeightValues) -> ReferenceModel:
    """Return the same model as transformers' Qwen2: class name, config keywords, state dict (views of ``tensors``)."""
    keywords = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_heads,
        "rms_norm_eps": config.rms_eps,
        "rope_parameters": config.rope_parameters,
        "max_position_embeddings": config.seq_length,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "use_sliding_window": False,
    }
    state = {
        "model.embed_tokens.weight": tensors["transformer.wte.weight"],
        "model.norm.weight": tensors["transformer.ln_f.weight"],
        "lm_head.weight": tensors["lm_head.weight"],
    }
    h = config.hidden_size
    for i in range(config.num_layers):
        old, new = f"transformer.h.{i}", f"model.layers.{i}"
        state[f"{new}.input_layernorm.weight"] = tensors[f"{old}.ln_1.weight"]
        state[f"{new}.post_attention_layernorm.weight"] = tensors[f"{old}.ln_2.weight"]
        for part, name in enumerate(("q_proj", "k_proj", "v_proj")):  # contiguous thirds of the fused projection
            for leaf in ("weight", "bias"):
                fused = tensors[f"{old}.attn.c_attn.{leaf}"]
                state[f"{new}.self_attn.{name}.{leaf}"] = fused[part * h : (part + 1) * h]
        state[f"{new}.self_attn.o_proj.weight"] = tensors[f"{old}.attn.c_proj.weight"]
        state[f"{new}.mlp.gate_proj.weight"] = tensors[f"{old}.mlp.w2.weight"]
        state[f"{new}.mlp.up_proj.weight"] = tensors[f"{old}.mlp.w1.weight"]
        state[f"{new}.mlp.down_proj.weight"] = tensors[f"{old}.mlp.c_proj.weight"]
    return "Qwen2ForCausalLM", keywords, state


FAMILY = Family(
    name="qwen",
    architectures=("QWenLMHeadModel",),
    config=QWenConfig,
    parse=parse,
    context_window=context_window,
    for_context=for_context,
    params=params,
    causal_lm=causal_lm,
    to_reference=to_reference,
    keys=KEYS,
    supports=("both generations of config keys", "contexts beyond seq_length by dynamic NTK and log-n attention"),
)
