"""Runs the scheduler of a loaded bundle in a thread; other threads submit and cancel answers."""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING

from stages.runtime.errors import RequestError
from stages.runtime.server.answer import Answer, AnswerOptions, Scored
from stages.runtime.server.drafts import Drafter, Lookup
from stages.runtime.server.grammar import Grammars
from stages.runtime.server.jobs import Job
from stages.runtime.server.scheduler import CHUNK, Scheduler
from stages.runtime.session import Session
from stages.runtime.tokenizer import BundleTokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from stages.runtime.manifest import Manifest
    from stages.runtime.server.answer import Event, Mask

SPARE = 256  # sequences kept for prompts that begin alike, at most; they share pages


class BusyError(Exception):
    """There is no room in the queue."""


class ClosingError(Exception):
    """No more answers are begun."""


class Engine:
    """Makes many answers of one bundle at a time, in a thread of its own.

    ``tokens`` is how many the KV cache holds (default: a whole context for each of ``sequences``, which are read at
    once; default: what the library was built for); ``queue`` how many answers may wait. ``speculate`` is how many ids
    are guessed at once where a request does not say, by the bundle ``draft``, or where there is none by the text
    itself. :class:`BundleError` where the bundle cannot be used here.
    """

    def __init__(
        self,
        bundle: Manifest,
        *,
        sequences: int | None = None,
        tokens: int | None = None,
        queue: int = 64,
        speculate: int = 0,
        draft: Manifest | None = None,
        tokenizer: BundleTokenizer | None = None,
    ) -> None:
        self.manifest, self.name = bundle, bundle.name
        self.tokenizer = tokenizer or BundleTokenizer(bundle.folder)
        self.grammars = Grammars(self.tokenizer)
        window, paged = bundle.model["context_window"], bundle.model.get("state", "kv") == "kv"
        if tokens is not None and tokens < window:
            raise RequestError(f"a KV cache of {tokens:,} tokens is smaller than one context of {window:,}")
        rows = bundle.model["max_batch"] if sequences is None else sequences
        spare = SPARE if paged else -(-rows // 2)  # a recurrent model's states take memory each
        self._session = Session(bundle, sequences=rows, spare=spare, tokens=tokens if paged else None)
        self._session.max_batch = rows
        self.limit = self._session.limit  # the most tokens of one sequence
        self.vocab_size = self._session.vocab_size
        self.can_speculate = self._session.verify_chunk > 0
        if speculate and not self.can_speculate:
            raise RequestError(
                f"{bundle.root}: speculative decoding (--speculate) is not available for recurrent models"
            )
        self.speculate = speculate
        self._begin_draft = Lookup if draft is None else Drafter(draft, self.tokenizer.active_vocab_size).begin
        # A GPU reads thousands of tokens in the time of tens.
        chunk = CHUNK if bundle.device == "cpu" else self._session.prefill_chunk
        self.scheduler = Scheduler(self._session, chunk=chunk)
        self.pages = self.free_pages = self._session.free_pages  # in all, and those that nothing holds
        self._queue = queue
        self._inbox: deque[tuple[str, Job]] = deque()
        self._answers: dict[Job, Answer] = {}
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=f"engine of {self.name}", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """How many answers are not begun."""
        return len(self.scheduler.waiting) + len(self._inbox)

    @property
    def alive(self) -> bool:
        """Whether answers are made: not after an error of the library."""
        return self._thread.is_alive()

    def submit(
        self,
        prompt: Sequence[int],
        options: AnswerOptions,
        seeds: Sequence[int],
        deliver: Callable[[int, Event], None],
        masks: Callable[[], Mask | None] = lambda: None,
    ) -> list[tuple[Job, Answer]]:
        """Begin an answer for each of the ``seeds``; ``deliver`` is told their events, in the engine's thread.

        :class:`RequestError` for a prompt that has no room, :class:`BusyError` where too many wait already.
        """
        if self.limit is not None and len(prompt) > self.limit:
            raise RequestError(
                f"the context holds {self.limit:,} tokens and the prompt has {len(prompt):,}: shorten it, or build "
                "the bundle with a larger context_window"
            )
        if not prompt:
            raise RequestError("the prompt is empty: give a text to continue")
        wrong = next((token for token in prompt if not 0 <= token < self.vocab_size), None)
        if wrong is not None:
            raise RequestError(f"token id {wrong} is outside the vocabulary of {self.vocab_size:,}")
        made: list[tuple[Job, Answer]] = []
        scored = None
        if options.echo and options.logprobs is not None:
            scored = Scored(prompt, min(self.vocab_size, self.tokenizer.active_vocab_size), options.logprobs)
        for index, seed in enumerate(seeds):
            answer = Answer(
                self.tokenizer,
                prompt,
                options,
                vocab_size=self.vocab_size,
                seed=seed,
                room=self.limit,
                deliver=_bound(deliver, index),
                mask=masks(),
                draft=self._begin_draft if options.speculate else None,
                scored=scored,
            )
            job = Job(answer.ids, answer.take, draft=answer.draft if options.speculate else None)
            if made:
                job.leader = made[0][0]
            elif scored is not None:
                job.score = scored.hear  # of the first: the others wait until it has read the prompt
            made.append((job, answer))
        with self._changed:
            if self._closing or not self.alive:
                raise ClosingError
            if self.waiting >= self._queue:
                raise BusyError
            for job, answer in made:
                self._answers[job] = answer
                self._inbox.append(("submit", job))
            self._changed.notify()
        return made

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Call off these answers, as far as they are not over; they get no more events."""
        with self._changed:
            self._inbox.extend(("cancel", job) for job in jobs if not job.over)
            self._changed.notify()

    def close(self) -> None:
        """Begin nothing more, end what there is, and wait for the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    # In the thread

    def _run(self) -> None:
        busy = False
        try:
            while self._take_in(wait=not busy):
                busy = self.scheduler.step()
                self.free_pages = self._session.free_pages
                for job in [job for job in self._answers if job.over]:
                    self._answers.pop(job).close()
        finally:
            for job, answer in self._answers.items():
                if not job.over:
                    answer.fail(ClosingError())
            self._answers.clear()

    def _take_in(self, *, wait: bool) -> bool:
        """Hand what came to the scheduler, if need be once something has come; False once it is to close."""
        with self._changed:
            while wait and not self._inbox and not self._closing:
                self._changed.wait()
            came, closing = [*self._inbox], self._closing
            self._inbox.clear()
        for what, job in came:
            getattr(self.scheduler, what)(job)
        return not closing


def _bound(deliver: Callable[[int, Event], None], index: int) -> Callable[[Event], None]:
    return lambda event: deliver(index, event)
