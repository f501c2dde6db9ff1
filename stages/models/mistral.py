"""Mistral (``model_type: mistral``), 0.1 to 0.3: Llama's form with a sliding window in every layer, or with none."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages.models import decoder, rope
from stages.models.config_reader import FULL, IRRELEVANT, SHARED, SLIDING, UNBUILT_ATTENTION, ConfigReader, classify
from stages.models.decoder import DecoderConfig
from stages.models.family import Family

if TYPE_CHECKING:
    from stages.documents.files import JsonObject
    from stages.models.family import ReferenceModel, WeightValues

# Of transformers' MistralConfig; a sliding_window that is null means none.
DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "sliding_window": 4096,
}
KEYS = classify(f"{SHARED} {' '.join(DEFAULTS)} {rope.KEYS} layer_types", IRRELEVANT, UNBUILT_ATTENTION)


def parse(raw: JsonObject) -> DecoderConfig:
    """Return the config of a raw config.json; :class:`~stages.models.family.ConfigError` lists all that is wrong."""
    read = ConfigReader(raw, KEYS, DEFAULTS, "mistral")
    sizes, window = decoder.read_sizes(read), read.integer("sliding_window", null=0)
    kinds = read.layer_kinds(sizes["num_layers"])
    if kinds and SLIDING in kinds and (FULL in kinds or not window):  # else transformers goes by the window alone
        read.problem(
            f"layer_types is not supported beside sliding_window = {window or 'null'}: all layers have one window"
        )
    config = DecoderConfig(**sizes, sliding_window=window)
    read.finish()
    return config


def to_reference(config: DecoderConfig, tensors: WeightValues) -> ReferenceModel:
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
        "rope scaling linear, dynamic, yarn, longrope and llama3",
        "tied embeddings",
        "sliding window (beyond it on llvm, in chunks shorter than it)",
    ),
    **decoder.FORM,
)
