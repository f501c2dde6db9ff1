"""Reads the special tokens of a checkpoint by role, such as the ``bos_token`` of chat templates."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stages.documents.files import JsonObject


ROLES = ("bos", "eos", "pad", "unk", "sep", "cls", "mask")
_END = "<|endoftext|>"
# What classes of transformers 5 say where tokenizer_config.json does not.
CLASS_ROLES: dict[str, dict[str, str]] = {
    "GPT2Tokenizer": {"bos": _END, "eos": _END, "unk": _END},
    "GPTNeoXTokenizer": {"bos": _END, "eos": _END, "unk": _END, "pad": "<|padding|>"},
    "Qwen2Tokenizer": {"eos": _END, "unk": _END, "pad": _END},
    "LlamaTokenizer": {"bos": "<s>", "eos": "</s>", "unk": "<unk>"},
    "CodeLlamaTokenizer": {"bos": "<s>", "eos": "</s>", "unk": "<unk>"},
}


def named(config: JsonObject) -> dict[str, str]:
    """Return role -> token of every ``<role>_token`` in tokenizer_config.json, the model's own roles included."""
    own = config.get("extra_special_tokens")
    found = {**(own if isinstance(own, dict) else {}), **config}
    texts = {key: value.get("content") if isinstance(value, dict) else value for key, value in found.items()}
    return {
        key.removesuffix("_token"): text
        for key, text in texts.items()
        if key.endswith("_token") and isinstance(text, str)
    }


def assumed(config: JsonObject, class_name: str | None) -> dict[str, str]:
    """Return the roles that the tokenizer class gives where tokenizer_config.json does not even say null."""
    roles = CLASS_ROLES.get(class_name or "", {})
    return {role: text for role, text in roles.items() if f"{role}_token" not in config}
