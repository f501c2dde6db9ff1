"""Symmetric group quantization in NumPy: the statement that the compiled kernels equal bit by bit, and their stand-in.

Each run of ``group_size`` values of a row becomes small integers and one scale; docs/quantization.md states the
arithmetic step by step, and where MLC-LLM's own converter differs.
"""

from __future__ import annotations

from functools import reduce
from typing import TYPE_CHECKING

import numpy as np

from stages.quantization.blocks import UnfitError, row_blocks
from stages.quantization.dtypes import numpy_dtype

if TYPE_CHECKING:
    from stages.quantization.schemes import Scheme

# The scales that the error-minimising search tries: these fiftieths of the largest value's, each with both signs.
PARTS = 50
TRIED = range(PARTS, 30, -1)


def quantize(weight: np.ndarray, scheme: Scheme, scales: str = "max") -> tuple[np.ndarray, np.ndarray]:
    """Quantize ``weight`` [n, k] of a float dtype to (q_weight uint32 [n, words], q_scale [n, groups]).

    :class:`UnfitError` for a NaN or an infinity in the weight, naming its index, and for a scale that the storage
    dtype cannot hold. Works through blocks of rows: needs little memory beyond the result.
    """
    n, k = weight.shape
    top, size, groups = scheme.top, scheme.group_size, scheme.groups(k)
    padded = groups * size
    q_weight = np.empty((n, scheme.words(k)), "<u4")
    q_scale = np.empty((n, groups), numpy_dtype(scheme.storage_dtype))
    for block in row_blocks((n, padded)):
        count = block.stop - block.start
        rows = np.empty((count, padded), np.float32)
        rows[:, :k] = weight[block]
        rows[:, k:] = 0
        by_group = rows.reshape(count, groups, size)
        peak = _group_peak(rows, size).reshape(count, groups)
        with np.errstate(over="ignore"):
            scale = (peak / np.float32(top)).astype(q_scale.dtype)
        if not np.isfinite(scale.astype(np.float32)).all():
            raise _why_not_finite(rows, block.start, scheme)
        if scales == "mse":
            scale = _best_scale(by_group, peak, scheme)
        q_scale[block] = scale
        np.divide(by_group, _divisor(scale)[..., None], out=by_group)
        np.rint(rows, out=rows)
        rows += top
        np.clip(rows, 0, 2 * top + (scales == "mse"), out=rows)
        rows[:, k:] = 0
        q_weight[block] = _pack(rows.astype(np.uint8), scheme)
    return q_weight, q_scale


def dequantize(q_weight: np.ndarray, q_scale: np.ndarray, scheme: Scheme, k: int) -> np.ndarray:
    """Return the float32 [n, k] weight that ``q_weight`` and ``q_scale`` stand for."""
    shifts = np.arange(scheme.per_word, dtype=np.uint32) * np.uint32(scheme.bits)
    codes = (q_weight[..., None] >> shifts) & np.uint32(2**scheme.bits - 1)
    values: np.ndarray = codes.reshape(len(q_weight), -1)[:, :k].astype(np.float32)
    values -= scheme.top
    values *= np.repeat(q_scale.astype(np.float32), scheme.group_size, axis=1)[:, :k]
    return values


def _divisor(scale: np.ndarray) -> np.ndarray:
    """Return the scales in float32, infinite where they are zero, so that all-zero groups encode 0."""
    divisor: np.ndarray = scale.astype(np.float32)
    divisor[divisor == 0] = np.inf
    return divisor


def _best_scale(groups: np.ndarray, peak: np.ndarray, scheme: Scheme) -> np.ndarray:
    """Return for each group the tried scale with the least squared error; the first of equals."""
    best = (peak / np.float32(scheme.top)).astype(numpy_dtype(scheme.storage_dtype))
    least = np.full(peak.shape, np.inf, np.float32)
    for part in TRIED:
        for sign in (1, -1):
            full = peak * (np.float32(part) / np.float32(PARTS)) / np.float32(scheme.top)
            scale = (np.float32(sign) * full).astype(best.dtype)
            codes = np.clip(np.rint(groups * (1 / _divisor(scale))[..., None]), -scheme.top, scheme.top + 1)
            codes *= -scale.astype(np.float32)[..., None]
            codes += groups
            error = np.einsum("ngi,ngi->ng", codes, codes)
            better = error < least
            best[better], least[better] = scale[better], error[better]
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


def _pack(codes: np.ndarray, scheme: Scheme) -> np.ndarray:
    """Pack uint8 codes [n, m] into uint32 words, low bits first; m is a multiple of a word's codes."""
    if 32 % scheme.bits:
        by_word = codes.reshape(len(codes), -1, scheme.per_word).astype(np.uint32)
        return reduce(np.bitwise_or, (by_word[..., i] << (i * scheme.bits) for i in range(scheme.per_word)))
    bits = scheme.bits
    while bits < 8:
        codes = codes[:, 0::2] | (codes[:, 1::2] << bits)
        bits *= 2
    words: np.ndarray = np.ascontiguousarray(codes).view("<u4")
    return words


def _why_not_finite(rows: np.ndarray, start: int, scheme: Scheme) -> UnfitError:
    bad = np.argwhere(~np.isfinite(rows))
    row, column = bad[0] if len(bad) else np.unravel_index(np.abs(rows).argmax(), rows.shape)
    reason = f": its group's scale does not fit {scheme.storage_dtype}"
    return UnfitError([start + int(row), int(column)], float(rows[row, column]), reason)
