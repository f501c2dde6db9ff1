"""The HTTP application: routes, access, limits on the size and duration of requests, and the log."""

from __future__ import annotations

import asyncio
import hmac
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from stages.runtime.server import card, metrics, page, requests, responses
from stages.runtime.server.errors import ApiError
from stages.runtime.server.exchange import Exchange
from stages.runtime.server.fields import parsed
from stages.runtime.server.metrics import Metrics

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from starlette.requests import Request
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from stages.runtime.documents import JsonObject
    from stages.runtime.server.documents import Completion
    from stages.runtime.server.engine import Engine
    from stages.runtime.server.requests import Wanted

_OPEN = ("/health", "/", *(f"/page/{name}" for name in page.FILES))  # what needs no key
_LOCAL = ("localhost", "127.0.0.1", "[::1]")


@dataclass(frozen=True)
class RequestLimits:
    """Limits of a request: bytes of its body, seconds to send it, and seconds until it is answered."""

    body: int = 8 << 20
    sending: float = 30
    seconds: float = 600


def create(
    engines: Mapping[str, Engine],
    *,
    key: str | None = None,
    local: bool = True,
    with_page: bool = True,
    limits: RequestLimits | None = None,
    log: TextIO | None = None,
) -> Starlette:
    """Return the application that serves ``engines`` by their names.

    ``key`` is the key that clients must send, None for no key. With ``local``, only host names of this machine are
    accepted, so that another site whose name resolves to this machine (DNS rebinding) is refused. ``with_page`` adds
    the chat page. ``log`` gets a line about each request, without its content.
    """
    api = _Api(engines, limits or RequestLimits())
    routes = [
        Route("/health", api.health),
        Route("/metrics", api.metrics),
        Route("/v1/models", api.models),
        Route("/v1/models/{name:path}", api.model),
        Route("/v1/chat/completions", api.chat, methods=["POST"]),
        Route("/v1/completions", api.text, methods=["POST"]),
    ]
    if with_page:
        routes += [Route("/", _page), Route("/page/{name}", _page)]
    handlers: Any = {ApiError: _refuse, 404: _not_found, 405: _not_allowed, Exception: _broken}
    middleware = [Middleware(_Log, log=log), Middleware(_Gate, key=key, local=local)]
    return Starlette(routes=routes, exception_handlers=handlers, middleware=middleware)


