"""Reads the tokenizer of a checkpoint, emits one for every runtime, and proves that the two are equal."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stages.tokenizers.tokenizer_family import TokenizerFamily

# Family name -> where its TokenizerFamily is. Strings, so that naming a family imports nothing.
TOKENIZERS: dict[str, str] = {
    "tiktoken-qwen": "stages.tokenizers.families.tiktoken_qwen:FAMILY",
    "tokenizer-json": "stages.tokenizers.families.tokenizer_json:FAMILY",
    "tiktoken-llama3": "stages.tokenizers.families.tiktoken_llama3:FAMILY",
    "sentencepiece": "stages.tokenizers.families.sentencepiece:FAMILY",
    "tekken": "stages.tokenizers.families.tekken:FAMILY",
    "rwkv-world": "stages.tokenizers.families.rwkv_world:FAMILY",
}

# The libraries that read a checkpoint's vocabulary: whatever reads one has their versions in its key.
READERS = ("protobuf", "regex", "sentencepiece", "tiktoken", "tokenizers", "transformers")

# Model family -> the checkpoint's name of its token embedding, whose first dimension bounds every id. Named and not
# guessed: the largest first dimension of a small model is a feed-forward matrix, and a guess that is wrong passes.
EMBEDDINGS: dict[str, str] = {
    "qwen": "transformer.wte.weight",
    "llama": "model.embed_tokens.weight",
    "mistral": "model.embed_tokens.weight",
    "qwen2": "model.embed_tokens.weight",
    "qwen3": "model.embed_tokens.weight",
    "gpt_neox": "gpt_neox.embed_in.weight",
    "rwkv": "rwkv.embeddings.weight",
}


def load_tokenizer_family(name: str) -> TokenizerFamily:
    """Return the family of that name; :class:`KeyError` if there is none."""
    module, _, attribute = TOKENIZERS[name].partition(":")
    family: TokenizerFamily = getattr(importlib.import_module(module), attribute)
    return family
