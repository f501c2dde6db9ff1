"""The scheduler's interfaces: a job, which is a sequence of tokens to continue, and the model that reads it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy as np


class JobModel(Protocol):
    """What the scheduler needs of a loaded bundle; :class:`stages.runtime.session.Session` is one.

    ``page_size`` is None where a sequence takes the same room whatever its length, and is forked where it is, or a few
    tokens before.
    """

    max_batch: int
    prefill_chunk: int
    verify_chunk: int

    @property
    def page_size(self) -> int | None:
        """Tokens of a page."""

    @property
    def spare(self) -> int:
        """How many sequences may be held beside those that are read."""

    @property
    def free_pages(self) -> int:
        """How many pages no sequence has."""

    def add(self) -> int:
        """Start an empty sequence."""

    def fork(self, sequence: int, length: int) -> int:
        """Start a sequence with the first tokens of another."""

    def remove(self, sequence: int) -> None:
        """Forget a sequence."""

    def batch_prefill(self, requests: Mapping[int, Sequence[int]]) -> np.ndarray:
        """Read several tokens of each sequence; the logits [b, V] after them."""

    def batch_decode(self, tokens: Mapping[int, int]) -> np.ndarray:
        """Read one token of each sequence; the logits [b, V] after them."""

    def batch_verify(self, requests: Mapping[int, Sequence[int]]) -> Sequence[np.ndarray]:
        """Read several tokens of each sequence, ``verify_chunk`` in all at most; the logits [n, V] after each."""

    def popn(self, sequence: int, count: int) -> None:
        """Take the last tokens of a sequence back."""

    def reach(self, sequence: int) -> int:
        """Return how many tokens of a sequence can be taken back."""


@dataclass(eq=False)
class Job:
    """One text to continue: ``ids``, which what is picked is added to.

    ``take`` is given the logits after the ids and returns the next id, or None where the text is over. A job whose
    ``leader`` has the same prompt waits until that was read. ``draft`` guesses what is picked next, at most so many
    ids; ``drafted`` and ``accepted`` count its guesses and those that were right. ``score`` is told the logits after
    each id of the prompt but the last, ``scored`` counts them. ``cached`` is how many ids were not read when it first
    began, because another sequence held them.
    """

    ids: list[int]
    take: Callable[[np.ndarray], int | None]
    leader: Job | None = None
    draft: Callable[[int], Sequence[int]] | None = None
    score: Callable[[Sequence[np.ndarray]], None] | None = None
    cached: int = 0
    drafted: int = 0
    accepted: int = 0
    sequence: int | None = field(default=None, init=False)
    read: int = field(default=0, init=False)  # how many of the ids its sequence holds
    prompt: int = field(init=False)
    scored: int = field(default=0, init=False)
    begun: bool = field(default=False, init=False)
    over: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.prompt = len(self.ids)

    @property
    def pending(self) -> int:
        """How many of its ids are still to be read."""
        return len(self.ids) - self.read

    @property
    def scores(self) -> bool:
        """Whether it waits for logits of its prompt."""
        return self.score is not None and self.scored < self.prompt - 1

    @property
    def follows(self) -> bool:
        """Whether it waits for its leader."""
        return self.leader is not None and not self.leader.over and self.leader.read < self.leader.prompt
