"""Group quantization in two levels in NumPy: scale and minimum of a group are integers that several groups have a
float each for.

From 4 bits on the form of ggml's Q4_K, but for the last block of a row, of up to fifteen groups: a value is
``code * (d * scale) - m * minimum``. With fewer bits levels have four, and a block is 16 groups and more.
docs/quantization.md states the bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from stages.quantization.blocks import row_blocks
from stages.quantization.dtypes import numpy_dtype
from stages.quantization.group import SEARCHED, shares, why_not_finite
from stages.quantization.minimum import best
from stages.quantization.words import pack, pack_planes, unpack, unpack_planes
from stages.sizes import LEVEL_BITS, LEVELED, LEVELS_PER_WORD, SHARING, level_blocks, level_words

if TYPE_CHECKING:
    from stages.quantization.rows import Row

# Bits of a level -> levels that the largest of a block may have: the first one unless scales are searched.
TOPS = {4: range(15, 11, -1), 6: range(63, 55, -1)}
WIDTH = 6  # bits of a longer level; the last of 16 is in what three words of five have left


def quantize(
    weight: np.ndarray, row: Row, scales: str = "max", importance: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Quantize ``weight`` [n, k] of a float dtype to (q_weight uint32 [n, words], q_scale uint32 [n, levels], q_outer
    [n, 2 * blocks]), as ``row.stored`` has it.

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
        share = shares(row, k, importance)
        if scales in SEARCHED:
            scale, least = best(by_group, share, (scale, least), row.most, highest=0)
        of_scale = _levels(scale, q_outer.dtype, row, scales)
        if scales in SEARCHED:
            least = _refitted(by_group, share, _worth(*of_scale, row), least, row.most)
        of_least = _levels(-least, q_outer.dtype, row, scales)
        wholes, integers = zip(of_scale, of_least, strict=True)
        q_outer[block] = np.stack(wholes, axis=-1).reshape(count, -1)
        if not np.isfinite(q_outer[block].astype(np.float32)).all():
            raise why_not_finite(values, block.start, row)
        q_scale[block] = pack_levels(*integers, row.bits)
        step, low = (_worth(*each, row)[..., None] for each in (of_scale, of_least))
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
    of_groups = steps_of_groups(q_scale, q_outer, row, row.groups(k))
    step, low = (np.repeat(each, row.group_size, axis=1)[:, :k] for each in of_groups)
    return step, low


def steps_of_groups(q_scale: np.ndarray, q_outer: np.ndarray, row: Row, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Return what a code of each group is worth, and what is taken from it, float32 [n, groups] each."""
    floats = q_outer.astype(np.float32).reshape(len(q_outer), -1, 2)
    levels = unpack_levels(q_scale, groups, row.bits)
    step, low = (_worth(floats[..., which], levels[which].astype(np.float32), row) for which in (0, 1))
    return step, low


