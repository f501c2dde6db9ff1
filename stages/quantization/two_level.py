"""Group quantization in two levels in NumPy: scale and minimum of a group are integers that eight groups have a float
each for.

The form of ggml's Q4_K, in 2 to 6 bits, but for the last groups of a row, of which there may be fewer than eight: a
value is ``code * (d * scale) - m * minimum``. docs/quantization.md states the bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from stages.quantization.blocks import row_blocks
from stages.quantization.dtypes import numpy_dtype
from stages.quantization.group import SEARCHED, shares, why_not_finite
from stages.quantization.minimum import best
from stages.quantization.words import pack_planes, unpack_planes
from stages.sizes import LEVELED

if TYPE_CHECKING:
    from collections.abc import Iterable

    from stages.quantization.rows import Row

TOP = 63  # the largest level
TOPS = range(TOP, 55, -1)  # levels of the largest of eight that are tried where scales are searched
PER_WORD, WIDTH = 5, 6  # levels in a word, and the bits of each; the last of 16 is in what three words have left


def quantize(
    weight: np.ndarray, row: Row, scales: str = "max", importance: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Quantize ``weight`` [n, k] of a float dtype to (q_weight uint32 [n, words], q_scale uint32 [n, 3 * outer],
    q_outer [n, 2 * outer]), outer being eighths of the groups, rounded up.

    ``importance`` and :class:`UnfitError` as :func:`.group.quantize`.
    """
    n, k = weight.shape
    (_, words, _), (_, levels, _), (_, outer, dtype) = row.stored(n, k)
    size, groups, padded = row.group_size, row.groups(k), row.groups(k) * row.group_size
    q_weight, q_scale, q_outer = np.empty(words, "<u4"), np.empty(levels, "<u4"), np.empty(outer, numpy_dtype(dtype))
    for block in row_blocks((n, padded)):
        count = block.stop - block.start
        values = np.empty((count, padded), np.float32)
        values[:, :k] = weight[block]
        values[:, k:] = values[:, k - 1 : k]
        by_group = values.reshape(count, groups, size)
        with np.errstate(over="ignore", invalid="ignore"):
            least = np.minimum(by_group.min(axis=-1), np.float32(0))
            scale = (by_group.max(axis=-1) - least) / np.float32(row.most)
        share, tops = shares(row, k, importance), TOPS if scales in SEARCHED else TOPS[:1]
        if scales in SEARCHED:
            scale, least = best(by_group, share, (scale, least), row.most, highest=0)
        of_scale = _levels(scale, outer[1] // 2, q_outer.dtype, tops)
        if scales in SEARCHED:
            least = _refitted(by_group, share, _worth(*of_scale)[:, :groups], least, row.most)
        of_least = _levels(-least, outer[1] // 2, q_outer.dtype, tops)
        wholes, integers = zip(of_scale, of_least, strict=True)
        q_outer[block] = np.stack(wholes, axis=-1).reshape(count, -1)
        if not np.isfinite(q_outer[block].astype(np.float32)).all():
            raise why_not_finite(values, block.start, row)
        q_scale[block] = pack_levels(np.concatenate(integers, axis=-1))
        step, low = (_worth(*each)[:, :groups, None] for each in (of_scale, of_least))
        codes = (by_group + low) / np.where(step > 0, step, np.float32(np.inf))
        codes = np.clip(np.rint(codes, out=codes), 0, row.most, out=codes).reshape(count, padded)
        codes[:, k:] = 0
        q_weight[block] = pack_planes(codes.astype(np.uint8), row.planes, size)
    return q_weight, q_scale, q_outer


def dequantize(q_weight: np.ndarray, q_scale: np.ndarray, q_outer: np.ndarray, row: Row, k: int) -> np.ndarray:
    """Return the float32 [n, k] weight that these stand for."""
    step, low = steps(q_scale, q_outer, row, k)
    values: np.ndarray = unpack_planes(q_weight, row.planes, row.group_size, k).astype(np.float32)
    values *= step
    values -= low
    return values


def steps(q_scale: np.ndarray, q_outer: np.ndarray, row: Row, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return what a code is worth in each place, and what is taken from it, float32 [n, k] each."""
    n = len(q_scale)
    levels = _unpack_levels(q_scale).reshape(n, -1, 2, LEVELED).astype(np.float32)
    levels *= q_outer.astype(np.float32).reshape(n, -1, 2, 1)
    step, low = (np.repeat(levels[:, :, which].reshape(n, -1), row.group_size, axis=1)[:, :k] for which in (0, 1))
    return step, low


def _levels(values: np.ndarray, outer: int, dtype: np.dtype, tops: Iterable[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the floats [n, outer] of ``dtype`` and the levels [n, outer, 8] that stand for ``values`` [n, groups]: the
    largest of eight has the one of ``tops`` as its level with which all eight are off by the least squares.
    """
    n, groups = values.shape
    filled = np.zeros((n, outer * LEVELED), np.float32)
    filled[:, :groups] = values
    by_outer = filled.reshape(n, outer, LEVELED)
    most, least = by_outer.max(axis=-1), np.full(by_outer.shape[:2], np.inf, np.float32)
    best, levels = np.empty(least.shape, dtype), np.zeros_like(by_outer)
    for top in tops:
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused
            whole = (most / np.float32(top)).astype(dtype)
            divisor = np.where(whole > 0, whole.astype(np.float32), np.float32(np.inf))
            found = np.clip(np.nan_to_num(np.rint(by_outer / divisor[..., None])), 0, TOP)
            error = np.square(found * whole.astype(np.float32)[..., None] - by_outer).sum(axis=-1)
        better = ~(error >= least)  # where it is no number, too
        best[better], levels[better], least[better] = whole[better], found[better], error[better]
    return best, levels


def _worth(whole: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Return what ``levels`` [n, outer, 8] of floats ``whole`` [n, outer] stand for, float32 [n, outer * 8]."""
    found: np.ndarray = whole.astype(np.float32)[..., None] * levels
    return found.reshape(len(found), -1)


def _refitted(groups: np.ndarray, share: np.ndarray, step: np.ndarray, least: np.ndarray, most: int) -> np.ndarray:
    """Return the minimum of each of ``groups`` [n, g, size], none above 0, once its scale is ``step`` [n, g]: the least
    squares, counted by ``share`` [g, size], through the codes that ``least`` [n, g] gives.
    """
    divisor = np.where(step > 0, step, np.float32(np.inf))[..., None]
    codes = np.clip(np.rint((groups - least[..., None]) / divisor), 0, most)
    with np.errstate(invalid="ignore"):
        found = np.einsum("ngi,gi->ng", groups - codes * step[..., None], share) / share.sum(axis=-1)
    fitted: np.ndarray = np.minimum(found, 0)
    return fitted


def pack_levels(levels: np.ndarray) -> np.ndarray:
    """Pack levels [n, outer, 16] into uint32 [n, 3 * outer]: 5 to a word, 6 bits each from the lowest; of the last one
    the bits 2 * i and 2 * i + 1 are the highest of word i.
    """
    each = levels.astype(np.uint32)
    last = each[..., -1:]
    words = np.zeros((*each.shape[:-1], 3), np.uint32)
    for place in range(PER_WORD):
        words |= each[..., place:-1:PER_WORD] << np.uint32(WIDTH * place)
    words |= ((last >> np.arange(0, WIDTH, 2, dtype=np.uint32)) & np.uint32(3)) << np.uint32(30)
    return words.reshape(len(each), -1)


def _unpack_levels(words: np.ndarray) -> np.ndarray:
    """Undo :func:`pack_levels`: uint32 [n, outer * 16]."""
    words = words.reshape(len(words), -1, 3)
    shifts = np.arange(PER_WORD, dtype=np.uint32) * np.uint32(WIDTH)
    first = ((words[..., None] >> shifts) & np.uint32(TOP)).reshape(*words.shape[:-1], -1)
    last = ((words >> np.uint32(30)) << np.arange(0, WIDTH, 2, dtype=np.uint32)).sum(axis=-1, dtype=np.uint32)
    return np.concatenate([first, last[..., None]], axis=-1).reshape(len(words), -1)
