"""The prefix cache of recurrent models: snapshots of the state, each at one position, from which reading continues.

Its interface is that of :class:`stages.runtime.server.prefixes.Prefixes`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class Snapshots:
    """The kept sequences of a session by what they hold; ``reach`` says how many tokens of one can be taken back.

    One that a job reads moves on: it is of use to others only once it is released.
    """

    def __init__(self, reach: Callable[[int], int]) -> None:
        self._reach = reach
        self._unused: dict[int, list[int]] = {}  # sequence -> its ids, the longest unused first

    @property
    def kept(self) -> int:
        """How many sequences are kept."""
        return len(self._unused)

    def longest(self, ids: Sequence[int]) -> tuple[int | None, int]:
        """Return the sequence with which most of ``ids`` can be begun, and how many; it counts as used."""
        wanted = list(ids)
        lengths = {sequence: self._usable(sequence, own, wanted) for sequence, own in self._unused.items()}
        found = max(lengths, key=lambda sequence: lengths[sequence], default=None)
        if found is None or not lengths[found]:
            return None, 0
        self._unused[found] = self._unused.pop(found)
        return found, lengths[found]

    def hold(self, sequence: int, ids: Sequence[int]) -> None:
        """Say what a job's sequence holds now, which it will not for long."""

    def release(self, sequence: int, ids: Sequence[int]) -> list[int]:
        """Say that no job reads a sequence any more, and that it holds ``ids``.

        Returns those that hold the same: they are to be removed.
        """
        own = list(ids)
        same = [other for other, those in self._unused.items() if those == own]
        for other in same:
            del self._unused[other]
        self._unused[sequence] = own
        return same

    def drop(self, sequence: int) -> None:
        """Forget a sequence that is removed."""
        self._unused.pop(sequence, None)

    def oldest(self) -> int | None:
        """Return the kept sequence that was not used for longest; None if there is none."""
        return next(iter(self._unused), None)

    def _usable(self, sequence: int, own: list[int], wanted: list[int]) -> int:
        """Return how many of ``wanted`` a sequence begins with, if the rest of it can be taken back; else 0."""
        least = max(0, len(own) - self._reach(sequence))
        if own[:least] != wanted[:least]:
            return 0
        length = least
        while length < min(len(own), len(wanted)) and own[length] == wanted[length]:
            length += 1
        return length
