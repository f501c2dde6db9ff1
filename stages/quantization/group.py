"""Symmetric group quantization: each run of ``group_size`` values of a row becomes small integers and one scale.

The arithmetic, for a weight ``w`` of shape [n, k], group size g and b bits (4: ``top`` = 7, 8 codes a word):

1. ``w`` is taken to float32 exactly (from bfloat16, float16 or float32); everything below is float32.
2. ``scale = max(|w| over the group) / top``, then rounded to the scheme's storage dtype (half to even). The last
   group of a row may be short. This rounded scale is what is stored and what divides.
3. ``code = clip(rint(w / scale) + top, 0, 2 * top)``, rint rounding half to even. A group whose stored scale is zero
   (all zeros, or too small for the storage dtype) gets ``code = top``, that is zero.
4. Eight codes make one uint32, code i of the row in bits 4 * (i % 8) of word i // 8: low bits first. Codes past the
   end of the row are 0. Rows keep their order: q_weight [n, ceil(k/8)], q_scale [n, ceil(k/g)] (layout NK).
5. Dequantization: ``(code - top) * scale``.

Where MLC-LLM's own converter differs: for float16 schemes it does all of this in float16, and rounds after adding
``top``: ``round(w / scale + 7)``. The quotient plus 7 then has a step of up to 1/128, so values near the middle
between two codes fall to the other one. The format is the same; a few packed words in a hundred differ, each in a
code by one (3.6 % for normally distributed bfloat16 weights). For float32 schemes only exact ties and last bits can.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from stages.quantization.blocks import row_blocks

if TYPE_CHECKING:
    from stages.quantization.schemes import Scheme


def quantize(weight: np.ndarray, scheme: Scheme) -> tuple[np.ndarray, np.ndarray]:
    """Quantize ``weight`` [n, k] of a float dtype to (q_weight uint32 [n, ceil(k/8)], q_scale [n, ceil(k/g)]).

    :class:`ValueError` for a NaN or an infinity in the weight, naming its index, and for a scale that the storage
    dtype cannot hold. Works through blocks of rows: needs little memory beyond the result.
    """
    n, k = weight.shape
    top, per_word = 2 ** (scheme.bits - 1) - 1, 32 // scheme.bits
    groups = -(-k // scheme.group_size)
    words, padded = -(-k // per_word), groups * scheme.group_size
    q_weight = np.empty((n, words), "<u4")
    q_scale = np.empty((n, groups), scheme.storage_dtype)
    for block in row_blocks((n, padded)):
        size = block.stop - block.start
        rows = np.empty((size, padded), np.float32)
        rows[:, :k] = weight[block]
        rows[:, k:] = 0
        by_group = rows.reshape(size, groups, scheme.group_size)
        peak = _group_peak(rows, scheme.group_size).reshape(size, groups)
        with np.errstate(over="ignore"):
            scale = (peak / np.float32(top)).astype(scheme.storage_dtype)
        if not np.isfinite(scale).all():
            raise ValueError(_why_not_finite(rows, block.start, scheme))
        q_scale[block] = scale
        divisor = scale.astype(np.float32)
        divisor[divisor == 0] = np.inf  # makes every code of the group the one of zero
        np.divide(by_group, divisor[..., None], out=by_group)
        np.rint(rows, out=rows)
        rows += top
        np.clip(rows, 0, 2 * top, out=rows)
        rows[:, k:] = 0
        q_weight[block] = _pack(rows.astype(np.uint8), scheme.bits)[:, :words]
    return q_weight, q_scale


def dequantize(q_weight: np.ndarray, q_scale: np.ndarray, scheme: Scheme, k: int) -> np.ndarray:
    """Return the float32 [n, k] weight that ``q_weight`` and ``q_scale`` stand for."""
    top, per_word = 2 ** (scheme.bits - 1) - 1, 32 // scheme.bits
    shifts = np.arange(per_word, dtype=np.uint32) * np.uint32(scheme.bits)
    codes = (q_weight[..., None] >> shifts) & np.uint32(2**scheme.bits - 1)
    values: np.ndarray = codes.reshape(len(q_weight), -1)[:, :k].astype(np.float32)
    values -= top
    values *= np.repeat(q_scale.astype(np.float32), scheme.group_size, axis=1)[:, :k]
    return values


def _group_peak(rows: np.ndarray, group_size: int) -> np.ndarray:
    """Return the largest |value| of each group, flat; ``group_size`` is a power of two.

    Pairwise, because NumPy's own reduction over an axis this short takes six times as long.
    """
    peak: np.ndarray = np.abs(rows).reshape(-1)
    while group_size > 1:
        peak = np.maximum(peak[0::2], peak[1::2])
        group_size //= 2
    return peak


def _pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack uint8 codes [n, m] into uint32 words, low bits first; m is a multiple of a word's codes."""
    while bits < 8:
        codes = codes[:, 0::2] | (codes[:, 1::2] << bits)
        bits *= 2
    words: np.ndarray = np.ascontiguousarray(codes).view("<u4")
    return words


def _why_not_finite(rows: np.ndarray, start: int, scheme: Scheme) -> str:
    bad = np.argwhere(~np.isfinite(rows))
    if len(bad):
        row, column = map(int, bad[0])
        return f"the value at [{start + row}, {column}] is {rows[row, column]}"
    row, column = map(int, np.unravel_index(np.abs(rows).argmax(), rows.shape))
    return (
        f"the value at [{start + row}, {column}] is {rows[row, column]:g}: "
        f"its group's scale does not fit {scheme.storage_dtype}"
    )
