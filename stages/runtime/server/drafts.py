"""Speculative decoding: drafts the next tokens of an answer, which the model checks in one pass.

A drafted token is accepted only if the answer would contain it without drafts. So drafts change the time of an answer
and nothing else: tokens are sampled from the model's own distribution, and a seed gives the same answer as without.
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

MOST = 16  # ids drafted at once
_SIZES = (3, 2)  # lengths of the n-grams whose earlier continuation is proposed, the first that matches


class Draft(Protocol):
    """Proposes tokens for one text."""

    def propose(self, ids: Sequence[int], most: int) -> Sequence[int]:
        """Return at most ``most`` ids that may follow ``ids``, which begin with those of the previous call."""

    def close(self) -> None:
        """Free the resources for the text."""


class Lookup:
    """Prompt look-up decoding: proposes what followed the last ids of a text where they occurred before."""

    def __init__(self) -> None:
        self._ends: dict[tuple[int, ...], int] = {}  # n-gram of ids -> the index after its last occurrence
        self._known = 0

    def propose(self, ids: Sequence[int], most: int) -> Sequence[int]:
        """Return at most ``most`` ids that followed the last n-gram of ``ids`` at its previous occurrence."""
        for end in range(self._known + 1, len(ids)):
            for size in _SIZES:
                if end >= size:
                    self._ends[tuple(ids[end - size : end])] = end
        self._known = len(ids) - 1
        ends = (self._ends.get(tuple(ids[-size:])) for size in _SIZES)
        at = next((end for end in ends if end is not None), len(ids))
        return ids[at : at + most]

    def close(self) -> None:
        """Do nothing: a look-up has no resources to free."""


class Drafter:
    """A draft model: a second, smaller bundle with the same vocabulary, whose likeliest ids are proposed."""

    def __init__(self, bundle: Manifest, vocab_size: int) -> None:
        if bundle.model["vocab_size"] < vocab_size:
            raise RequestError(
                f"{bundle.root}: its vocabulary of {bundle.model['vocab_size']:,} is smaller than {vocab_size:,}: a "
                "draft model must have the tokenizer of the model that it drafts for"
            )
        self._session = Session(bundle, sequences=bundle.model["max_batch"])
        self._vocab_size = vocab_size
        self._left = bundle.model["max_batch"]  # sequences of the bundle that are free

    def begin(self) -> Draft:
        """Return a draft for one more text; a :class:`Lookup` if all sequences of the bundle are in use."""
        if not self._left:
            return Lookup()
        self._left -= 1
        return _Drafting(self, Context(self._session))

    def guesses(self, context: Context, ids: Sequence[int], most: int) -> list[int]:
        """Return the likeliest ids after ``ids``, by greedy decoding."""
        limit = self._session.limit
        if limit is not None:
            most = min(most, limit - len(ids) + 1)
        if most < 1 or not ids:
            return []
        try:
            logits, found = context.read(ids), []
        except RequestError:  # this bundle does not have one of the ids
            return []
        while logits is not None:
            found.append(int(np.argmax(logits[: self._vocab_size])))
            logits = context.next(found[-1]) if len(found) < most else None
        return found

    def end(self, context: Context) -> None:
        """Free the sequence of a text."""
        context.close()
        self._left += 1


class _Drafting:
    """The draft of one text by a draft model."""

    def __init__(self, drafter: Drafter, context: Context) -> None:
        self._drafter, self._context = drafter, context

    def propose(self, ids: Sequence[int], most: int) -> Sequence[int]:
        """Return at most ``most`` ids that may follow ``ids``."""
        return self._drafter.guesses(self._context, list(ids), most)

    def close(self) -> None:
        """Free the sequence of the text."""
        self._drafter.end(self._context)