class _Api:
    def __init__(self, engines: Mapping[str, Engine], limits: RequestLimits) -> None:
        self._engines, self._limits = engines, limits
        self._created = int(time.time())
        self._metrics = Metrics(engines)
        self._proofs = {name: card.proofs(engine.manifest) for name, engine in engines.items()}

    async def health(self, _request: Request) -> Response:
        dead = [name for name, engine in self._engines.items() if not engine.alive]
        return JSONResponse({"status": "error", "models": dead} if dead else {"status": "ok"}, 503 if dead else 200)

    async def metrics(self, _request: Request) -> Response:
        return Response(self._metrics.text(), headers={"Content-Type": metrics.KIND})

    async def models(self, _request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._described(name) for name in self._engines]})

    async def model(self, request: Request) -> Response:
        self._engine(request.path_params["name"])
        return JSONResponse(self._described(request.path_params["name"]))

    async def chat(self, request: Request) -> Response:
        body = await self._body(request)
        return await self._answered(
            request,
            body,
            requests.chat,
            lambda name, engine, wanted: responses.Chat(name, engine.tokenizer, wanted.tools),
        )

    async def text(self, request: Request) -> Response:
        body = await self._body(request)
        return await self._answered(
            request, body, requests.text, lambda name, engine, _: responses.Text(name, engine.tokenizer)
        )

    async def _answered(
        self,
        request: Request,
        body: Any,
        parse: Callable[[Any, Engine], Wanted],
        form: Callable[[str, Engine, Wanted], responses.Form],
    ) -> Response:
        began = time.perf_counter()
        name, engine = self._chosen(body)
        wanted = await asyncio.to_thread(parse, body, engine)  # a template is rendered in a process of its own
        exchange = Exchange(
            engine,
            wanted,
            form(name, engine, wanted),
            seconds=self._limits.seconds,
            first=lambda: self._metrics.first_token[name].add(time.perf_counter() - began),
        )

        def ended() -> None:
            exchange.close()
            self._metrics.requests[name][exchange.outcome] += 1
            self._metrics.duration[name].add(time.perf_counter() - began)

        if wanted.stream:
            return _Events(exchange, ended)
        try:
            return JSONResponse(await _unless_gone(request, exchange))
        finally:
            ended()

    def _chosen(self, body: Any) -> tuple[str, Engine]:
        name = body.get("model") if isinstance(body, dict) else None
        if name is None and len(self._engines) == 1:
            name = next(iter(self._engines))
        if not isinstance(name, str):
            raise ApiError(f"model is missing; available: {', '.join(self._engines)}", param="model")
        return name, self._engine(name)

    def _engine(self, name: str) -> Engine:
        if name not in self._engines:
            known = ", ".join(self._engines)
            raise ApiError(
                f"there is no model {name!a:.80}; available: {known}", status=404, param="model", code="model_not_found"
            )
        return self._engines[name]

    def _described(self, name: str) -> JsonObject:
        engine, model = self._engines[name], self._engines[name].manifest
        about = {"target": model.target, "scheme": model.model["scheme"], "context_window": engine.limit}
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "stagegraph",
            **about,
            "proofs": self._proofs[name],
        }

    async def _body(self, request: Request) -> Any:
        """Return the JSON of a body, whose content type must be JSON: a form on another site cannot send that."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError("the body must be sent as application/json", status=415)
        size = int(request.headers.get("content-length", "0"))  # the HTTP parser accepts digits only
        data, parts = bytearray(), aiter(request.stream())
        try:
            async with asyncio.timeout(self._limits.sending):
                while max(size, len(data)) <= self._limits.body and (part := await anext(parts, None)) is not None:
                    data += part
        except TimeoutError:
            raise ApiError(f"the body did not arrive within {self._limits.sending:g} seconds", status=408) from None
        except ClientDisconnect:
            raise ApiError("the client disconnected", status=499) from None
        if max(size, len(data)) > self._limits.body:
            raise ApiError(f"the body has more than {self._limits.body:,} bytes", status=413)
        try:
            return parsed(bytes(data))
        except ValueError as error:
            raise ApiError(f"the body {error}") from None


class _Events(StreamingResponse):
    """Streams the answers of an exchange; ``ended`` is always called, even if nothing could be sent."""

    def __init__(self, exchange: Exchange, ended: Callable[[], None]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(exchange.stream(), media_type="text/event-stream", headers=headers)
        self._ended = ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._ended()


async def _unless_gone(request: Request, exchange: Exchange) -> Completion:
    """Return the whole answer; call it off where the client leaves."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    answer, left = asyncio.ensure_future(exchange.whole()), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((answer, left), return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise ApiError("the client disconnected", status=499)
        return answer.result()
    finally:
        answer.cancel()
        left.cancel()


async def _page(request: Request) -> Response:
    found = page.FILES.get(request.path_params.get("name", page.INDEX))
    if found is None:
        return await _not_found(request, Exception())
    return Response(found.content(), media_type=found.kind, headers=page.HEADERS)


async def _refuse(_request: Request, error: ApiError) -> Response:
    headers = {"Retry-After": str(error.retry)} if error.retry else None
    return JSONResponse(error.document(), error.status, headers)


async def _not_found(request: Request, _error: Exception) -> Response:
    return await _refuse(request, ApiError(f"there is no path {request.url.path!a:.80}", status=404))


async def _not_allowed(request: Request, _error: Exception) -> Response:
    return await _refuse(request, ApiError(f"{request.method} is not allowed on {request.url.path!a:.80}", status=405))


async def _broken(request: Request, error: Exception) -> Response:
    return await _refuse(request, ApiError(f"internal error: {type(error).__name__}", status=500))


class _Gate:
    """Lets through who has the key, and calls the server by a name of this machine where it is meant for it alone."""

    def __init__(self, app: ASGIApp, key: str | None, *, local: bool) -> None:
        self._app, self._local = app, local
        self._key = None if key is None else key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (error := self._problem(scope)) is not None:
            await JSONResponse(error.document(), error.status)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _problem(self, scope: Scope) -> ApiError | None:
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1").lower()
        if self._local and not any(host == name or host.startswith(f"{name}:") for name in _LOCAL):
            return ApiError("this server answers to localhost only", status=403)
        if self._key is None or scope["path"] in _OPEN:
            return None
        given = headers.get(b"authorization", b"")
        if not hmac.compare_digest(given.removeprefix(b"Bearer "), self._key):
            return ApiError("the API key is missing or wrong", status=401, code="invalid_api_key")
        return None


class _Log:
    """Writes a line about each request: when, what, how it ended, how long it took."""

    def __init__(self, app: ASGIApp, log: TextIO | None) -> None:
        self._app, self._log = app, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._log is None:
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 0

        async def noting(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self._app(scope, receive, noting)
        finally:
            now, took = time.strftime("%Y-%m-%dT%H:%M:%S%z"), time.perf_counter() - began
            self._log.write(f"{now} {scope['method']} {scope['path']!a} {status} {1e3 * took:.0f} ms\n")
            self._log.flush()
