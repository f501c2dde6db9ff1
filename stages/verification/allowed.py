"""How far a stored value may be from the checkpoint's: as much as its form explains, and what a right one can have.

A step is what the checkpoint's own group gives; the bundle's scales prove nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from stages.quantization import feedback, float8, group, minimum, two_level
from stages.sizes import LEVEL_BITS, SHARING, level_blocks

if TYPE_CHECKING:
    from stages.quantization.rows import Row

# By how much the stored scale may be off, by its dtype: its rounding, and what it is off by below the normal range. A
# code is worth up to `top` scales. The division and the product in float32 come on top.
_SCALE_ERROR = {"float32": (2.0**-24, 2.0**-149), "float16": (2.0**-11, 2.0**-25), "bfloat16": (2.0**-8, 2.0**-134)}


def of_values(wanted: np.ndarray, row: Row, scales: str) -> np.ndarray:
    """Return how far a stored value may be from each of ``wanted`` [n, k]."""
    if row.kind == "float8":
        # As below, of each group; a scale that others chose may be up to twice the plain one.
        starts = np.arange(0, wanted.shape[1], row.group_size)
        peaks = np.maximum.reduceat(np.abs(wanted), starts, axis=1)
        smallest = np.repeat(peaks, row.group_size, axis=1)[:, : wanted.shape[1]] * np.float32(2**-9 / float8.LARGEST)
        in_groups: np.ndarray = np.abs(wanted) * np.float32(2**-4 + 1e-5) + smallest
        return in_groups
    if row.kind == "mxfp4":
        # One bit of fraction, and half the smallest code; the largest value may be up to a quarter above its code.
        starts = np.arange(0, wanted.shape[1], row.group_size)
        peaks = np.maximum.reduceat(np.abs(wanted), starts, axis=1)
        peaks = np.repeat(peaks, row.group_size, axis=1)[:, : wanted.shape[1]]
        floats: np.ndarray = (
            np.abs(wanted) * np.float32(0.25 + 1e-5) + peaks * np.float32(2**-3) + np.float32(2.0**-117)
        )
        return floats
    if row.kind == "tensor":
        # Half a unit of three bits; below the smallest normal number, half of the smallest there is.
        smallest = np.abs(wanted).max(initial=0) / np.float32(float8.LARGEST) * np.float32(2**-10)
        allowed: np.ndarray = np.abs(wanted) * np.float32(2**-4 + 1e-5) + smallest + np.float32(float8.LEAST_SCALE)
        return allowed
    starts = np.arange(0, wanted.shape[1], row.group_size)
    low, high = (function.reduceat(wanted, starts, axis=1) for function in (np.minimum, np.maximum))
    return np.repeat(of_groups(low, high, row, scales), row.group_size, axis=1)[:, : wanted.shape[1]]


def of_groups(low: np.ndarray, high: np.ndarray, row: Row, scales: str) -> np.ndarray:
    """Return how far stored values may be off, float32 [n, groups], where a group has values from ``low`` to ``high``;
    of rows of kind "group".
    """
    if row.levels:
        return _in_two_levels(low, high, row, scales)
    relative, absolute = _SCALE_ERROR[row.scale_dtype]
    moved = _moved(row, scales)
    allowed: np.ndarray
    peak = np.maximum(high, -low)
    if row.minimum:
        step = (high - low) / np.float32(row.most)
        steps = 0.5 if scales == "max" else minimum.FURTHEST
        rounding = peak * np.float32(relative + 1e-6) + np.float32((1 + row.most) * absolute)
        allowed = step * np.float32(steps + 2 * row.most * relative + 1e-5) + rounding * np.float32(2 * steps)
    else:
        step = peak / np.float32(row.top)
        steps = {"max": 0.5, "full": 1}.get(scales, max(0.5, row.top * (1 - group.TRIED[-1] / group.PARTS)))
        allowed = step * np.float32(steps + row.top * relative + 1e-5) + np.float32(row.top * absolute)
    allowed += step * moved
    return allowed


def _in_two_levels(low: np.ndarray, high: np.ndarray, row: Row, scales: str) -> np.ndarray:
    """As :func:`of_groups`, of groups whose scale and minimum are levels of what a block of groups shares.

    A level is off by half of a part of the largest of the block, and a group whose scale came out small loses its
    largest values: those are off by as many steps as there are codes.
    """
    (relative, absolute), groups = _SCALE_ERROR[row.scale_dtype], low.shape[1]
    low = np.minimum(low, np.float32(0))
    step = (high - low) / np.float32(row.most)
    blocks = np.arange(level_blocks(groups, row.bits)) * SHARING[row.bits]
    sizes = np.diff(blocks, append=groups)
    tops = two_level.TOPS[LEVEL_BITS[row.bits]]
    top = tops[0] if scales == "max" else tops[-1]
    half = np.float32(0.5 / top + 2 * relative + 1e-5)  # of a level; what the shared float is off by
    off_step, off_low = (
        np.repeat(np.maximum.reduceat(each, blocks, axis=1) * half, sizes, axis=1) for each in (step, -low)
    )
    steps = 0.5 if scales == "max" else minimum.FURTHEST
    tiny = np.float32((1 + row.most) * tops[0] * absolute)
    allowed: np.ndarray
    allowed = (step * np.float32(steps) + off_step * np.float32(row.most + 1) + off_low + tiny) * np.float32(2 * steps)
    allowed += (step + off_step) * _moved(row, scales)
    return allowed


def _moved(row: Row, scales: str) -> np.float32:
    """Return by how many steps of the plain scale feedback may have moved a value: a searched step is longer at most
    by what the ends of the range may be off.
    """
    longest = 1 + 2 * minimum.FURTHEST / row.most if row.minimum else 1.5
    return np.float32(feedback.FURTHEST * longest if scales == "gptq" else 0)
