"""Keeps what runs at once within a limit of memory."""

from __future__ import annotations

import contextlib
from threading import Condition
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


class Memory:
    """Makes whoever asks wait until what is in work leaves room; one alone always has it."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0
        self._changed = Condition()

    @contextlib.contextmanager
    def reserved(self, count: int) -> Iterator[None]:
        """Hold ``count`` bytes."""
        with self._changed:
            self._changed.wait_for(lambda: self._used == 0 or self._used + count <= self._limit)
            self._used += count
        try:
            yield
        finally:
            with self._changed:
                self._used -= count
                self._changed.notify_all()
