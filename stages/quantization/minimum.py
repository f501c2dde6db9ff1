"""Group quantization with a minimum in NumPy: a group is ``code * scale + minimum``, codes from 0 up.

For weights that do not lie around zero, and those that come from such a form (ggml's Q4_1). docs/quantization.md states
the arithmetic step by step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from stages.quantization.blocks import row_blocks
from stages.quantization.dtypes import numpy_dtype
from stages.quantization.group import SEARCHED, shares, why_not_finite
from stages.quantization.words import pack, unpack

if TYPE_CHECKING:
    from stages.quantization.rows import Row

# By how many tenths of a step less or more than the largest code the range is taken to hold, where that is searched.
TRIED = range(-10, 11)
FURTHEST = 2  # steps of the plain scale that a searched one may leave a value off by


def quantize(
    weight: np.ndarray, row: Row, scales: str = "max", importance: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Quantize ``weight`` [n, k] of a float dtype to (q_weight uint32 [n, words], q_scale and q_min [n, groups]).

    ``importance`` and :class:`UnfitError` as :func:`.group.quantize`.
    """
    n, k = weight.shape
    size, groups, dtype = row.group_size, row.groups(k), numpy_dtype(row.scale_dtype)
    padded = groups * size
    q_weight = np.empty((n, row.words(k)), "<u4")
    q_scale, q_min = np.empty((n, groups), dtype), np.empty((n, groups), dtype)
    for block in row_blocks((n, padded)):
        count = block.stop - block.start
        values = np.empty((count, padded), np.float32)
        values[:, :k] = weight[block]
        values[:, k:] = values[:, k - 1 : k]  # no other value than the group has
        by_group = values.reshape(count, groups, size)
        low, high = by_group.min(axis=-1), by_group.max(axis=-1)
        with np.errstate(over="ignore", invalid="ignore"):
            scale, least = ((high - low) / np.float32(row.most)).astype(dtype), low.astype(dtype)
        if not (np.isfinite(scale.astype(np.float32)) & np.isfinite(least.astype(np.float32))).all():
            raise why_not_finite(values, block.start, row)
        if scales in SEARCHED:
            scale, least = best(by_group, shares(row, k, importance), (scale, least), row.most)
        q_scale[block], q_min[block] = scale, least
        codes = _codes(by_group, scale, least, row.most).reshape(count, padded)
        codes[:, k:] = 0
        q_weight[block] = pack(codes.astype(np.uint8), row.bits)
    return q_weight, q_scale, q_min


def dequantize(q_weight: np.ndarray, q_scale: np.ndarray, q_min: np.ndarray, row: Row, k: int) -> np.ndarray:
    """Return the float32 [n, k] weight that these stand for."""
    values: np.ndarray = unpack(q_weight, row.bits, k).astype(np.float32)
    values *= np.repeat(q_scale.astype(np.float32), row.group_size, axis=1)[:, :k]
    values += np.repeat(q_min.astype(np.float32), row.group_size, axis=1)[:, :k]
    return values


def _codes(groups: np.ndarray, scale: np.ndarray, least: np.ndarray, most: int) -> np.ndarray:
    """Return the codes of ``groups`` [n, g, size], as floats; 0 where the scale is zero."""
    divisor: np.ndarray = scale.astype(np.float32)
    divisor[divisor == 0] = np.inf
    codes: np.ndarray = groups - least.astype(np.float32)[..., None]
    codes /= divisor[..., None]
    return np.clip(np.rint(codes, out=codes), 0, most, out=codes)


def best(
    groups: np.ndarray, share: np.ndarray, plain: tuple[np.ndarray, np.ndarray], most: int, highest: float = np.inf
) -> tuple[np.ndarray, np.ndarray]:
    """Return for each group the scale and minimum of least squared error of those tried; the first of equals.

    Tried are ``plain`` and, for each division of the range into steps, the least squares through the codes that it
    gives, as ggml's make_qkx2_quants has it. ``share`` [g, size] is what the square of each error counts, 0 behind the
    end of a short last group. No minimum is above ``highest``. Only scales and minima are taken with which no value is
    off by more than :data:`FURTHEST` of the steps that the range has by itself.
    """
    low, high, size = groups.min(axis=-1), groups.max(axis=-1), share.sum(axis=-1)
    scale, least = (each.copy() for each in plain)
    error, _ = _errors(groups, share, _codes(groups, scale, least, most), scale, least)
    inside = (share > 0).astype(np.float32)
    above = (groups - low[..., None]) * inside  # near zero, where float32 sums are exact enough
    total = np.einsum("ngi,gi->ng", above, share)
    width = np.where(high > low, high - low, np.float32(np.inf))
    allowed = (high - np.minimum(low, highest)) * np.float32(FURTHEST / most)
    for step in TRIED:
        codes = np.clip(np.rint(above * ((np.float32(most) + np.float32(step) / 10) / width)[..., None]), 0, most)
        counted = codes * share
        count, squares = counted.sum(axis=-1), np.einsum("ngi,ngi->ng", counted, codes)
        products = np.einsum("ngi,ngi->ng", counted, above)
        apart = size * squares - count * count
        apart = np.where(apart > 0, apart, np.float32(np.inf))
        with np.errstate(over="ignore", invalid="ignore"):  # what does not fit is never better
            slope = ((size * products - total * count) / apart).astype(scale.dtype)
            begin = np.minimum((squares * total - count * products) / apart + low, highest).astype(scale.dtype)
            found, furthest = _errors(groups, share, codes, slope, begin)
        better = (found < error) & (furthest <= allowed)
        scale[better], least[better], error[better] = slope[better], begin[better], found[better]
    return scale, least


def _errors(
    groups: np.ndarray, share: np.ndarray, codes: np.ndarray, scale: np.ndarray, least: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the squared error of each group, and its largest error."""
    rest = codes * scale.astype(np.float32)[..., None]
    rest += least.astype(np.float32)[..., None]
    rest -= groups
    rest *= share > 0
    furthest = np.abs(rest).max(axis=-1)
    np.square(rest, out=rest)
    found: np.ndarray = np.einsum("ngi,gi->ng", rest, share)
    return found, furthest
