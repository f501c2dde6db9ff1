"""Reads GGUF files, llama.cpp's format, as the Hugging Face checkpoints that they were converted from."""

from __future__ import annotations

SUFFIX = ".gguf"


def is_named(name: str) -> bool:
    """Say whether a file of this name is one of GGUF."""
    return name.lower().endswith(SUFFIX)
