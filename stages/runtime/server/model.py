"""The Python API of a bundle: ``load("bundle").chat("Hello")``, concurrent, streamed or whole, sync or async."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import queue
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypedDict

from stages.runtime import manifest as manifests
from stages.runtime.errors import BundleError, RequestError
from stages.runtime.sampling import Settings, of_checkpoint
from stages.runtime.server.answer import Answer, AnswerOptions, End, Event, TextPiece
from stages.runtime.server.drafts import MOST
from stages.runtime.server.engine import Engine
from stages.runtime.server.errors import ApiError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
    from typing import Unpack

    from stages.runtime.documents import JsonObject
    from stages.runtime.server.answer import Mask
    from stages.runtime.server.jobs import Job


class RequestOptions(TypedDict, total=False):
    """The options of a request; those that are absent have the checkpoint's defaults, or else decode greedily.

    The answer ends before any of the texts ``stop``, after ``max_tokens`` tokens, or when the model or the context ends
    it. It fits the JSON schema ``schema`` (needs llguidance). ``speculate`` tokens are drafted at once (0: none), which
    changes the speed only. The same ``seed`` (default 0) gives the same answer.
    """

    max_tokens: int
    speculate: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int
    stop: Sequence[str]
    schema: JsonObject


@dataclass(frozen=True)
class Reply:
    """A whole answer: its text, and why it ended: ``"stop"``, ``"stop string"``, ``"length"`` or ``"context"``.

    Of ``prompt_tokens`` so many as ``cached_tokens`` were held already; ``generated_tokens`` were made.
    """

    text: str
    finish: str
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int


class Stream:
    """An answer as it comes: iterate it, with ``for`` or ``async for``, once; :attr:`reply` is all of it afterwards.

    It begins when it is first asked for something, and is called off when the iteration is left.
    """

    def __init__(self, begin: Callable[[Callable[[int, Event], None]], tuple[Job, Answer]], engine: Engine) -> None:
        self._begin, self._engine = begin, engine
        self._text: list[str] = []
        self.reply: Reply | None = None

    def __iter__(self) -> Iterator[str]:
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        with self._begun(lambda _, event: events.put(event)) as made:
            while self.reply is None:
                if text := self._heard(events.get(), made):
                    yield text

    async def __aiter__(self) -> AsyncIterator[str]:
        events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def deliver(_: int, event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits for it
                loop.call_soon_threadsafe(events.put_nowait, event)

        with self._begun(deliver) as made:
            while self.reply is None:
                if text := self._heard(await events.get(), made):
                    yield text

    @contextlib.contextmanager
    def _begun(self, deliver: Callable[[int, Event], None]) -> Iterator[tuple[Job, Answer]]:
        job, answer = self._begin(deliver)
        try:
            yield job, answer
        finally:
            self._engine.cancel([job])

    def _heard(self, event: Event, made: tuple[Job, Answer]) -> str:
        if isinstance(event, TextPiece):
            self._text.append(event.text)
            return event.text
        if not isinstance(event, End):
            raise event.error
        job, answer = made
        self.reply = Reply("".join(self._text), event.finish, job.prompt, job.cached, answer.generated)
        return ""


class Model:
    """A loaded bundle that any number of threads and tasks may ask at once; to be closed, or used with ``with``."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.name = engine.name

    def chat(
        self, messages: str | Sequence[JsonObject], *, system: str | None = None, **request: Unpack[RequestOptions]
    ) -> Reply:
        """Return the answer to a conversation, or to one message of the user.

        ``messages`` have a ``role`` and a ``content`` each, as the model's template knows them. :class:`RequestError`
        for a conversation that it refuses, or that the context does not hold.
        """
        return _whole(self.stream(messages, system=system, **request))

    def complete(self, prompt: str, **request: Unpack[RequestOptions]) -> Reply:
        """Return how a text goes on."""
        return _whole(self._stream(self._engine.tokenizer.prompt(prompt), {}, request))

    def stream(
        self, messages: str | Sequence[JsonObject], *, system: str | None = None, **request: Unpack[RequestOptions]
    ) -> Stream:
        """Return the answer to a conversation as it comes."""
        ids = self._engine.tokenizer.chat(messages, system=system)
        return self._stream(ids, of_checkpoint(self._engine.manifest.sampling), request)

    async def chat_async(
        self, messages: str | Sequence[JsonObject], *, system: str | None = None, **request: Unpack[RequestOptions]
    ) -> Reply:
        """Return the answer to a conversation, while others are made."""
        stream = await asyncio.to_thread(self.stream, messages, system=system, **request)
        async for _ in stream:
            pass
        return _reply(stream)

    def close(self) -> None:
        """End what is being answered, and let the bundle go."""
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _stream(self, ids: Sequence[int], usual: Mapping[str, float], request: RequestOptions) -> Stream:
        names = [field.name for field in dataclasses.fields(Settings)]
        settings = Settings(**{**usual, **{name: request[name] for name in names if name in request}})  # type: ignore[literal-required]
        limit, stops = request.get("max_tokens", 2**31), request.get("stop", ())
        if limit < 1 or isinstance(stops, str) or not all(stops):
            raise RequestError("max_tokens must be above 0, and stop a list of texts that are not empty")
        speculate = request.get("speculate", self._engine.speculate)
        if not 0 <= speculate <= MOST or (speculate and not self._engine.can_speculate):
            raise RequestError(f"speculate must be from 0 to {MOST}, and 0 for a recurrent model")
        encoded = tuple(stop.encode() for stop in stops)
        options = AnswerOptions(settings, limit, encoded, speculate=speculate)
        masks = self._masks(request.get("schema"))

        def begin(deliver: Callable[[int, Event], None]) -> tuple[Job, Answer]:
            return self._engine.submit(ids, options, [request.get("seed", 0)], deliver, masks)[0]

        return Stream(begin, self._engine)

    def _masks(self, schema: JsonObject | None) -> Callable[[], Mask | None]:
        if schema is None:
            return lambda: None
        try:
            mask = self._engine.grammars.json(dict(schema), "schema")
        except ApiError as error:
            raise RequestError(str(error)) from None
        return lambda: mask


def load(path: str | Path, *, cache_tokens: int | None = None, quick: bool = False) -> Model:
    """Load the bundle at ``path``; :class:`BundleError` says all that is in the way of running it here.

    ``cache_tokens`` is how many tokens the KV cache holds (default: a whole context for each answer of a batch), and
    ``quick`` loads weights without digesting them.
    """
    bundle = dataclasses.replace(manifests.read(Path(path)), quick=quick)
    if problems := manifests.check(bundle, weights=False):
        raise BundleError(*problems)
    return Model(Engine(bundle, tokens=cache_tokens, queue=2**31))


def _whole(stream: Stream) -> Reply:
    for _ in stream:
        pass
    return _reply(stream)


def _reply(stream: Stream) -> Reply:
    assert stream.reply is not None
    return stream.reply
