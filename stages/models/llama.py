"""Llama (``model_type: llama``): 1, 2, 3.x, and those of its form such as TinyLlama, SmolLM2 and CodeLlama."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages.models import decoder, rope
from stages.models.config_reader import IRRELEVANT, SHARED, UNBUILT_ATTENTION, ConfigReader, classify
from stages.models.decoder import DecoderConfig
from stages.models.family import Family

if TYPE_CHECKING:
    from stages.documents.files import JsonObject
    from stages.models.family import ReferenceModel, WeightValues

# Of transformers' LlamaConfig.
DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
# pretraining_tp splits matrix products for numerics alone.
KEYS = classify(
    f"{SHARED} {' '.join(DEFAULTS)} {rope.KEYS} sliding_window layer_types",
    f"{IRRELEVANT} pretraining_tp",
    UNBUILT_ATTENTION,
)


def parse(raw: JsonObject) -> DecoderConfig:
    """Return the config of a raw config.json; :class:`~stages.models.family.ConfigError` lists all that is wrong."""
    read = ConfigReader(raw, KEYS, DEFAULTS, "llama")
    sizes, bias = decoder.read_sizes(read), read.flag("attention_bias")
    read.no_window(sizes["num_layers"], sizes["max_positions"])
    config = DecoderConfig(**sizes, qkv_bias=bias, out_bias=bias, mlp_bias=read.flag("mlp_bias"))
    read.finish()
    return config


def to_reference(config: DecoderConfig, tensors: WeightValues) -> ReferenceModel:
    """Return transformers' class name, config keywords and state dict."""
    keywords, state = decoder.reference(config, tensors, attention_bias=config.qkv_bias, mlp_bias=config.mlp_bias)
    return "LlamaForCausalLM", keywords, state


FAMILY = Family(
    name="llama",
    architectures=("LlamaForCausalLM",),
    parse=parse,
    to_reference=to_reference,
    keys=KEYS,
    supports=(
        "grouped-query attention",
        "head_dim of its own",
        "rope scaling linear, dynamic, yarn, longrope and llama3",
        "tied embeddings",
        "attention and MLP biases",
    ),
    **decoder.FORM,
)
