"""The tensors of files by the checkpoint's names, and their rows, dequantized by llama.cpp's own Python package."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

from stages.checkpoint.errors import ConfigError
from stages.checkpoint.gguf import config, container
from stages.checkpoint.gguf.architectures import ROPE_FACTORS
from stages.checkpoint.safetensors import TensorInfo
from stages.checkpoint.strict_json import shown
from stages.problems import capped

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from stages.checkpoint.stored import StoredParts
    from stages.documents.files import JsonObject
    from stages.documents.model import Packed

# Types whose values are what is stored -> safetensors' name; all others are made in float32.
PLAIN = {"F32": "F32", "F16": "F16", "BF16": "BF16"}
DTYPES: JsonObject = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


def tensors(files: Mapping[str, Path]) -> dict[str, tuple[TensorInfo, Packed]]:
    """Return the checkpoint's tensors of one model's ``files``: dtype and shape of each, and how it is computed."""
    try:
        contents = container.read_all(files)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    known, (heads, kv_heads) = config.architecture(contents), config.heads(contents)
    beyond = config.unread(contents)
    if beyond:
        stated = contents.metadata[config.ARCHITECTURE]
        raise ConfigError(*capped([f"tensor {shown(each)} belongs to no supported {stated} model" for each in beyond]))
    found: dict[str, tuple[TensorInfo, Packed]] = {}
    for tensor, stored in contents.tensors.items():
        if not (named := known.name(tensor)):
            continue
        if len(stored.shape) == 1 and stored.type not in PLAIN:
            raise ConfigError(f"tensor {tensor} is a vector in {stored.type}: no converter writes that")
        rows = stored.shape[0]
        moved = known.moved(tensor, rows, heads, kv_heads)
        if moved and moved[0] * moved[1] * moved[2] * moved[3] != rows:
            raise ConfigError(f"tensor {tensor} has {rows} rows, which are no {heads} heads (read: {kv_heads})")
        width = stored.nbytes // rows
        part = {"name": tensor, "dtype": "U8", "shape": [rows, width], "file": stored.file}
        packed = {
            "form": "ggml",
            "called": stored.type,
            "parts": {"data": part},
            "settings": {
                "type": stored.type,
                "shape": [*stored.shape],
                "moved": moved,
                "added": known.added(tensor),
            },
        }
        info = TensorInfo(PLAIN.get(stored.type, "F32"), stored.shape, stored.offset)
        found[named] = info, packed  # type: ignore[assignment]
    return found


def rows(parts: StoredParts, settings: JsonObject, start: int, stop: int) -> np.ndarray:
    """Return rows of a tensor in the checkpoint's order, without the constant that the converter added."""
    shape, wanted = settings["shape"], _order(tuple(settings["moved"]), settings["shape"][0])
    if wanted is None:
        data = parts.rows("data", start, stop)
    else:
        taken = wanted[start:stop]
        first, last = int(taken.min()), int(taken.max()) + 1
        # The rows of a head are together; those of fused matrices are all over it, which is then read at once.
        near = last - first <= 2 * len(taken)
        data = parts.rows("data", first, last)[taken - first] if near else parts.whole("data")[taken]
    values = dequantized(data, settings["type"]).reshape(stop - start, *shape[1:])
    return values - values.dtype.type(settings["added"]) if settings["added"] else values


def dequantized(data: np.ndarray, kind: str) -> np.ndarray:
    """Return the values of rows of blocks (uint8 [n, bytes]), float32 but for what is stored in another dtype."""
    if kind in DTYPES:
        return np.ascontiguousarray(data).view(DTYPES[kind])
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    values: np.ndarray = dequantize(np.ascontiguousarray(data), GGMLQuantizationType[kind])
    return values


@functools.lru_cache(maxsize=64)
def _order(moved: tuple[int, ...], count: int) -> np.ndarray | None:
    """Return the file's row of each of the checkpoint's rows, None where they are the same."""
    if not moved:
        return None
    order: np.ndarray = np.arange(count).reshape(moved).swapaxes(1, 2).reshape(-1)
    return order


def rope_factors(files: Mapping[str, Path], contents: container.Contents) -> list[float]:
    """Return the divisors of the rotary frequencies that the files hold, [] if there are none."""
    stored = contents.tensors.get(ROPE_FACTORS)
    if stored is None:
        return []
    if stored.type != "F32" or len(stored.shape) != 1:
        raise ConfigError(f"tensor {ROPE_FACTORS} is {stored.type} {list(stored.shape)}; expected F32 [pairs]")
    with files[stored.file].open("rb") as file:
        file.seek(stored.offset)
        return [float(value) for value in np.frombuffer(file.read(stored.nbytes), np.float32)]
