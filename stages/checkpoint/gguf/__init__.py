"""GGUF, the file of llama.cpp: read strictly, as the checkpoint in Hugging Face format that it was made of."""

from __future__ import annotations

SUFFIX = ".gguf"


def is_named(name: str) -> bool:
    """Say whether a file of this name is one of GGUF."""
    return name.lower().endswith(SUFFIX)
