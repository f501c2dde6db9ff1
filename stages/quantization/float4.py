"""MXFP4: groups of 4-bit floats (e2m1) with a power of two for each, as the OCP Microscaling formats specify it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

from stages.quantization.blocks import row_blocks
from stages.quantization.group import why_not_finite
from stages.quantization.words import pack, unpack
from stages.sizes import FLOAT4

if TYPE_CHECKING:
    from stages.quantization.rows import Row

VALUES = np.array(FLOAT4, np.float32)  # of each code
BIAS = 127  # of the exponents that are stored
LEAST = -120  # exponent of the smallest values that are kept: kernels compute with normal float32 numbers


def quantize(weight: np.ndarray, row: Row) -> tuple[np.ndarray, np.ndarray]:
    """Quantize ``weight`` [n, k] of a float dtype to (q_weight uint32 [n, words], q_scale uint8 [n, groups]).

    A group's exponent is that with which its largest value becomes a code of 4 to 8, or the next larger one if the
    squared error is less; the former stores what was MXFP4 exactly. Codes are rounded half to even.
    :class:`~stages.quantization.blocks.UnfitError` for a NaN or an infinity in the weight, naming its index.
    """
    n, k = weight.shape
    size, groups = row.group_size, row.groups(k)
    q_weight, q_scale = np.empty((n, row.words(k)), "<u4"), np.empty((n, groups), np.uint8)
    for block in row_blocks((n, groups * size)):
        values = np.zeros((block.stop - block.start, groups * size), np.float32)
        values[:, :k] = weight[block]
        if not np.isfinite(values).all():
            raise why_not_finite(values, block.start, row)
        by_group = values.reshape(-1, groups, size)
        exponents = np.frexp(np.abs(by_group).max(axis=-1))[1] - 3
        kept = exponents >= LEAST
        by_group[~kept] = 0
        codes, error = _coded(by_group, exponents)
        larger = np.zeros(error.shape, bool)
        if error.any():
            others, more = _coded(by_group, exponents + 1)
            larger = 4 * more < error  # each in squares of its own unit
            codes = np.where(larger[..., None], others, codes)
        q_scale[block] = np.where(kept, exponents + larger + BIAS, 0)
        q_weight[block] = pack(codes.reshape(len(values), -1), row.bits)
    return q_weight, q_scale


def dequantize(q_weight: np.ndarray, q_scale: np.ndarray, row: Row, k: int) -> np.ndarray:
    """Return the float32 weight [n, k] that ``q_weight`` and ``q_scale``, or some of their rows, stand for."""
    exponents = np.repeat(q_scale.astype(np.int32) - BIAS, row.group_size, axis=1)[:, :k]
    values: np.ndarray = np.ldexp(VALUES[unpack(q_weight, row.bits, k)], exponents)
    return values


def _coded(groups: np.ndarray, exponents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return codes uint8 of ``groups`` [n, g, size] with ``exponents`` [n, g], and the squared error of each group, in
    units of its exponent.
    """
    scaled = np.ldexp(groups, -exponents[..., None])
    codes = np.clip(scaled, -6, 6).astype(ml_dtypes.float4_e2m1fn).view(np.uint8) & 15
    scaled -= VALUES[codes]
    return codes, np.einsum("ngi,ngi->ng", scaled, scaled)
