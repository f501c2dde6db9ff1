"""Error feedback: codes are chosen column after column, and what one gets wrong the later ones of its row make up for.

GPTQ (Frantar et al. 2023). Scales are chosen before, for the weights as they are; so columns may be taken in any order
and none changes its place. What a column's error takes from each later one comes from the stage calibrate
(:mod:`stages.calibration.curvature`). Then codes, and levels of scales, are refined
(:mod:`stages.quantization.refinement`). docs/quantization.md states the arithmetic.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from stages.quantization import refinement, two_level
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
    error in column i is added to each later column j, in row i of a strict upper triangle. ``costs`` float32 [k], in
    that order, is what the square of an error in a column costs once the later ones have made up for it.
    """

    order: np.ndarray
    shares: np.ndarray
    costs: np.ndarray

    @functools.cached_property
    def curvature(self) -> np.ndarray:
        """What errors cost together, H float32 [k, k] in that order: those e of a row e H e'.

        Its inverse is U' U, of whose factor U the shares are rows over their diagonals, and costs the diagonals to the
        power of -2.
        """
        unit = np.eye(len(self.order), dtype=np.float32) - self.shares
        root = np.linalg.inv(unit) * np.sqrt(self.costs)
        found: np.ndarray = root @ root.T
        return found


def load(path: Path) -> Feedback:
    """Return what :func:`save` wrote."""
    with np.load(path) as found:
        order, packed, costs = found["order"], found["shares"], found["costs"]
    shares = np.zeros((len(order), len(order)), np.float32)
    for row, some in zip(shares, _triangle(len(order)), strict=True):
        row[len(row) - (some.stop - some.start) :] = packed[some]
    return Feedback(order, shares, costs)


def save(path: Path, feedback: Feedback) -> None:
    """Write the triangle alone, in float16: it is what errors are multiplied by, not what weights are."""
    k = len(feedback.order)
    packed = np.empty(k * (k - 1) // 2, np.float16)
    for at, some in enumerate(_triangle(k)):
        packed[some] = feedback.shares[at, at + 1 :]
    np.savez(path, order=feedback.order.astype(np.int32), shares=packed, costs=feedback.costs)


def _triangle(k: int) -> Iterator[slice]:
    """Yield where what is behind the diagonal of each of ``k`` rows lies, one after the other."""
    start = 0
    for length in reversed(range(k)):
        yield slice(start, start + length)
        start += length


def applied(weight: np.ndarray, stored: Sequence[np.ndarray], row: Row, feedback: Feedback) -> list[np.ndarray]:
    """Return ``stored``, what a weight [n, k] has become in a row of groups, with codes chosen by ``feedback``, and
    then both codes and levels refined.
    """
    made = [np.empty_like(each) for each in stored]
    n, k = weight.shape
    back = np.argsort(feedback.order)
    curvature = feedback.curvature[np.ix_(back, back)] if row.levels else None
    for start in range(0, n, ROWS):
        rows = slice(start, start + ROWS)
        _, *scales = (each[rows] for each in stored)
        values = np.asarray(weight[rows], np.float32)
        columns = _Columns.of(values, scales, row, feedback.order)
        codes = columns.chosen(feedback.shares)
        leveled = None if curvature is None else refinement.Leveled(values, scales[0], scales[1], row, curvature)
        for _ in range(refinement.PASSES):
            if leveled:
                leveled.refine(columns.in_rows(codes))
                scales = [*leveled.stored]
                columns = _Columns.of(values, scales, row, feedback.order)
            codes = columns.refined(codes, feedback.curvature)
        filled = np.zeros((len(values), row.groups(k) * row.group_size), np.uint8)
        filled[:, :k] = columns.in_rows(codes)
        for target, found in zip(made, [pack_planes(filled, row.planes, row.group_size), *scales], strict=True):
            target[rows] = found
    return made


def _steps(scales: Sequence[np.ndarray], row: Row, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return what a code is worth in each place, and what is added to it, float32 [n, k] each."""
    if row.levels:
        inner, outer = scales
        step, low = two_level.steps(inner, outer, row, k)
        return step, -low
    step, *least = (np.repeat(each.astype(np.float32), row.group_size, axis=1)[:, :k] for each in scales)
    return step, least[0] if least else np.zeros_like(step)


@dataclass(frozen=True)
class _Columns:
    """The columns of a matrix one after the other in ``order``, so that each lies in one piece, all float32 [k, n].

    ``values`` are stored as ``code * worth + added``, with codes within ``bounds``.
    """

    order: np.ndarray
    values: np.ndarray
    worth: np.ndarray
    added: np.ndarray
    inverse: np.ndarray
    bounds: tuple[np.ndarray, np.ndarray]

    @classmethod
    def of(cls, weight: np.ndarray, scales: Sequence[np.ndarray], row: Row, order: np.ndarray) -> _Columns:
        """Return the columns of ``weight`` float32 [n, k] in a ``row`` with these ``scales``."""
        step, low = _steps(scales, row, weight.shape[1])
        zero, most = (0, row.most) if row.minimum else (row.top, 2 * row.top + 1)
        values, worth, added = (np.ascontiguousarray(each.T[order]) for each in (weight, step, low))
        added -= zero * worth
        inverse = np.divide(1, worth, out=np.zeros_like(worth), where=worth != 0)
        nearest = np.clip(np.rint((values - added) * inverse), 0, most)
        bounds = np.maximum(nearest - FURTHEST, 0), np.minimum(nearest + FURTHEST, most)
        return cls(order, values, worth, added, inverse, bounds)

    def chosen(self, shares: np.ndarray) -> np.ndarray:
        """Return the codes float32 [k, n] that error feedback chooses."""
        left, (least, largest), k = self.values.copy(), self.bounds, len(self.values)
        codes = np.empty_like(left)
        for start in range(0, k, COLUMNS):
            stop = min(start + COLUMNS, k)
            errors = np.empty((stop - start, left.shape[1]), np.float32)
            for at in range(start, stop):
                code = np.rint((left[at] - self.added[at]) * self.inverse[at])
                code = codes[at] = np.minimum(np.maximum(code, least[at]), largest[at])
                error = errors[at - start] = left[at] - (code * self.worth[at] + self.added[at])
                left[at + 1 : stop] += shares[at, at + 1 : stop, None] * error
            left[stop:] += shares[start:stop, stop:].T @ errors
        return codes

    def refined(self, codes: np.ndarray, curvature: np.ndarray) -> np.ndarray:
        """Return ``codes`` [k, n], each chosen once more; ``curvature`` [k, k] is in ``order``, too."""
        within = np.clip(codes, *self.bounds)
        return refinement.codes(self.values, within, self.worth, self.added, self.bounds, curvature)

    def in_rows(self, codes: np.ndarray) -> np.ndarray:
        """Return ``codes`` [k, n] as [n, k], columns in their own places."""
        found = np.empty(codes.shape[::-1], codes.dtype)
        found[:, self.order] = codes.T
        return found
