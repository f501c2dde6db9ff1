"""The loop from a prompt's ids to streamed text, with its counts and times."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from stages.runtime.context import Context
    from stages.runtime.sampling import Sampler
    from stages.runtime.stream import TextStream
    from stages.runtime.tokenizer import BundleTokenizer


@dataclass
class Generation:
    """One continuation: iterate :meth:`text` to run it; afterwards the fields tell what happened.

    ``finish`` is ``"stop"`` (the model ended its text), ``"stop string"`` (one of ``stops`` came), ``"length"``
    (``max_tokens``), ``"context"`` (it is full) or ``"interrupt"`` (``interrupted`` said so). ``prefilled`` is how
    many tokens of the prompt were read: those that the context already held were not. Times are in seconds.
    """

    prompt: Sequence[int]
    max_tokens: int
    stops: Sequence[bytes] = ()
    specials: bool = False  # whether special tokens are part of the text
    interrupted: Callable[[], bool] = lambda: False
    ids: list[int] = field(default_factory=list)
    finish: str = "length"
    prefilled: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    decode_steps: int = 0

    def text(self, context: Context, tokenizer: BundleTokenizer, sampler: Sampler) -> Iterator[str]:
        """Yield the pieces of text as they become complete characters."""
        stream = tokenizer.stream(self.prompt)
        stream.stop_at(self.stops)
        started = time.perf_counter()
        logits = context.read(self.prompt, self.interrupted)
        self.prefill_seconds = time.perf_counter() - started
        self.prefilled = len(context.ids) - context.reused
        if logits is None:
            self.finish = "interrupt"
        while logits is not None:
            token = sampler.pick(logits, context.ids)
            if token in tokenizer.stop:
                self.finish = "stop"
                yield self._shown(token, tokenizer, stream) if self.specials else ""
                break
            self.ids.append(token)
            yield self._shown(token, tokenizer, stream)
            if finish := self._ended(context, stream):
                self.finish = finish
                break
            started = time.perf_counter()
            logits = context.next(token)
            self.decode_seconds += time.perf_counter() - started
            self.decode_steps += 1
        yield stream.finish()

    def plain_text(self, tokenizer: BundleTokenizer) -> str:
        """Return the whole text, without special tokens whatever ``specials`` says."""
        stream = tokenizer.stream(self.prompt)
        stream.stop_at(self.stops)
        return "".join([*map(stream.step, self.ids), stream.finish()])

    def _shown(self, token: int, tokenizer: BundleTokenizer, stream: TextStream) -> str:
        if self.specials and tokenizer.is_special(token):
            return stream.add(tokenizer.piece(token) or b"")
        return stream.step(token)

    def _ended(self, context: Context, stream: TextStream) -> str:
        if stream.stopped is not None:
            return "stop string"
        if len(self.ids) == self.max_tokens:
            return "length"
        if context.full:
            return "context"
        return "interrupt" if self.interrupted() else ""

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens read per second."""
        return self.prefilled / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """Decoded tokens per second; 0 where nothing was decoded."""
        return self.decode_steps / self.decode_seconds if self.decode_seconds else 0.0
