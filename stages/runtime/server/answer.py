"""Generates one answer: takes logits, samples the next token, and passes on the new text."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from stages.runtime.sampling import Sampler, Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from stages.runtime.server.drafts import Draft
    from stages.runtime.tokenizer import BundleTokenizer


class Mask(Protocol):
    """A grammar: decides which ids may come next."""

    def allowed(self) -> np.ndarray:
        """Return a boolean for every id that has a token."""

    def accept(self, token: int) -> None:
        """Advance past ``token``, which was allowed."""


@dataclass(frozen=True)
class AnswerOptions:
    """The settings by which an answer is generated.

    ``frequency_penalty`` is subtracted from the logit of an id for each time that it was generated,
    ``presence_penalty`` once; ``logit_bias`` is added. ``logprobs`` is the number of likeliest ids to return with each
    id, all with their log probabilities by the model itself, before any of these settings; None for no log
    probabilities. ``speculate`` is the number of ids that are drafted at once. With ``echo``, the text begins with the
    prompt, and ``max_tokens`` may be 0.
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
    echo: bool = False


@dataclass(frozen=True)
class Chosen:
    """One id with its log probability (None for the first of a text), and the likeliest ids in its place."""

    token: int
    logprob: float | None
    top: Sequence[tuple[int, float]]


def chosen(logits: np.ndarray, token: int, count: int) -> Chosen:
    """Return ``token`` and the ``count`` likeliest ids with log probabilities by ``logits``, float [active ids]."""
    logits = logits.astype(np.float64)
    logits -= logits.max()
    logits -= np.log(np.exp(logits).sum())
    count = min(count, len(logits))
    top = np.argpartition(-logits, count - 1)[:count] if count else np.empty(0, int)
    top = top[np.argsort(-logits[top], kind="stable")]
    return Chosen(token, float(logits[token]), [(int(other), float(logits[other])) for other in top])


class Scored:
    """The log probabilities of a prompt's ids, which are collected while the prompt is read."""

    def __init__(self, ids: Sequence[int], active: int, count: int) -> None:
        self._ids, self._active, self._count = ids, active, count
        self.chosen = [Chosen(ids[0], None, ())]

    def hear(self, rows: Sequence[np.ndarray]) -> None:
        """Add the ids that follow, given the logits before each of them."""
        for logits in rows:
            self.chosen.append(chosen(logits[: self._active], self._ids[len(self.chosen)], self._count))


class TextPiece(NamedTuple):
    """The next piece of an answer's text, which may be empty, and the id that completed it.

    ``token`` is None for text at the end of an answer, and for the echoed prompt. ``chosen`` has the log probability of
    the id, generated or echoed, if the request asks for log probabilities.
    """

    text: str
    chosen: Sequence[Chosen] = ()
    token: int | None = None


@dataclass(frozen=True)
class End:
    """The end of an answer, and the end-of-text id if the model ended it.

    ``finish`` is ``"stop"`` (the model ended it), ``"stop string"`` (the text contains one), ``"length"`` (it has
    ``max_tokens``) or ``"context"`` (the context is full).
    """

    finish: str
    token: int | None = None


@dataclass(frozen=True)
class Failure:
    """The error that ended an answer."""

    error: Exception


Event = TextPiece | End | Failure


