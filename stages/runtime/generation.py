"""One continuation by an engine: its text as it comes, with its counts and times."""

from __future__ import annotations

import queue
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from stages.runtime.errors import BundleError
from stages.runtime.server.answer import AnswerOptions, End, Failure
from stages.runtime.server.engine import ClosingError, Engine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from stages.runtime.server.answer import Event
    from stages.runtime.tokenizer import BundleTokenizer

_LOOK = 0.1  # seconds until it is looked again whether Ctrl-C came


@dataclass
class Generation:
    """One continuation: iterate :meth:`text` to run it; afterwards the fields tell what happened.

    ``finish`` is that of the answer (:class:`stages.runtime.server.answer.End`), or ``"interrupt"`` where
    ``interrupted`` said so. ``prefilled`` is how many tokens of the prompt were read: those that the engine already
    held were not. Times are in seconds.
    """

    prompt: Sequence[int]
    options: AnswerOptions
    seed: int = 0
    interrupted: Callable[[], bool] = lambda: False
    ids: list[int] = field(default_factory=list)
    finish: str = "interrupt"
    prefilled: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    decode_steps: int = 0

    def text(self, engine: Engine) -> Iterator[str]:
        """Yield the pieces of text as they become complete characters."""
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        started = time.perf_counter()
        ((job, _),) = engine.submit(self.prompt, self.options, [self.seed], lambda _, event: events.put(event))
        first = 0.0
        try:
            while (event := self._next(events)) is not None:
                if isinstance(event, Failure):
                    raise _failed(engine, event.error)
                now = time.perf_counter()
                if not first:
                    first, self.prefill_seconds, self.prefilled = now, now - started, job.prompt - job.cached
                elif event.token is not None:
                    self.decode_seconds, self.decode_steps = now - first, self.decode_steps + 1
                if isinstance(event, End):
                    self.finish = event.finish
                    if event.token is not None and self.options.specials:
                        yield (engine.tokenizer.piece(event.token) or b"").decode(errors="replace")
                    return
                self.ids += [] if event.token is None else [event.token]
                yield event.text
        finally:
            engine.cancel([job])

    def plain_text(self, tokenizer: BundleTokenizer) -> str:
        """Return the whole text, without special tokens whatever the options say."""
        stream = tokenizer.stream(self.prompt)
        stream.stop_at(self.options.stops)
        return "".join([*map(stream.step, self.ids), stream.finish()])

    def _next(self, events: queue.SimpleQueue[Event]) -> Event | None:
        """Return the next event, None after Ctrl-C."""
        while not self.interrupted():
            try:
                return events.get(timeout=_LOOK)
            except queue.Empty:
                continue
        return None

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens read per second."""
        return self.prefilled / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """Decoded tokens per second; 0 where nothing was decoded."""
        return self.decode_steps / self.decode_seconds if self.decode_seconds else 0.0


def _failed(engine: Engine, error: Exception) -> Exception:
    if isinstance(error, ClosingError):
        return BundleError(f"{engine.manifest.root}: the library failed while it was answering")
    return error
