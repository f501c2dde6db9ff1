"""Per-tensor float8: a weight becomes float8_e4m3fn values and one float32 scale, as MLC-LLM's e4m3 weights are."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from stages.quantization.blocks import UnfitError, row_blocks

LARGEST = 448.0  # of float8_e4m3fn
LEAST_SCALE = 1 / (LARGEST * 512)


def quantize(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quantize ``weight`` [n, k] of a float dtype to (float8_e4m3fn [n, k], float32 [1]).

    :class:`UnfitError` for a NaN or an infinity in the weight, naming its index.
    """
    peak = np.float32(0)
    for block in row_blocks(weight.shape):
        rows = weight[block].astype(np.float32)
        if not np.isfinite(rows).all():
            row, column = np.argwhere(~np.isfinite(rows))[0]
            raise UnfitError([block.start + row, column], float(rows[row, column]))
        peak = max(peak, np.abs(rows).max(initial=0))
    scale = np.maximum(peak / np.float32(LARGEST), np.float32(LEAST_SCALE))
    values = np.empty(weight.shape, ml_dtypes.float8_e4m3fn)
    for block in row_blocks(weight.shape):
        values[block] = weight[block].astype(np.float32) / scale
    return values, np.array([scale], np.float32)


def dequantize(q_weight: np.ndarray, q_scale: np.ndarray) -> np.ndarray:
    """Return the float32 weight that ``q_weight`` and ``q_scale`` stand for."""
    values: np.ndarray = q_weight.astype(np.float32) * q_scale
    return values
