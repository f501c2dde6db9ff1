"""float8: a weight becomes float8_e4m3fn values and one float32 scale, as MLC-LLM's e4m3 weights are, or one for each
group of a row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

from stages.quantization.blocks import UnfitError, row_blocks

if TYPE_CHECKING:
    from stages.quantization.rows import Row

LARGEST = 448.0  # of float8_e4m3fn
LEAST_SCALE = 1 / (LARGEST * 512)
# What the largest value of a group may have been stored as: every fraction, with the exponent that leaves most room.
LARGEST_CODES = (448, 416, 384, 352, 320, 288, 256, 240)
PROBED = 8  # values of a group that tell most scales apart
TINY = np.finfo(np.float32).tiny  # a group's scale below this is zero: a quotient might be too large for a code


def quantize(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quantize ``weight`` [n, k] of a float dtype to (float8_e4m3fn [n, k], float32 [1]).

    :class:`UnfitError` for a NaN or an infinity in the weight, naming its index.
    """
    peak = np.float32(0)
    for block in row_blocks(weight.shape):
        rows = weight[block].astype(np.float32)
        if not np.isfinite(rows).all():
            raise _not_finite(rows, block.start)
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


def quantize_groups(weight: np.ndarray, row: Row) -> tuple[np.ndarray, np.ndarray]:
    """Quantize ``weight`` [n, k] of a float dtype to (float8_e4m3fn [n, k], float32 [n, groups]).

    Values that are such codes times a scale for each group, row or block of whole groups, as FP8 checkpoints hold them,
    are stored exactly. :class:`UnfitError` as :func:`quantize`.
    """
    n, k = weight.shape
    size, groups = row.group_size, row.groups(k)
    codes, scales = np.empty((n, k), ml_dtypes.float8_e4m3fn), np.empty((n, groups), np.float32)
    for block in row_blocks((n, groups * size)):
        values = np.zeros((block.stop - block.start, groups * size), np.float32)
        values[:, :k] = weight[block]
        if not np.isfinite(values).all():
            raise _not_finite(values, block.start)
        by_group = values.reshape(-1, size)
        scale = _scales(by_group)
        scales[block] = scale.reshape(-1, groups)
        by_group /= _divisor(scale)
        codes[block] = values[:, :k]
    return codes, scales


def dequantize_groups(q_weight: np.ndarray, q_scale: np.ndarray, row: Row) -> np.ndarray:
    """Return the float32 weight [n, k] that ``q_weight`` and ``q_scale``, or some of their rows, stand for."""
    values: np.ndarray = q_weight.astype(np.float32)
    values *= np.repeat(q_scale, row.group_size, axis=1)[:, : values.shape[1]]
    return values


def _scales(groups: np.ndarray) -> np.ndarray:
    """Return the scale of each of ``groups`` [g, size]: one with which it is stored exactly, else that which takes its
    largest value to the largest code.
    """
    peak = np.abs(groups).max(axis=-1)
    found: np.ndarray = peak / np.float32(LARGEST)
    found[found < TINY] = 0
    left = np.flatnonzero(found)
    for code in LARGEST_CODES:
        quotient = peak / np.float32(code)
        for tried in (quotient, np.nextafter(quotient, np.float32(0)), np.nextafter(quotient, np.float32(np.inf))):
            likely = left[_holds(groups[left, :PROBED], tried[left])]
            exact = likely[_holds(groups[likely], tried[likely])]
            found[exact] = tried[exact]
            left = np.setdiff1d(left, exact, assume_unique=True)
    return found


def _holds(groups: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Say of each of ``groups`` [g, size] whether codes times its ``scale`` [g] are exactly its values."""
    codes = (groups / _divisor(scale)).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    codes *= scale[:, None]
    exact: np.ndarray = (codes == groups).all(axis=-1)
    return exact


def _divisor(scale: np.ndarray) -> np.ndarray:
    """Return ``scale`` [g] as a column, infinite where it is zero, so that codes are zero there."""
    found: np.ndarray = np.where(scale > 0, scale, np.float32(np.inf))[:, None]
    return found


def _not_finite(rows: np.ndarray, start: int) -> UnfitError:
    row, column = np.argwhere(~np.isfinite(rows))[0]
    return UnfitError([start + int(row), int(column)], float(rows[row, column]))
