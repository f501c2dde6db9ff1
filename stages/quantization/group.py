"""Symmetric group quantization in NumPy: the statement that the compiled kernels equal bit by bit, and their stand-in.

Each run of ``group_size`` values of a row becomes small integers and one scale; docs/quantization.md states the
arithmetic step by step, and where MLC-LLM's own converter differs. Groups with a minimum are in minimum.py.
"""

from __future__ import annotations

from functools import reduce
from typing import TYPE_CHECKING

import numpy as np

from stages.quantization.blocks import UnfitError, row_blocks
from stages.quantization.dtypes import numpy_dtype
from stages.quantization.words import pack, unpack

if TYPE_CHECKING:
    from stages.quantization.rows import Row

# The scales that the error-minimising search tries: these fiftieths of the largest value's, each with both signs.
PARTS = 50
TRIED = range(PARTS, 30, -1)
SEARCHED = ("mse", "importance")  # scales that are those of least squared error
LEAST = 1e-3  # of the mean importance: what each column counts at least


def quantize(
    weight: np.ndarray, row: Row, scales: str = "max", importance: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Quantize ``weight`` [n, k] of a float dtype to (q_weight uint32 [n, words], q_scale [n, groups]).

    ``importance`` [k] is how much an error of each column counts where scales are searched; None: all the same.

    :class:`UnfitError` for a NaN or an infinity in the weight, naming its index, and for a scale that the storage
    dtype cannot hold. Works through blocks of rows: needs little memory beyond the result.
    """
    n, k = weight.shape
    top, size, groups = row.top, row.group_size, row.groups(k)
    padded = groups * size
    q_weight = np.empty((n, row.words(k)), "<u4")
    q_scale = np.empty((n, groups), numpy_dtype(row.scale_dtype))
    for block in row_blocks((n, padded)):
        count = block.stop - block.start
        values = np.empty((count, padded), np.float32)
        values[:, :k] = weight[block]
        values[:, k:] = 0
        by_group = values.reshape(count, groups, size)
        peak = _group_peak(values, size).reshape(count, groups)
        with np.errstate(over="ignore"):
            scale = (peak / np.float32(top)).astype(q_scale.dtype)
        if not np.isfinite(scale.astype(np.float32)).all():
            raise why_not_finite(values, block.start, row)
        if scales == "mse":
            scale = _best_scale(by_group, peak, row)
        elif scales == "importance":
            scale = _weighted_scale(by_group, peak, shares(row, k, importance), row)
        elif scales == "full":
            scale = _full_scale(by_group, row)
        q_scale[block] = scale
        np.divide(by_group, _divisor(scale)[..., None], out=by_group)
        np.rint(values, out=values)
        values += top
        np.clip(values, 0, 2 * top + (scales != "max"), out=values)
        values[:, k:] = 0
        q_weight[block] = pack(values.astype(np.uint8), row.bits)
    return q_weight, q_scale


def dequantize(q_weight: np.ndarray, q_scale: np.ndarray, row: Row, k: int) -> np.ndarray:
    """Return the float32 [n, k] weight that ``q_weight`` and ``q_scale`` stand for."""
    values: np.ndarray = unpack(q_weight, row.bits, k).astype(np.float32)
    values -= row.top
    values *= np.repeat(q_scale.astype(np.float32), row.group_size, axis=1)[:, :k]
    return values


def _divisor(scale: np.ndarray) -> np.ndarray:
    """Return the scales in float32, infinite where they are zero, so that all-zero groups encode 0."""
    divisor: np.ndarray = scale.astype(np.float32)
    divisor[divisor == 0] = np.inf
    return divisor


def _full_scale(groups: np.ndarray, row: Row) -> np.ndarray:
    """Return for each group the scale that takes its largest value, the first of equals, to the code of the longer
    side; its sign is that value's.
    """
    at = np.abs(groups).argmax(axis=-1)
    extreme: np.ndarray = np.take_along_axis(groups, at[..., None], axis=-1)[..., 0]
    return (extreme / np.float32(row.top + 1)).astype(numpy_dtype(row.scale_dtype))


def _best_scale(groups: np.ndarray, peak: np.ndarray, row: Row) -> np.ndarray:
    """Return for each group the tried scale with the least squared error; the first of equals."""
    best = (peak / np.float32(row.top)).astype(numpy_dtype(row.scale_dtype))
    least = np.full(peak.shape, np.inf, np.float32)
    for part in TRIED:
        for sign in (1, -1):
            full = peak * (np.float32(part) / np.float32(PARTS)) / np.float32(row.top)
            scale = (np.float32(sign) * full).astype(best.dtype)
            codes = np.clip(np.rint(groups * (1 / _divisor(scale))[..., None]), -row.top, row.top + 1)
            codes *= -scale.astype(np.float32)[..., None]
            codes += groups
            error = np.einsum("ngi,ngi->ng", codes, codes)
            better = error < least
            best[better], least[better] = scale[better], error[better]
    return best


def shares(row: Row, k: int, importance: np.ndarray | None) -> np.ndarray:
    """Return what the square of an error in each place of a row of ``k`` counts, float32 [groups, size].

    That is ``importance``, of which the mean is one, and no column counts for nothing; 0 behind the end of the row.
    """
    found = np.zeros(row.groups(k) * row.group_size, np.float32)
    found[:k] = 1 if importance is None else np.maximum(importance / max(float(importance.mean()), 1e-30), LEAST)
    return found.reshape(-1, row.group_size)


def _weighted_scale(groups: np.ndarray, peak: np.ndarray, share: np.ndarray, row: Row) -> np.ndarray:
    """Return for each group the scale of least error, squares counted by ``share`` [g, size]: of those that
    :func:`_best_scale` tries, and the least squares through the codes that each gives.
    """
    best = (peak / np.float32(row.top)).astype(numpy_dtype(row.scale_dtype))
    most = np.full(peak.shape, -1, np.float32)  # by how much the sum of squares becomes less
    smallest = peak * np.float32(TRIED[-1] / PARTS / row.top)
    for part in TRIED:
        for sign in (1, -1):
            scale = peak * np.float32(sign * part / PARTS / row.top)
            codes = np.clip(np.rint(groups * (1 / _divisor(scale))[..., None]), -row.top, row.top + 1)
            counted = codes * share
            squares = np.einsum("ngi,ngi->ng", counted, codes)
            products = np.einsum("ngi,ngi->ng", counted, groups)
            squares[squares == 0] = np.inf
            found, fitted = products * products / squares, products / squares
            better = (found > most) & (np.abs(fitted) >= smallest)
            best[better], most[better] = fitted[better].astype(best.dtype), found[better]
    return best


def _group_peak(rows: np.ndarray, group_size: int) -> np.ndarray:
    """Return the largest |value| of each group, flat.

    Pairwise, because NumPy's own reduction over an axis this short takes six times as long.
    """
    peak: np.ndarray = np.abs(rows).reshape(-1)
    while group_size % 2 == 0:
        peak = np.maximum(peak[0::2], peak[1::2])
        group_size //= 2
    return reduce(np.maximum, (peak[i::group_size] for i in range(group_size)))


def why_not_finite(values: np.ndarray, start: int, row: Row) -> UnfitError:
    """Say which of ``values``, rows from number ``start`` on, is no number or too large for its group's scale."""
    bad = np.argwhere(~np.isfinite(values))
    at, column = bad[0] if len(bad) else np.unravel_index(np.abs(values).argmax(), values.shape)
    reason = f": its group's scale does not fit {row.scale_dtype}"
    return UnfitError([start + int(at), int(column)], float(values[at, column]), reason)
