"""Mistral (``model_type: mistral``), 0.1 to 0.3: Llama's form with a sliding window in every layer, or with none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stages.models import decoder, rope
from stages.models.config_reader import NEVER, PROVENANCE, SHARED, ConfigReader, classify
from stages.models.decoder import DecoderConfig
from stages.models.record import Family

if TYPE_CHECKING:
    from collections.abc import Mapping

WINDOW = 4096  # what transformers takes where config.json does not say; null means none
# attention_sink_size is another runtime's option for contexts that roll over; the model itself has no sinks.
KEYS = classify(
    f"{SHARED} {decoder.HONOURED} {rope.KEYS} sliding_window sliding_window_size",
    f"{PROVENANCE} attention_sink_size",
    NEVER,
)


def parse(raw: Mapping[str, Any]) -> DecoderConfig:
    """Return the config of a raw config.json; :class:`~stages.models.record.ConfigError` lists all that is wrong."""
    read = ConfigReader(raw, KEYS, "mistral")
    none = "sliding_window" in raw and raw["sliding_window"] is None and raw.get("sliding_window_size") is None
    window = 0 if none else read.integer("sliding_window", "sliding_window_size", default=WINDOW)
    config = DecoderConfig(**decoder.read_sizes(read), sliding_window=window)
    read.finish()
    return config


def to_reference(config: DecoderConfig, tensors: Mapping[str, Any]) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Return transformers' class name, config keywords and state dict."""
    keywords, state = decoder.reference(config, tensors, sliding_window=config.sliding_window or None)
    return "MistralForCausalLM", keywords, state


FAMILY = Family(
    name="mistral",
    architectures=("MistralForCausalLM",),
    parse=parse,
    to_reference=to_reference,
    keys=KEYS,
    supports=(
        "grouped-query attention",
        "head_dim of its own",
        "rope scaling linear and llama3",
        "tied embeddings",
        "sliding window (beyond it on llvm, in chunks shorter than it)",
    ),
    **decoder.FORM,
)
