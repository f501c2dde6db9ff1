"""What a sequence of a session has read, id by id: of a new prompt only what follows a common beginning is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages.runtime.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np

    from stages.runtime.session import Session


class Context:
    """One sequence of ``session`` from its beginning.

    ``ids`` are what it holds; ``reused`` says how many of the last prompt it held before that was read.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._sequence = session.add()
        self.ids: list[int] = []
        self.reused = 0

    def close(self) -> None:
        """Give the sequence back."""
        self._session.remove(self._sequence)

    @property
    def full(self) -> bool:
        """Whether there is no room for one more token."""
        return self._session.full(self._sequence)

    def read(self, ids: Sequence[int], stopped: Callable[[], bool] = lambda: False) -> np.ndarray | None:
        """Hold exactly ``ids`` and return the logits after the last; None if ``stopped`` said so between chunks."""
        limit = self._session.limit
        if limit is not None and len(ids) > limit:
            raise RequestError(
                f"the context holds {limit:,} tokens and the prompt has {len(ids):,}: shorten it, or build the bundle "
                "with a larger context_window"
            )
        self._go_back(ids)
        self.reused = len(self.ids)
        logits = None
        for start in range(self.reused, max(len(ids), 1), self._session.prefill_chunk):
            if logits is not None and stopped():
                return None
            part = ids[start : start + self._session.prefill_chunk]
            logits = self._session.prefill(self._sequence, part)
            self.ids += part
        return logits

    def next(self, token: int) -> np.ndarray:
        """Read one token and return the logits after it."""
        logits = self._session.decode(self._sequence, token)
        self.ids.append(token)
        return logits

    def _go_back(self, ids: Sequence[int]) -> None:
        """Keep what ``ids`` begin with but for their last, which gives the logits; nothing if the state cannot."""
        pairs = zip(self.ids, ids[:-1], strict=False)
        common = next(
            (at for at, (present, wanted) in enumerate(pairs) if present != wanted), min(len(self.ids), len(ids) - 1)
        )
        count = len(self.ids) - common
        if count and count <= self._session.reach(self._sequence):
            self._session.popn(self._sequence, count)
            del self.ids[common:]
        elif count:
            self.close()
            self._sequence = self._session.add()
            self.ids = []
