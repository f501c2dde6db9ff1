"""Chooses a row for each matrix: the least expected loss within an average number of bits a weight."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from stages.sizes import DTYPE_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from stages.quantization.rows import Row


@dataclass(frozen=True)
class RowChoices:
    """What a matrix can be stored as: ``bits`` that each way takes in all, and ``loss`` that is to be expected."""

    name: str
    values: int
    bits: Sequence[float]
    loss: Sequence[float]

    def steps(self) -> Iterator[tuple[float, float, int]]:
        """Yield (loss saved a bit, more bits, way) from the smallest way on, each the best use of more bits there is:
        the lower convex hull of losses over bits.
        """
        order = sorted(range(len(self.bits)), key=lambda way: (self.bits[way], self.loss[way]))
        here = order[0]
        while ahead := [way for way in order if self.bits[way] > self.bits[here] and self.loss[way] < self.loss[here]]:
            saved = [(self.loss[here] - self.loss[way]) / (self.bits[way] - self.bits[here]) for way in ahead]
            best = int(np.argmax(saved))
            yield saved[best], self.bits[ahead[best]] - self.bits[here], ahead[best]
            here = ahead[best]

    @property
    def smallest(self) -> int:
        """The way that takes the fewest bits."""
        return min(range(len(self.bits)), key=lambda way: (self.bits[way], self.loss[way]))


def stored_bits(row: Row, n: int, k: int) -> float:
    """Return the bits that a matrix [n, k] takes in ``row``."""
    return sum(8.0 * DTYPE_BYTES[dtype] * float(np.prod(shape)) for _, shape, dtype in row.stored(n, k))


def allocate(choices: Sequence[RowChoices], bits: float) -> dict[str, int]:
    """Return the way of each of ``choices``, ``bits`` a value on the average at most.

    Of all steps from the smallest ways on, the one that saves most for its bits is taken first, while it fits.
    :class:`ValueError` if the smallest ways take more.
    """
    left = bits * sum(each.values for each in choices)
    taken = {each.name: each.smallest for each in choices}
    left -= sum(each.bits[taken[each.name]] for each in choices)
    if left < 0:
        least = bits - left / sum(each.values for each in choices)
        raise ValueError(f"{bits:g} bits a weight are fewer than the {least:.2f} of the smallest rows there are")
    steps = {each.name: each.steps() for each in choices}
    heap: list[tuple[float, str, float, int]] = []

    def look(name: str) -> None:
        if step := next(steps[name], None):
            saved, more, way = step
            heapq.heappush(heap, (-saved, name, more, way))

    for each in choices:
        look(each.name)
    while heap:
        _, name, more, way = heapq.heappop(heap)
        if more <= left:
            left, taken[name] = left - more, way
            look(name)
    return taken
