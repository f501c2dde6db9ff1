"""Speculative decoding: proposes the next tokens of an answer; the model checks them all in one pass.

A proposed token is kept only where the answer would have had it anyway. So drafts change how long an answer takes and
nothing else: tokens are drawn from the model's own distribution, and a seed draws what it draws without drafts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np

from stages.runtime.context import Context
from stages.runtime.errors import RequestError
from stages.runtime.session import Session

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stages.runtime.manifest import Manifest

MOST = 16  # ids guessed at once
_SIZES = (3, 2)  # how many ids have to be the same for what followed them to be a guess


class Draft(Protocol):
    """Guesses for one text."""

    def propose(self, ids: Sequence[int], most: int) -> Sequence[int]:
        """Return at most so many ids that may follow ``ids``, which have only grown since the last time."""

    def close(self) -> None:
        """Let go of what was held for the text."""


class Lookup:
    """Guesses that a text goes on as it did when its newest ids came before (prompt look-up)."""

    def __init__(self) -> None:
        self._ends: dict[tuple[int, ...], int] = {}  # ids -> where they ended last
        self._known = 0

    def propose(self, ids: Sequence[int], most: int) -> Sequence[int]:
        """Return at most so many ids that followed the last ones of ``ids`` before."""
        for end in range(self._known + 1, len(ids)):
            for size in _SIZES:
                if end >= size:
                    self._ends[tuple(ids[end - size : end])] = end
        self._known = len(ids) - 1
        ends = (self._ends.get(tuple(ids[-size:])) for size in _SIZES)
        at = next((end for end in ends if end is not None), len(ids))
        return ids[at : at + most]

    def close(self) -> None:
        """Hold nothing."""


class Drafter:
    """A second, smaller bundle with the same vocabulary, whose likeliest ids are the guesses."""

    def __init__(self, bundle: Manifest, vocab_size: int) -> None:
        if bundle.model["vocab_size"] < vocab_size:
            raise RequestError(
                f"{bundle.root}: its vocabulary of {bundle.model['vocab_size']:,} is smaller than {vocab_size:,}: what "
                "drafts for a model must have its tokenizer"
            )
        self._session = Session(bundle, sequences=bundle.model["max_batch"])
        self._vocab_size = vocab_size
        self._left = bundle.model["max_batch"]  # texts that it can hold besides

    def begin(self) -> Draft:
        """Return what guesses for one more text: by its own ids where all sequences of the bundle are taken."""
        if not self._left:
            return Lookup()
        self._left -= 1
        return _Drafting(self, Context(self._session))

    def guesses(self, context: Context, ids: Sequence[int], most: int) -> list[int]:
        """Return the likeliest ids after ``ids``, one after the other."""
        limit = self._session.limit
        if limit is not None:
            most = min(most, limit - len(ids) + 1)
        if most < 1 or not ids:
            return []
        try:
            logits, found = context.read(ids), []
        except RequestError:  # an id that this bundle does not have
            return []
        while logits is not None:
            found.append(int(np.argmax(logits[: self._vocab_size])))
            logits = context.next(found[-1]) if len(found) < most else None
        return found

    def end(self, context: Context) -> None:
        """Give a text's sequence back."""
        context.close()
        self._left += 1


class _Drafting:
    """The guesses of a bundle for one text."""

    def __init__(self, drafter: Drafter, context: Context) -> None:
        self._drafter, self._context = drafter, context

    def propose(self, ids: Sequence[int], most: int) -> Sequence[int]:
        """Return at most so many ids."""
        return self._drafter.guesses(self._context, list(ids), most)

    def close(self) -> None:
        """Give the sequence back."""
        self._drafter.end(self._context)
