"""One answer as it is made: logits go in, the next id comes out, and its text goes to whoever waits for it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

from stages.runtime.sampling import Sampler, Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from stages.runtime.server.drafts import Draft
    from stages.runtime.tokenizer import BundleTokenizer


class Mask(Protocol):
    """What says which ids may come next: a grammar."""

    def allowed(self) -> np.ndarray:
        """Return a boolean for every id that has a token."""

    def accept(self, token: int) -> None:
        """Go on after an id that was allowed."""


@dataclass(frozen=True)
class Options:
    """How an answer is made.

    ``frequency_penalty`` is taken from the logit of an id for each time that it was generated, ``presence_penalty``
    once; ``logit_bias`` is added. ``logprobs`` asks for the log probability of every id and of so many likeliest
    beside it; the model's own, before any of these settings. ``speculate`` is how many ids are guessed at once.
    """

    settings: Settings = field(default_factory=Settings)
    max_tokens: int = 16
    stops: tuple[bytes, ...] = ()
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    speculate: int = 0
    specials: bool = False  # whether special tokens are part of the text


@dataclass(frozen=True)
class Chosen:
    """One id with its log probability, and the likeliest ids in its place with theirs."""

    token: int
    logprob: float
    top: Sequence[tuple[int, float]]


@dataclass(frozen=True)
class Piece:
    """Some more text, which may be none, and the ids that came with it, if log probabilities were asked for."""

    text: str
    chosen: Sequence[Chosen] = ()


@dataclass(frozen=True)
class End:
    """The end of an answer: ``"stop"`` (the model's, or a stop string), or ``"length"``."""

    finish: str


@dataclass(frozen=True)
class Failure:
    """What ended an answer that could not be made."""

    error: Exception


Event = Piece | End | Failure


class Answer:
    """Continues ``ids``, which whoever reads them adds to; ``deliver`` hears of everything.

    ``room`` is the most ids there can be in all, None for any number.
    """

    def __init__(
        self,
        tokenizer: BundleTokenizer,
        ids: Sequence[int],
        options: Options,
        *,
        vocab_size: int,
        seed: int,
        room: int | None,
        deliver: Callable[[Event], None],
        mask: Mask | None = None,
        draft: Callable[[], Draft] | None = None,
    ) -> None:
        self._tokenizer, self._options, self._deliver, self._mask = tokenizer, options, deliver, mask
        self.ids = list(ids)
        self._active = min(vocab_size, tokenizer.active_vocab_size)
        self._sampler = Sampler(self._active, options.settings, seed=seed)
        self._room = room
        self._stream = tokenizer.stream(self.ids)
        self._stream.stop_at(options.stops)
        self._counts: Counter[int] = Counter()
        self.generated = 0
        self._begin_draft = draft
        self._draft: Draft | None = None

    def draft(self, most: int) -> Sequence[int]:
        """Return ids that may be taken next, of which the last is not the answer's last; at most so many."""
        most = min(most, self._options.speculate, self._options.max_tokens - self.generated - 1)
        if self._room is not None:
            most = min(most, self._room - len(self.ids) - 1)
        if most < 1 or self._begin_draft is None:
            return ()
        if self._draft is None:
            self._draft = self._begin_draft()
        return self._draft.propose(self.ids, most)

    def close(self) -> None:
        """Let go of what guessed."""
        if self._draft is not None:
            self._draft.close()

    def take(self, logits: np.ndarray) -> int | None:
        """Return the id that follows :attr:`ids`, given the logits after them; None if the answer is over."""
        try:
            return self._take(logits)
        except Exception as error:  # noqa: BLE001 - what one answer stumbles over must not end the others
            self.fail(error)
            return None

    def fail(self, error: Exception) -> None:
        """End the answer with what went wrong."""
        self._deliver(Failure(error))

    def _take(self, logits: np.ndarray) -> int | None:
        token = self._sampler.pick(self._adjusted(logits), self.ids)
        chosen = () if self._options.logprobs is None else (self._chosen(logits, token),)
        if token in self._tokenizer.stop:
            self._end("stop")
            return None
        self.generated += 1
        self._counts[token] += 1
        if self._mask is not None:
            self._mask.accept(token)
        shown = self._options.specials and self._tokenizer.is_special(token)
        text = self._stream.add(self._tokenizer.piece(token) or b"") if shown else self._stream.step(token)
        self._deliver(Piece(text, chosen))
        full = self.generated == self._options.max_tokens or len(self.ids) + 1 == self._room
        if full or self._stream.stopped is not None:
            self._end("length" if self._stream.stopped is None else "stop")
            return None
        return token

    def _end(self, finish: str) -> None:
        if text := self._stream.finish():
            self._deliver(Piece(text))
        self._deliver(End(finish))

    def _adjusted(self, logits: np.ndarray) -> np.ndarray:
        """Return the logits with what the options add and take away: changed in place where nobody asks for them."""
        options = self._options
        counted = self._counts if options.frequency_penalty or options.presence_penalty else {}
        if not counted and not options.logit_bias and self._mask is None:
            return logits
        if options.logprobs is not None:
            logits = logits.copy()
        for token, count in counted.items():
            logits[token] -= options.frequency_penalty * count + options.presence_penalty
        for token, bias in options.logit_bias.items():
            logits[token] += bias
        if self._mask is not None:
            logits[: self._active][~self._mask.allowed()[: self._active]] = -np.inf
        return logits

    def _chosen(self, logits: np.ndarray, token: int) -> Chosen:
        logits = logits[: self._active].astype(np.float64)
        logits -= logits.max()
        logits -= np.log(np.exp(logits).sum())
        count = min(self._options.logprobs or 0, self._active)
        top = np.argpartition(-logits, count - 1)[:count] if count else np.empty(0, int)
        top = top[np.argsort(-logits[top], kind="stable")]
        return Chosen(token, float(logits[token]), [(int(other), float(logits[other])) for other in top])