def place(groups: int, row: Row) -> tuple[np.ndarray, np.ndarray]:
    """Return of each group the block that it is in, and its place there: groups that fill none join the last one."""
    number = np.arange(groups)
    block = np.minimum(number // SHARING[row.bits], level_blocks(groups, row.bits) - 1)
    return block, number - block * SHARING[row.bits]


def _levels(values: np.ndarray, dtype: np.dtype, row: Row, scales: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the floats [n, blocks] of ``dtype`` and the levels [n, groups] that stand for ``values`` [n, groups]: the
    largest of a block has the one of :data:`TOPS` as its level with which the block is off by the least squares.
    """
    tops = TOPS[LEVEL_BITS[row.bits]]
    block, within = place(values.shape[1], row)
    by_block = np.zeros((len(values), block[-1] + 1, within.max() + 1), np.float32)
    by_block[:, block, within] = values
    most, least = by_block.max(axis=-1), np.full(by_block.shape[:2], np.inf, np.float32)
    best, levels = np.empty(least.shape, dtype), np.zeros_like(by_block)
    for top in tops if scales in SEARCHED else tops[:1]:
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused
            whole = (most / np.float32(top)).astype(dtype)
            divisor = np.where(whole > 0, whole.astype(np.float32), np.float32(np.inf))
            found = np.clip(np.nan_to_num(np.rint(by_block / divisor[..., None])), 0, tops[0])
            error = np.square(found * whole.astype(np.float32)[..., None] - by_block).sum(axis=-1)
        better = ~(error >= least)  # where it is no number, too
        best[better], levels[better], least[better] = whole[better], found[better], error[better]
    return best, levels[:, block, within]


def _worth(whole: np.ndarray, levels: np.ndarray, row: Row) -> np.ndarray:
    """Return what ``levels`` [n, groups] of floats ``whole`` [n, blocks] stand for, float32 [n, groups]."""
    found: np.ndarray = whole.astype(np.float32)[:, place(levels.shape[1], row)[0]] * levels
    return found


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


def pack_levels(scales: np.ndarray, minima: np.ndarray, bits: int) -> np.ndarray:
    """Pack levels [n, groups] of a row with codes of ``bits`` into uint32 [n, words].

    Of four bits, a byte holds those of a group, the scale's in its lower half. Of six, five are a word, from the lowest
    on: of eight groups, scales first, three words hold the 16 levels, bits 2 * i and 2 * i + 1 of the last one are the
    highest of word i.
    """
    n, groups = scales.shape
    if LEVEL_BITS[bits] == 4:
        each = np.zeros((n, 4 * level_words(groups, bits)), np.uint8)
        each[:, :groups] = scales.astype(np.uint8) | minima.astype(np.uint8) << 4
        return pack(each, 8)
    eights = groups // LEVELED * LEVELED
    whole = [each[:, :eights].reshape(n, -1, LEVELED) for each in (scales, minima)]
    levels = np.concatenate(whole, axis=-1).astype(np.uint32)
    words = _in_words(levels[..., :-1])
    words |= ((levels[..., -1:] >> np.arange(0, WIDTH, 2, dtype=np.uint32)) & np.uint32(3)) << np.uint32(30)
    rest = _in_words(np.concatenate([scales[:, eights:], minima[:, eights:]], axis=-1).astype(np.uint32))
    return np.concatenate([words.reshape(n, -1), rest], axis=-1)


def _in_words(levels: np.ndarray) -> np.ndarray:
    """Return uint32 levels [..., m] in words, the first in the lowest bits."""
    words = np.zeros((*levels.shape[:-1], -(-levels.shape[-1] // LEVELS_PER_WORD)), np.uint32)
    for place in range(LEVELS_PER_WORD):
        each = levels[..., place::LEVELS_PER_WORD]
        words[..., : each.shape[-1]] |= each << np.uint32(WIDTH * place)
    return words


def _of_words(words: np.ndarray) -> np.ndarray:
    """Undo :func:`_in_words`, for as many levels as words can hold."""
    shifts = np.arange(LEVELS_PER_WORD, dtype=np.uint32) * np.uint32(WIDTH)
    levels = (words[..., None] >> shifts) & np.uint32((1 << WIDTH) - 1)
    flat: np.ndarray = levels.reshape(*words.shape[:-1], words.shape[-1] * LEVELS_PER_WORD)
    return flat


def unpack_levels(words: np.ndarray, groups: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Undo :func:`pack_levels`: the levels of scales and of minima, uint32 [n, groups] each."""
    if LEVEL_BITS[bits] == 4:
        each = unpack(words, 8, groups)
        return each & 15, each >> 4
    n, (whole, rest) = len(words), divmod(groups, LEVELED)
    eights = words[:, : level_words(groups - rest, bits)].reshape(n, whole, 3)
    last = ((eights >> np.uint32(30)) << np.arange(0, WIDTH, 2, dtype=np.uint32)).sum(axis=-1, dtype=np.uint32)
    levels = np.concatenate([_of_words(eights), last[..., None]], axis=-1).reshape(n, whole, 2, LEVELED)
    left = _of_words(words[:, level_words(groups - rest, bits) :])[:, : 2 * rest].reshape(n, 2, rest)
    scales, minima = (np.concatenate([levels[:, :, which].reshape(n, -1), left[:, which]], axis=-1) for which in (0, 1))
    return scales, minima
