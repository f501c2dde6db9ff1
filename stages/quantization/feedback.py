"""Error feedback: codes are chosen column after column, and what one gets wrong the later ones of its row make up for.

GPTQ (Frantar et al. 2023). Scales are chosen before, for the weights as they are, and stay; so columns may be taken in
any order and none changes its place. What a column's error takes from each later one comes from the stage calibrate
(:mod:`stages.calibration.curvature`). docs/quantization.md states the arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from stages.quantization import two_level
from stages.quantization.words import pack_planes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from stages.quantization.rows import Row

FURTHEST = 2  # codes that a weight may be stored away from the nearest: what verify can hold a bundle against
INDEX = "index.json"  # in a folder of what :func:`save` wrote: tensor -> file
ROWS, COLUMNS = 1024, 32  # of a matrix that are worked on at once, and after which the later columns are told


@dataclass(frozen=True)
class Feedback:
    """``order`` int [k] is that in which columns are taken; ``shares`` float32 [k, k], in that order, is how much of an
    error in column i is added to each later column j, in row i of a strict upper triangle.
    """

    order: np.ndarray
    shares: np.ndarray


def load(path: Path) -> Feedback:
    """Return what :func:`save` wrote."""
    with np.load(path) as found:
        order, packed = found["order"], found["shares"]
    shares = np.zeros((len(order), len(order)), np.float32)
    for row, some in zip(shares, _triangle(len(order)), strict=True):
        row[len(row) - (some.stop - some.start) :] = packed[some]
    return Feedback(order, shares)


def save(path: Path, feedback: Feedback) -> None:
    """Write the triangle alone, in float16: it is what errors are multiplied by, not what weights are."""
    k = len(feedback.order)
    packed = np.empty(k * (k - 1) // 2, np.float16)
    for at, some in enumerate(_triangle(k)):
        packed[some] = feedback.shares[at, at + 1 :]
    np.savez(path, order=feedback.order.astype(np.int32), shares=packed)


def _triangle(k: int) -> Iterator[slice]:
    """Yield where what is behind the diagonal of each of ``k`` rows lies, one after the other."""
    start = 0
    for length in reversed(range(k)):
        yield slice(start, start + length)
        start += length


def applied(weight: np.ndarray, stored: Sequence[np.ndarray], row: Row, feedback: Feedback) -> list[np.ndarray]:
    """Return ``stored``, what a weight [n, k] has become in a row of groups, with codes chosen by ``feedback``."""
    q_weight, *scales = stored
    chosen = np.empty_like(q_weight)
    n, k = weight.shape
    for start in range(0, n, ROWS):
        rows = slice(start, start + ROWS)
        step, low = _steps([each[rows] for each in scales], row, k)
        codes = _codes(np.asarray(weight[rows], np.float32), step, low, row, feedback)
        filled = np.zeros((len(codes), row.groups(k) * row.group_size), np.uint8)
        filled[:, :k] = codes
        chosen[rows] = pack_planes(filled, row.planes, row.group_size)
    return [chosen, *scales]


def _steps(scales: Sequence[np.ndarray], row: Row, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return what a code is worth in each place, and what is added to it, float32 [n, k] each."""
    if row.levels:
        inner, outer = scales
        step, low = two_level.steps(inner, outer, row, k)
        return step, -low
    step, *least = (np.repeat(each.astype(np.float32), row.group_size, axis=1)[:, :k] for each in scales)
    return step, least[0] if least else np.zeros_like(step)


def _codes(weight: np.ndarray, step: np.ndarray, low: np.ndarray, row: Row, feedback: Feedback) -> np.ndarray:
    """Return the codes uint8 of ``weight`` float32 [n, k]."""
    n, k = weight.shape
    zero, most = (0, row.most) if row.minimum else (row.top, 2 * row.top + 1)
    shares, order = feedback.shares, feedback.order
    # One column after the other is worked on: let each lie in one piece.
    left, worth, added = (np.ascontiguousarray(each.T[order]) for each in (weight, step, low))
    inverse = np.divide(1, worth, out=np.zeros_like(worth), where=worth != 0)
    nearest = np.clip(np.rint((left - added) * inverse) + zero, 0, most)
    least, largest = np.maximum(nearest - FURTHEST, 0), np.minimum(nearest + FURTHEST, most)
    codes = np.empty((k, n), np.uint8)
    for start in range(0, k, COLUMNS):
        stop = min(start + COLUMNS, k)
        errors = np.empty((stop - start, n), np.float32)
        for at in range(start, stop):
            code = np.rint((left[at] - added[at]) * inverse[at]) + zero
            code = np.minimum(np.maximum(code, least[at]), largest[at])
            codes[at] = code
            error = errors[at - start] = left[at] - ((code - zero) * worth[at] + added[at])
            left[at + 1 : stop] += shares[at, at + 1 : stop, None] * error
        left[stop:] += shares[start:stop, stop:].T @ errors
    found = np.empty((n, k), np.uint8)
    found[:, order] = codes.T
    return found
