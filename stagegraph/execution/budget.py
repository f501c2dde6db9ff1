"""The memory that a worker of a cluster offers, as what runs there takes it, pieces of nodes elsewhere among it.

Dask counts nodes alone. A piece cannot reserve anything with it: what its node has reserved stays so until that ends,
and where no other worker offers as much, the piece would wait for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Condition

LOOK_SECONDS = 0.2


class Budget:
    """So many MiB, shared by the threads of a worker; 0 is no limit."""

    def __init__(self, mebibytes: int = 0) -> None:
        self._offered, self._taken = mebibytes, 0
        self._changed = Condition()

    @contextmanager
    def taken(self, mebibytes: int, cancelled: Callable[[], bool]) -> Iterator[None]:
        """Take some meanwhile; wait until it is there, or nothing else is taken, or the wait is ``cancelled``."""
        self._take(mebibytes, cancelled)
        try:
            yield
        finally:
            self._give(mebibytes)

    @contextmanager
    def lent(self, mebibytes: int, cancelled: Callable[[], bool]) -> Iterator[None]:
        """Give back meanwhile what was taken, so that nodes that wait for pieces never wait for each other."""
        self._give(mebibytes)
        try:
            yield
        finally:
            self._take(mebibytes, cancelled)

    def _take(self, mebibytes: int, cancelled: Callable[[], bool]) -> None:
        with self._changed:
            while self._offered and self._taken and self._taken + mebibytes > self._offered and not cancelled():
                self._changed.wait(LOOK_SECONDS)
            self._taken += mebibytes

    def _give(self, mebibytes: int) -> None:
        with self._changed:
            self._taken -= mebibytes
            self._changed.notify_all()
