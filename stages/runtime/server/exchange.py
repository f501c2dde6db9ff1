"""Carries one request's answers from the thread that generates tokens to the event loop that sends them."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import TYPE_CHECKING

from stages.runtime.errors import RequestError
from stages.runtime.server.answer import End, Event, Failure, TextPiece
from stages.runtime.server.engine import BusyError, ClosingError
from stages.runtime.server.errors import ApiError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from stages.runtime.server.answer import Answer
    from stages.runtime.server.documents import Choice, Completion, Refusal, Usage
    from stages.runtime.server.engine import Engine
    from stages.runtime.server.jobs import Job
    from stages.runtime.server.requests import Wanted
    from stages.runtime.server.responses import Form

# The ways in which an answer ends -> finish_reason in the API.
_FINISHES = {"stop": "stop", "stop string": "stop", "length": "length", "context": "length"}


class Exchange:
    """The answers to one request, which are started at once; :class:`ApiError` if they cannot be. Must be closed.

    ``seconds`` is the time limit for all answers; ``first`` is called when the first token arrives.
    """

    def __init__(
        self, engine: Engine, wanted: Wanted, form: Form, *, seconds: float, first: Callable[[], None] = lambda: None
    ) -> None:
        self._engine, self._wanted, self._form, self._first = engine, wanted, form, first
        self._loop = asyncio.get_running_loop()
        self.outcome = "left"  # unless it becomes "done" or "failed": the client disconnected
        self._deadline = self._loop.time() + seconds
        self._seconds = seconds
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._made: list[tuple[Job, Answer]] = []
        try:
            for prompt in wanted.prompts:
                self._begin(prompt)
        except ApiError:
            self.close()
            raise

    def _begin(self, prompt: Sequence[int]) -> None:
        first = len(self._made)

        def deliver(index: int, event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed, so nobody waits for the event
                self._loop.call_soon_threadsafe(self._events.put_nowait, (first + index, event))

        try:
            wanted = self._wanted
            self._made += self._engine.submit(prompt, wanted.options, wanted.seeds, deliver, wanted.masks)
        except RequestError as error:
            raise ApiError(str(error), code="context_length_exceeded" if "context" in str(error) else None) from None
        except BusyError:
            raise ApiError("too many requests are waiting; try again later", status=429, retry=1) from None
        except ClosingError:
            raise ApiError("the server is shutting down", status=503, retry=5) from None

    def close(self) -> None:
        """Cancel unfinished answers; their pages are free before the next step."""
        self._engine.cancel([job for job, _ in self._made])

    async def whole(self) -> Completion:
        """Return the response with all complete answers."""
        pieces: list[list[TextPiece]] = [[] for _ in self._made]
        finishes = [""] * len(self._made)
        async for index, event in self._all():
            if isinstance(event, TextPiece):
                pieces[index].append(event)
            else:
                finishes[index] = _FINISHES[event.finish]
        choices: list[Choice] = [
            {"index": at, **self._form.choice(at, texts, finish)}
            for at, (texts, finish) in enumerate(zip(pieces, finishes, strict=True))
        ]
        return {**self._form.envelope(choices, chunk=False), "usage": self.usage()}

    async def stream(self) -> AsyncIterator[str]:
        """Yield the answers as server-sent events."""
        try:
            if (opening := self._form.opening()) is not None:
                for at in range(len(self._made)):
                    yield self._chunk(at, opening)
            async for index, event in self._all():
                if isinstance(event, End):
                    yield self._chunk(index, self._form.closing(index, _FINISHES[event.finish]))
                elif (delta := self._form.delta(index, event)) is not None:
                    yield self._chunk(index, delta)
            if self._wanted.include_usage:
                yield _event({**self._form.envelope([], chunk=True), "usage": self.usage()})
            yield "data: [DONE]\n\n"
        except ApiError as error:
            yield _event(error.document())

    def usage(self) -> Usage:
        """Return the numbers of tokens that were read, generated, cached and drafted."""
        count = len(self._wanted.seeds)
        prompt = sum(map(len, self._wanted.prompts))
        made = sum(answer.generated for _, answer in self._made)
        right = sum(job.accepted for job, _ in self._made)
        cached = sum(job.cached for job, _ in self._made[::count])
        return {
            "prompt_tokens": prompt,
            "completion_tokens": made,
            "total_tokens": prompt + made,
            "prompt_tokens_details": {"cached_tokens": cached},
            "completion_tokens_details": {
                "accepted_prediction_tokens": right,
                "rejected_prediction_tokens": sum(job.drafted for job, _ in self._made) - right,
            },
        }

    async def _all(self) -> AsyncIterator[tuple[int, TextPiece | End]]:
        """Yield the events of all answers until the last has ended."""
        left, begun = len(self._made), False
        while left:
            try:
                async with asyncio.timeout_at(self._deadline):
                    index, event = await self._events.get()
            except TimeoutError:
                self.outcome = "failed"
                raise ApiError(
                    f"the request was not answered within {self._seconds:g} seconds", status=504, code="timeout"
                ) from None
            if not begun:
                begun = True
                self._first()
            if isinstance(event, Failure):
                self.outcome = "failed"
                raise _failed(event.error)
            left -= isinstance(event, End)
            yield index, event
            if not self._events.empty():
                await asyncio.sleep(0)  # a client that has left is noticed only while this task waits
        self.outcome = "done"

    def _chunk(self, index: int, content: Choice) -> str:
        chunk = self._form.envelope([{"index": index, "finish_reason": None, **content}], chunk=True)
        return _event({**chunk, "usage": None} if self._wanted.include_usage else chunk)


def _failed(error: Exception) -> ApiError:
    if isinstance(error, ClosingError):
        return ApiError("the server is shutting down", status=503, retry=5)
    if isinstance(error, RequestError):
        return ApiError(str(error))
    return ApiError(f"internal error while generating the answer: {type(error).__name__}", status=500)


def _event(document: Completion | Refusal) -> str:
    return f"data: {json.dumps(document, ensure_ascii=False)}\n\n"