class Answer:
    """Continues ``ids`` and calls ``deliver`` with every event; the scheduler appends the ids that were read.

    ``room`` is the maximum number of ids in the context, None for no limit. ``scored`` has the log probabilities of the
    prompt after it was read, if they are echoed.
    """

    def __init__(
        self,
        tokenizer: BundleTokenizer,
        ids: Sequence[int],
        options: AnswerOptions,
        *,
        vocab_size: int,
        seed: int,
        room: int | None,
        deliver: Callable[[Event], None],
        mask: Mask | None = None,
        draft: Callable[[], Draft] | None = None,
        scored: Scored | None = None,
    ) -> None:
        self._tokenizer, self._options, self._deliver, self._mask = tokenizer, options, deliver, mask
        self.ids = list(ids)
        self._active = min(vocab_size, tokenizer.active_vocab_size)
        self._sampler = Sampler(self._active, options.settings, seed=seed)
        self._room = room
        self._stream = tokenizer.stream(() if options.echo else self.ids)
        self._scored, self._begun = scored, False
        self._counts: Counter[int] = Counter()
        self._biased = np.array([*options.logit_bias], np.int64)
        self._biases = np.array([*options.logit_bias.values()], np.float32)
        self.generated = 0
        self._begin_draft = draft
        self._draft: Draft | None = None

    def draft(self, most: int) -> Sequence[int]:
        """Return at most ``most`` drafted ids; fewer near the end of the answer, as one more id is taken after them."""
        most = min(most, self._options.speculate, self._options.max_tokens - self.generated - 1)
        if self._room is not None:
            most = min(most, self._room - len(self.ids))
        if most < 1 or self._begin_draft is None:
            return ()
        if self._draft is None:
            self._draft = self._begin_draft()
        return self._draft.propose(self.ids, most)

    def close(self) -> None:
        """Free the resources of the draft."""
        if self._draft is not None:
            self._draft.close()

    def take(self, logits: np.ndarray) -> int | None:
        """Return the id that follows :attr:`ids`, given the logits after them; None if the answer is over."""
        try:
            return self._take(logits)
        except Exception as error:  # noqa: BLE001 - the error of one answer must not end the others
            self.fail(error)
            return None

    def fail(self, error: Exception) -> None:
        """End the answer with an error."""
        self._deliver(Failure(error))

    def _take(self, logits: np.ndarray) -> int | None:
        if not self._begun:
            self._begin()
            if self._options.max_tokens == 0:
                self._end("length")
                return None
        token = self._sampler.pick(self._adjusted(logits), self.ids)
        count = self._options.logprobs
        logprobs = () if count is None else (chosen(logits[: self._active], token, count),)
        if token in self._tokenizer.stop:
            self._end("stop", token)
            return None
        self.generated += 1
        self._counts[token] += 1
        if self._mask is not None:
            self._mask.accept(token)
        shown = self._options.specials and self._tokenizer.is_special(token)
        text = self._stream.add(self._tokenizer.piece(token) or b"") if shown else self._stream.step(token)
        self._deliver(TextPiece(text, logprobs, token))
        finish = self._finish()
        if finish:
            self._end(finish)
        return None if finish else token

    def _finish(self) -> str:
        """Return why the answer ends here without an end-of-text id, an empty string if it goes on."""
        if self._stream.stopped is not None:
            return "stop string"
        if self.generated == self._options.max_tokens:
            return "length"
        return "context" if len(self.ids) == self._room else ""

    def _begin(self) -> None:
        """Deliver the prompt, if it is echoed; stop strings in it do not count."""
        self._begun = True
        if self._scored is not None:
            for each in self._scored.chosen:
                self._deliver(TextPiece(self._stream.step(each.token), (each,)))
        elif self._options.echo:
            self._deliver(TextPiece("".join(map(self._stream.step, self.ids))))
        self._stream.stop_at(self._options.stops)

    def _end(self, finish: str, token: int | None = None) -> None:
        if text := self._stream.finish():
            self._deliver(TextPiece(text))
        self._deliver(End(finish, token))

    def _adjusted(self, logits: np.ndarray) -> np.ndarray:
        """Return the logits after penalties, biases and mask: a copy if log probabilities are needed, else in place."""
        options = self._options
        penalised = bool(self._counts) and bool(options.frequency_penalty or options.presence_penalty)
        if not penalised and not options.logit_bias and self._mask is None:
            return logits
        if options.logprobs is not None:
            logits = logits.copy()
        if penalised:
            counts = np.fromiter(self._counts.values(), np.float32, len(self._counts))
            logits[[*self._counts]] -= options.frequency_penalty * counts + options.presence_penalty
        if options.logit_bias:
            logits[self._biased] += self._biases
        if self._mask is not None:
            logits[: self._active][~self._mask.allowed()[: self._active]] = -np.inf
        return logits
