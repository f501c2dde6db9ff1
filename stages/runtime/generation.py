"""The loop from a prompt's ids to streamed text, with its counts and times."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from stages.runtime.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from stages.runtime.sampling import Sampler
    from stages.runtime.session import Session
    from stages.runtime.tokenizer import BundleTokenizer


@dataclass
class Generation:
    """One continuation: iterate :meth:`text` to run it; afterwards the fields tell what happened.

    ``finish`` is ``"stop"`` (the model ended its text), ``"length"`` (``max_tokens``) or ``"context"`` (it is full).
    Times are in seconds.
    """

    prompt: Sequence[int]
    ids: list[int] = field(default_factory=list)
    finish: str = "length"
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    decode_steps: int = 0

    def text(self, session: Session, tokenizer: BundleTokenizer, sampler: Sampler, max_tokens: int) -> Iterator[str]:
        """Yield the pieces of text as they become complete characters."""
        if max_tokens < 1:
            raise RequestError(f"max_tokens {max_tokens} is not above 0")
        sequence = session.add()
        try:
            started = time.perf_counter()
            logits = session.prefill(sequence, self.prompt)
            self.prefill_seconds = time.perf_counter() - started
            stream = tokenizer.stream(self.prompt)
            while True:
                token = sampler.pick(logits)
                if token in tokenizer.stop:
                    self.finish = "stop"
                    break
                self.ids.append(token)
                yield stream.step(token)
                if len(self.ids) == max_tokens:
                    break
                if session.full(sequence):
                    self.finish = "context"
                    break
                started = time.perf_counter()
                logits = session.decode(sequence, token)
                self.decode_seconds += time.perf_counter() - started
                self.decode_steps += 1
            yield stream.finish()
        finally:
            session.remove(sequence)

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second."""
        return len(self.prompt) / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """Decoded tokens per second; 0 where nothing was decoded."""
        return self.decode_steps / self.decode_seconds if self.decode_seconds else 0.0
