"""Limits the memory of conversions that run at the same time."""

from __future__ import annotations

import contextlib
from threading import Condition
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


class Memory:
    """Blocks callers until the memory budget allows them; a single caller is always let through."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0
        self._changed = Condition()

    @contextlib.contextmanager
    def reserved(self, count: int) -> Iterator[None]:
        """Reserve ``count`` bytes while the block runs."""
        with self._changed:
            self._changed.wait_for(lambda: self._used == 0 or self._used + count <= self._limit)
            self._used += count
        try:
            yield
        finally:
            with self._changed:
                self._used -= count
                self._changed.notify_all()
