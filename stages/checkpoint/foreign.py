"""Recognises folders that are not a checkpoint in Hugging Face format (adapters, pickles, ...), and says what to do."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

UNQUANTIZED = "start from the unquantized checkpoint in Hugging Face format and choose a scheme here"
CONVERT = (
    "load it once with transformers where you trust it and save it again: "
    "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR, safe_serialization=True)"
)
PUBLISHED = "take the model's repository in Hugging Face format (config.json and model*.safetensors)"
# Files of a folder without weights of ours -> what they are, and what to do; the first that is there decides.
FORMATS = (
    (
        ("adapter_config.json", "adapter_model*.safetensors", "adapter_model.bin"),
        "a LoRA adapter (PEFT), which is no model by itself",
        (
            "merge it into its base model with peft: AutoPeftModelForCausalLM.from_pretrained(DIR).merge_and_unload()"
            ".save_pretrained(NEW_DIR), and copy the tokenizer's files there"
        ),
    ),
    (
        ("*.gguf",),
        "in GGUF, llama.cpp's format, of which one file is a checkpoint",
        "name the file, not the folder: checkpoint = DIR/NAME.gguf",
    ),
    (
        ("consolidated*.pth",),
        "Meta's own format",
        f"{PUBLISHED}, or convert it with transformers' convert_llama_weights_to_hf.py",
    ),
    (("consolidated*.safetensors",), "Mistral's own format", PUBLISHED),
    (("*.npz",), "arrays of NumPy, as MLX once wrote them", PUBLISHED),
    (("*.bin", "*.pt", "*.pth", "*.ckpt"), "pickle files, which can run code when read", CONVERT),
    (("*.msgpack", "*.h5", "*.onnx", "*.nemo"), "of another framework, which cannot be read", PUBLISHED),
)


def described(names: Iterable[str]) -> str:
    """Describe the format of files called ``names`` and say what to do with them; empty if it is not known."""
    names = sorted(names)
    for patterns, what, remedy in FORMATS:
        found = [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
        if found:
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            return f"the weights are {what} ({', '.join(found[:3])}{more}); {remedy}"
    return ""


def are_weights(name: str) -> bool:
    """Say whether a safetensors file of this name holds a model's weights in Hugging Face format."""
    return not any(
        fnmatchcase(name, pattern) for patterns, _, _ in FORMATS for pattern in patterns if "safetensors" in pattern
    )
