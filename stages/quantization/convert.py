"""One parameter from its values to the tensors stored for it, and the error that makes; compiled kernels or NumPy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from stages.quantization import float8, group
from stages.quantization.blocks import cast, relative_error

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stages.quantization.native import Kernels
    from stages.quantization.schemes import Scheme

ALGORITHM = 1  # raised whenever the same values would be stored as other bytes


@dataclass(frozen=True)
class Converted:
    """What is stored for a parameter, and its relative error: RMSE over root mean square, largest over largest."""

    stored: Sequence[np.ndarray]
    rmse: float
    worst: float


def kernel_names(source: str, scheme: Scheme, scales: str, *, dtypes: Sequence[str]) -> list[str]:
    """Return the kernels that conversions from dtype ``source`` may call; ``dtypes`` of what is not quantized."""
    from stages.quantization.native import cast_name, quantize_name

    quantizing = [quantize_name(source, scheme, scales)] if scheme.kind == "group" else []
    return [*quantizing, *(cast_name(source, dtype) for dtype in dtypes)]


def convert(
    parts: Sequence[np.ndarray], scheme: Scheme, kind: str, *, dtype: str, scales: str, kernels: Kernels | None
) -> Converted:
    """Convert a parameter of ``kind``, made of ``parts`` one under the other; one that the scheme does not quantize is
    cast to ``dtype``.

    :class:`ValueError` for a value that is not finite or does not fit, naming its index. What is stored is the same
    with and without ``kernels``.
    """
    parts = [np.require(part, requirements=("C", "A")) for part in parts]
    quantizes = scheme.quantizes(kind)
    if kernels and quantizes and scheme.kind == "group" and len({part.dtype for part in parts}) == 1:
        done = kernels.quantize(parts, scheme, scales)
        error = done[2].relative() if done else None
        if done and error:
            return Converted(done[:2], *error)
    array = np.concatenate(parts) if len(parts) > 1 else parts[0]
    if not quantizes:
        return _cast(array, dtype, kernels)
    if scheme.kind == "tensor":
        codes, scale = float8.quantize(array)
        error = relative_error(array, lambda rows: float8.dequantize(codes[rows], scale))
        return Converted((codes, scale), *error)
    words, scale = group.quantize(array, scheme, scales)
    error = relative_error(array, lambda rows: group.dequantize(words[rows], scale[rows], scheme, array.shape[1]))
    return Converted((words, scale), *error)


def restored(stored: Sequence[np.ndarray], scheme: Scheme, k: int) -> np.ndarray:
    """Return the float32 weight [n, k] that quantized ``stored`` tensors, or some of their rows, stand for."""
    values, scale = stored
    return float8.dequantize(values, scale) if scheme.kind == "tensor" else group.dequantize(values, scale, scheme, k)


def _cast(array: np.ndarray, dtype: str, kernels: Kernels | None) -> Converted:
    done = kernels.cast(array, dtype) if kernels else None
    stored = done[0] if done else cast(array, dtype)
    error = done[1].relative() if done else None
    return Converted([stored], *(error or relative_error(array, lambda rows: stored[rows].astype(np.float32))))
