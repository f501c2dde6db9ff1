"""Qwen2 and 2.5 (``model_type: qwen2``): biases on q, k and v."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages.models import decoder, rope
from stages.models.config_reader import IRRELEVANT, SHARED, UNBUILT_ATTENTION, ConfigReader, classify
from stages.models.decoder import DecoderConfig
from stages.models.family import Family

if TYPE_CHECKING:
    from stages.documents.files import JsonObject
    from stages.models.family import ReferenceModel, WeightValues

# Of transformers' Qwen2Config, whose model reads a head_dim besides.
DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
KEYS = classify(f"{SHARED} {' '.join(DEFAULTS)} {rope.KEYS} head_dim", IRRELEVANT, UNBUILT_ATTENTION)


def parse(raw: JsonObject) -> DecoderConfig:
    """Return the config of a raw config.json; :class:`~stages.models.family.ConfigError` lists all that is wrong."""
    read = ConfigReader(raw, KEYS, DEFAULTS, "qwen2")
    sizes = decoder.read_sizes(read)
    config = DecoderConfig(**sizes, **decoder.read_window(read, sizes["num_layers"]), qkv_bias=True)
    read.finish()
    return config


def to_reference(config: DecoderConfig, tensors: WeightValues) -> ReferenceModel:
    """Return transformers' class name, config keywords and state dict."""
    window = config.sliding_window or None
    options = {"use_sliding_window": bool(window), "sliding_window": window, "max_window_layers": config.full_layers}
    keywords, state = decoder.reference(config, tensors, **options)
    return "Qwen2ForCausalLM", keywords, state


FAMILY = Family(
    name="qwen2",
    architectures=("Qwen2ForCausalLM",),
    parse=parse,
    to_reference=to_reference,
    keys=KEYS,
    supports=(
        "grouped-query attention",
        "biases on q, k and v",
        "rope scaling linear, dynamic, yarn, longrope and llama3",
        "tied embeddings",
        "padded vocabulary",
        "sliding window in the later layers (beyond it on llvm)",
    ),
    **decoder.FORM,
)
