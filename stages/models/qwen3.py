"""Qwen3 (``model_type: qwen3``): every head of q and k is normalised, head_dim is a size of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages.models import decoder, rope
from stages.models.config_reader import IRRELEVANT, SHARED, UNBUILT_ATTENTION, ConfigReader, classify
from stages.models.decoder import DecoderConfig
from stages.models.family import Family

if TYPE_CHECKING:
    from stages.documents.files import JsonObject
    from stages.models.family import ReferenceModel, WeightValues

# Of transformers' Qwen3Config.
DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
KEYS = classify(f"{SHARED} {' '.join(DEFAULTS)} {rope.KEYS}", IRRELEVANT, UNBUILT_ATTENTION)


def parse(raw: JsonObject) -> DecoderConfig:
    """Return the config of a raw config.json; :class:`~stages.models.family.ConfigError` lists all that is wrong."""
    read = ConfigReader(raw, KEYS, DEFAULTS, "qwen3")
    sizes = decoder.read_sizes(read)
    bias = read.flag("attention_bias")
    window = decoder.read_window(read, sizes["num_layers"])
    config = DecoderConfig(**sizes, **window, qkv_bias=bias, out_bias=bias, qk_norm=True)
    read.finish()
    return config


def to_reference(config: DecoderConfig, tensors: WeightValues) -> ReferenceModel:
    """Return transformers' class name, config keywords and state dict."""
    window = config.sliding_window or None
    options = {"use_sliding_window": bool(window), "sliding_window": window, "max_window_layers": config.full_layers}
    keywords, state = decoder.reference(config, tensors, attention_bias=config.qkv_bias, **options)
    return "Qwen3ForCausalLM", keywords, state


FAMILY = Family(
    name="qwen3",
    architectures=("Qwen3ForCausalLM",),
    parse=parse,
    to_reference=to_reference,
    keys=KEYS,
    supports=(
        "grouped-query attention",
        "norms on q and k",
        "head_dim of its own",
        "attention biases",
        "rope scaling linear, dynamic, yarn, longrope and llama3",
        "tied embeddings",
        "padded vocabulary",
        "sliding window in the later layers (beyond it on llvm)",
    ),
    **decoder.FORM,
)
