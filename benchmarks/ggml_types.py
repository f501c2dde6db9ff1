"""What is left of a matrix in llama.cpp's types, by ggml's own quantizers, and which type llama.cpp gives each matrix.

The quantizers are those of the package libggml-python, importance matrix included; the package gguf restores values.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np

BLOCK = 256  # values of a block of the types with K
# Where such a block does not divide a row's length llama.cpp takes these instead (tensor_type_fallback).
INSTEAD = {"Q2_K": "IQ4_NL", "Q3_K": "IQ4_NL", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
LAYER = re.compile(r"\.(\d+)\.")


@functools.cache
def library() -> Any:
    """Return ggml's library; None where the package is not installed."""
    found = importlib.util.find_spec("libggml")
    if found is None or not found.submodule_search_locations:
        return None
    loaded = ctypes.CDLL(str(Path(next(iter(found.submodule_search_locations))) / "lib64" / "libggml-base.so"))
    loaded.ggml_quantize_chunk.restype = ctypes.c_size_t
    loaded.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        *[ctypes.c_void_p] * 2,
        *[ctypes.c_int64] * 3,
        ctypes.c_void_p,
    ]
    return loaded


def left(weight: np.ndarray, name: str, importance: np.ndarray | None) -> np.ndarray:
    """Return what a float32 weight [n, k] is worth after ggml's type ``name``; ``importance`` [k]."""
    kind = gguf.GGMLQuantizationType[name]
    found: np.ndarray = gguf.quants.dequantize(made(weight, name, importance), kind)[:, : weight.shape[1]]
    return found


def made(weight: np.ndarray, name: str, importance: np.ndarray | None = None) -> np.ndarray:
    """Return the bytes uint8 [n, m] of a float32 weight [n, k] in ggml's type ``name``; ``importance`` [k].

    Rows that no whole blocks fill are filled up with zeros.
    """
    kind = gguf.GGMLQuantizationType[name]
    n, k = weight.shape
    values, size = gguf.GGML_QUANT_SIZES[kind]
    padded = -(-k // values) * values
    rows = np.zeros((n, padded), np.float32)
    rows[:, :k] = weight
    counts = np.zeros(padded, np.float32)
    if importance is not None:
        counts[:k] = importance
    stored = np.empty((n, padded // values * size), np.uint8)
    library().ggml_quantize_chunk(
        int(kind),
        rows.ctypes.data,
        stored.ctypes.data,
        0,
        n,
        padded,
        None if importance is None else counts.ctypes.data,
    )
    return stored


def bits(name: str) -> float:
    """Return the bits that a value takes."""
    values, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    return 8 * size / values


def chosen(mixture: str, tensor: str, makes_logits: bool, k: int, layers: int, group: int, *, padded: bool) -> str:
    """Return the type that llama.cpp stores ``tensor`` in, in a file of type ``mixture`` of a llama of ``layers``
    whose key-value heads are read by a ``group`` of query heads each.

    As llama_tensor_get_type of llama.cpp has it, with an importance matrix; ``padded``: rows are as if whole blocks
    filled them.
    """
    found = re.sub("_[SM]$", "", mixture)
    layer = int(match[1]) if (match := LAYER.search(tensor)) else 0
    more = layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
    if makes_logits:  # a table that does not has the type of the body
        found = "Q6_K" if padded or k % BLOCK == 0 else "Q8_0"
    elif mixture == "Q4_K_M" and more and re.search("v_proj|down_proj", tensor):
        found = "Q6_K"
    elif mixture == "Q3_K_M" and "v_proj" in tensor:
        found = "Q5_K" if layer < 2 else "Q4_K"
    elif mixture == "Q3_K_M" and "down_proj" in tensor:
        found = "Q5_K" if layer < layers // 16 else "Q4_K"
    elif mixture == "Q3_K_M" and "o_proj" in tensor:
        found = "Q4_K"
    elif mixture == "Q2_K" and re.search("v_proj|o_proj|down_proj", tensor):
        found = "Q4_K" if "v_proj" in tensor and group >= 4 else "Q3_K"
    elif mixture == "Q4_0" and "down_proj" in tensor and layer < layers // 8:
        found = "Q4_1"
    return INSTEAD.get(found, found) if k % BLOCK and not padded else found
