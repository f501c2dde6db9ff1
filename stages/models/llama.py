"""Llama (``model_type: llama``): 1, 2, 3.x, and those of its form such as TinyLlama, SmolLM2 and CodeLlama."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stages.models import decoder, rope
from stages.models.config_reader import NEVER, PROVENANCE, SHARED, ConfigReader, classify
from stages.models.decoder import DecoderConfig
from stages.models.record import Family

if TYPE_CHECKING:
    from collections.abc import Mapping

# pretraining_tp splits matrix products for numerics alone.
KEYS = classify(
    f"{SHARED} {decoder.HONOURED} {rope.KEYS} attention_bias mlp_bias rope_interleaved",
    f"{PROVENANCE} pretraining_tp is_llama_config",
    NEVER,
)


def parse(raw: Mapping[str, Any]) -> DecoderConfig:
    """Return the config of a raw config.json; :class:`~stages.models.record.ConfigError` lists all that is wrong."""
    read = ConfigReader(raw, KEYS, "llama")
    bias = read.flag("attention_bias", default=False)
    read.must_be("rope_interleaved", False, "the halves of a head are rotated against each other")
    heads = raw.get("num_attention_heads")
    config = DecoderConfig(
        **decoder.read_sizes(read, kv_heads=heads if isinstance(heads, int) else None),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=read.flag("mlp_bias", default=False),
    )
    read.finish()
    return config


def to_reference(config: DecoderConfig, tensors: Mapping[str, Any]) -> tuple[str, dict[str, Any], dict[str, Any]]:
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
        "rope scaling linear and llama3",
        "tied embeddings",
        "attention and MLP biases",
    ),
    **decoder.FORM,
)
