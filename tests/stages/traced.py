"""Tiny checkpoints of models that have no family here: random, with the head structure of the real ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SIZES = {
    "vocab_size": 131, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 160, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GPT = {"vocab_size": 131, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 160, "bos_token_id": 1,
       "eos_token_id": 2}  # fmt: skip

# model_type -> what its config says beside the sizes
FAMILIES: dict[str, dict[str, Any]] = {
    "olmo2": {},
    "granite": {"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "attention_multiplier": 0.2,
                "logits_scaling": 2.0},
    "stablelm": {"partial_rotary_factor": 0.25, "use_qkv_bias": True, "qk_layernorm": False},
}  # fmt: skip


def write(folder: Path, model_type: str, *, seed: int = 0, **more: Any) -> Path:
    """Write a random checkpoint with outliers whose logits spread over a few units."""
    import torch
    import transformers

    sizes = GPT if "n_embd" in FAMILIES[model_type] else SIZES
    config = transformers.AutoConfig.for_model(model_type, **{**sizes, **FAMILIES[model_type], **more})
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    scramble(model)
    model.save_pretrained(folder)
    return folder


def scramble(model: Any) -> None:
    """Draw weights so that every one matters: some rows and channels are several times larger than the others."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 1.2 / parameter.shape[-1] ** 0.5)
                parameter.view(-1, parameter.shape[-1])[::17] *= 2.5
            else:
                near = 0.0 if name.endswith("bias") or "gemma" in type(model).__name__.lower() else 1.0
                parameter.normal_(near, 0.25)
