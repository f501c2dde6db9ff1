"""Refines what error feedback has chosen: scales and minima of two levels, and codes, by what errors cost together.

Feedback never looks back: a code is chosen before the errors of the later columns are known, and scales before any code
is. Here each is chosen once more with all others given (coordinate descent), which never costs more.
docs/quantization.md states the arithmetic.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from stages.quantization import two_level
from stages.quantization.minimum import FURTHEST
from stages.sizes import LEVEL_BITS

if TYPE_CHECKING:
    from stages.quantization.rows import Row

PASSES = 2
# Levels away from the present ones that are tried, of scale and minimum: [24, 2, 1].
TRIED = np.array([[[i], [j]] for i in range(-2, 3) for j in range(-2, 3) if i or j], np.float32)
COLUMNS = 32  # that are worked on before the later ones are told


class Leveled:
    """Rows of a matrix in two levels that are refined: ``q_scale`` and ``q_outer`` of a ``weight`` float32 [n, k].

    Errors e of a row cost e H e', with ``curvature`` H float32 [k, k]. Neither levels nor floats are changed so that
    the smallest or largest code of a group gets further away from the least or the largest value of the group than
    :data:`~stages.quantization.minimum.FURTHEST` steps of its range.
    """

    def __init__(
        self, weight: np.ndarray, q_scale: np.ndarray, q_outer: np.ndarray, row: Row, curvature: np.ndarray
    ) -> None:
        self._weight, self._row, self._curvature = weight, row, curvature
        groups = row.groups(weight.shape[1])
        self._floats = q_outer.reshape(len(weight), -1, 2).copy()
        self._levels = np.stack(two_level.unpack_levels(q_scale, groups, row.bits)).astype(np.float32)
        self._block = two_level.place(groups, row)[0]
        starts = row.group_size * np.arange(groups)
        self._least = np.minimum(np.minimum.reduceat(weight, starts, axis=1), 0)
        self._most = np.maximum.reduceat(weight, starts, axis=1)
        self._furthest = (self._most - self._least) * np.float32(FURTHEST / row.most)

    @property
    def stored(self) -> tuple[np.ndarray, np.ndarray]:
        """``q_scale`` and ``q_outer`` as they are now."""
        scales, minima = self._levels.astype(np.uint32)
        floats = self._floats.reshape(len(self._floats), -1)
        return two_level.pack_levels(scales, minima, self._row.bits), floats

    def refine(self, codes: np.ndarray) -> None:
        """Choose levels, and then floats, that suit ``codes`` [n, k] best."""
        step, low = two_level.steps(*self.stored, self._row, codes.shape[1])
        rest = self._weight - (codes * step - low)
        self._refine_levels(codes, rest @ self._curvature)
        step, low = two_level.steps(*self.stored, self._row, codes.shape[1])
        self._refine_floats(codes, self._weight - (codes * step - low))

    def _fits(self, step: np.ndarray, low: np.ndarray, group: Any = slice(None)) -> np.ndarray:
        """Say where codes that are worth ``step``, and ``low`` less, end near enough to the ends of groups."""
        begin = np.abs(-low - self._least[:, group]) <= self._furthest[:, group]
        end = self._row.most * step - low - self._most[:, group]
        found: np.ndarray = begin & (np.abs(end) <= self._furthest[:, group])
        return found

    def _refine_levels(self, codes: np.ndarray, pull: np.ndarray) -> None:
        """Try the levels around those of each group; ``pull`` [n, k] is minus half the slope of the cost."""
        size, largest = self._row.group_size, 2 ** LEVEL_BITS[self._row.bits] - 1
        for group, block in enumerate(self._block):
            here = slice(size * group, size * (group + 1))
            code, square = codes[:, here], self._curvature[here, here]
            floats, present = self._floats[:, block].astype(np.float32).T, self._levels[:, :, group]
            of_code = code @ square
            costs = (of_code * code).sum(axis=1), of_code.sum(axis=1), square.sum()
            gains = (pull[:, here] * code).sum(axis=1), pull[:, here].sum(axis=1)
            tried = present + TRIED
            step, low = (tried * floats).swapaxes(0, 1)
            fits = self._fits(step, low, group) & ((tried >= 0) & (tried <= largest)).all(axis=1)
            x, y = TRIED[:, 0] * floats[0], -TRIED[:, 1] * floats[1]  # a value changes by x times its code, and by y
            cost = x * x * costs[0] + 2 * x * y * costs[1] + y * y * costs[2] - 2 * (x * gains[0] + y * gains[1])
            cost[~fits] = np.inf
            best = cost.argmin(axis=0)
            chosen = np.where(cost.min(axis=0) < 0, TRIED[best, :, 0].T, 0)
            self._levels[:, :, group] += chosen
            changed = chosen * floats
            pull -= (changed[0][:, None] * code - changed[1][:, None]) @ self._curvature[here]

    def _refine_floats(self, codes: np.ndarray, rest: np.ndarray) -> None:
        """Fit the floats of each row to what is left of it, ``rest`` [n, k], by least squares."""
        (n, k), size, blocks = codes.shape, self._row.group_size, self._floats.shape[1]
        of_column = np.repeat(self._block, size)[:k]
        scales, minima = (np.repeat(each, size, axis=1)[:, :k] for each in self._levels)
        terms = [codes * scales, -minima]  # what a value changes by with each float of its block
        columns = [np.flatnonzero(of_column == block) for block in range(blocks)]
        parts = [(where, np.ascontiguousarray(term[:, where])) for where in columns for term in terms]
        square, gain = np.zeros((n, 2 * blocks, 2 * blocks)), np.zeros((n, 2 * blocks))
        for i, (where, part) in enumerate(parts):
            moved = part @ self._curvature[where]
            gain[:, i] = np.einsum("nk,nk->n", moved, rest)
            for j, (there, other) in enumerate(parts):
                square[:, i, j] = np.einsum("nk,nk->n", moved[:, there], other)
        diagonal = np.arange(2 * blocks)
        square[:, diagonal, diagonal] += 1e-6 * square[:, diagonal, diagonal] + 1e-30
        now = self._floats.astype(np.float64).reshape(n, -1)
        with np.errstate(over="ignore", invalid="ignore"):  # what does not fit is not taken
            fitted = (now + np.linalg.solve(square, gain[..., None])[..., 0]).astype(self._floats.dtype)
            change = fitted.astype(np.float64) - now
            saved = 2 * (gain * change).sum(axis=1) - np.einsum("np,npq,nq->n", change, square, change)
            floats = fitted.astype(np.float32).reshape(n, -1, 2)
            step, low = (floats[:, self._block, which] * self._levels[which] for which in (0, 1))
            better = (saved > 0) & (floats >= 0).all(axis=(1, 2)) & self._fits(step, low).all(axis=1)
        self._floats[better] = fitted[better].reshape(-1, blocks, 2)


def codes(
    values: np.ndarray,
    given: np.ndarray,
    worth: np.ndarray,
    added: np.ndarray,
    bounds: tuple[np.ndarray, np.ndarray],
    curvature: np.ndarray,
) -> np.ndarray:
    """Return codes float32 [k, n], those ``given`` each chosen once more, column after column, with the others given.

    ``values`` [k, n] are stored as ``code * worth + added``, with codes within ``bounds``; errors e of a column of
    ``values`` cost e' H e, with ``curvature`` H [k, k].
    """
    codes = given.copy()
    pull = curvature @ (values - (codes * worth + added))
    square = curvature.diagonal()
    inverse = np.divide(1, worth, out=np.zeros_like(worth), where=worth != 0)
    k = len(codes)
    for start in range(0, k, COLUMNS):
        stop = min(start + COLUMNS, k)
        changed = np.empty((stop - start, codes.shape[1]), np.float32)
        for at in range(start, stop):
            code = np.rint(codes[at] + pull[at] / square[at] * inverse[at])
            code = np.minimum(np.maximum(code, bounds[0][at]), bounds[1][at])
            change = changed[at - start] = (code - codes[at]) * worth[at]
            codes[at] = code
            pull[at + 1 : stop] -= curvature[at + 1 : stop, at, None] * change
        pull[stop:] -= curvature[stop:, start:stop] @ changed
    return codes
