"""Group quantization with a minimum in NumPy: a group is ``code * scale + minimum``, codes from 0 up.

For weights that do not lie around zero, and those that come from such a form (ggml's Q4_1). docs/quantization.md states
the arithmetic step by step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from stages.quantization.blocks import row_blocks
from stages.quantization.dtypes import numpy_dtype
from stages.quantization.group import why_not_finite
from stages.quantization.words import pack, unpack

if TYPE_CHECKING:
    from stages.quantization.rows import Row

# By how many tenths of a step less or more than the largest code the range is taken to hold, where that is searched.
TRIED = range(-10, 11)


def quantize(weight: np.ndarray, row: Row, scales: str = "max") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Quantize ``weight`` [n, k] of a float dtype to (q_weight uint32 [n, words], q_scale and q_min [n, groups]).

    :class:`UnfitError` as :func:`.group.quantize`.
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
        if scales == "mse":
            inside = (np.arange(padded) < k).astype(np.float32).reshape(groups, size)
            scale, least = best(by_group, inside, (scale, least), row.most)
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
    groups: np.ndarray, inside: np.ndarray, plain: tuple[np.ndarray, np.ndarray], most: int, highest: float = np.inf
) -> tuple[np.ndarray, np.ndarray]:
    """Return for each group the scale and minimum of least squared error of those tried; the first of equals.

    Tried are ``plain`` and, for each division of the range into steps, the least squares through the codes that it
    gives, as ggml's make_qkx2_quants has it. ``inside`` [g, size] is 0 behind the end of a short last group, else 1. No
    minimum is above ``highest``.
    """
    low, high, size = groups.min(axis=-1), groups.max(axis=-1), inside.sum(axis=-1)
    scale, least = (each.copy() for each in plain)
    error = _error(groups, inside, _codes(groups, scale, least, most), scale, least)
    above = (groups - low[..., None]) * inside  # near zero, where float32 sums are exact enough
    total = above.sum(axis=-1)
    width = np.where(high > low, high - low, np.float32(np.inf))
    for step in TRIED:
        codes = np.clip(np.rint(above * ((np.float32(most) + np.float32(step) / 10) / width)[..., None]), 0, most)
        count, squares = codes.sum(axis=-1), np.einsum("ngi,ngi->ng", codes, codes)
        products = np.einsum("ngi,ngi->ng", codes, above)
        apart = size * squares - count * count
        apart = np.where(apart > 0, apart, np.float32(np.inf))
        with np.errstate(over="ignore", invalid="ignore"):  # what does not fit is never better
            slope = ((size * products - total * count) / apart).astype(scale.dtype)
            begin = np.minimum((squares * total - count * products) / apart + low, highest).astype(scale.dtype)
            found = _error(groups, inside, codes, slope, begin)
        better = found < error
        scale[better], least[better], error[better] = slope[better], begin[better], found[better]
    return scale, least


def _error(
    groups: np.ndarray, inside: np.ndarray, codes: np.ndarray, scale: np.ndarray, least: np.ndarray
) -> np.ndarray:
    """Return the squared error of each group."""
    rest = codes * scale.astype(np.float32)[..., None]
    rest += least.astype(np.float32)[..., None]
    rest -= groups
    rest *= inside
    found: np.ndarray = np.einsum("ngi,ngi->ng", rest, rest)
    return found
