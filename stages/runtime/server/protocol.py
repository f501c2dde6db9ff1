"""Closes connections that are idle, too slow or too many, and answers malformed HTTP as the API does.

uvicorn itself waits without limit for the head of a request and for a client that does not read its answer, and reports
malformed requests in plain text.
"""

from __future__ import annotations

import functools
import json
from typing import TYPE_CHECKING, Any

import h11
from starlette.responses import JSONResponse
from uvicorn.protocols.http.h11_impl import H11Protocol

from stages.runtime.server.errors import ApiError

if TYPE_CHECKING:
    from asyncio import BaseTransport, TimerHandle

    from starlette.types import Receive, Scope, Send


def protocol(connections: int, seconds: float) -> Any:
    """Return what ``http`` of uvicorn's configuration takes.

    Of more than so many ``connections`` at once the requests are refused. One is ended where for so many ``seconds``
    its request has not come, with the whole of its head, or nothing was read of what waits to be sent.
    """
    return functools.partial(_Protocol, connections, seconds)


class _Protocol(H11Protocol):
    def __init__(self, most: int, seconds: float, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._most, self._seconds = most, seconds
        self._late: TimerHandle | None = None  # ends it where no request comes
        self._stuck: TimerHandle | None = None  # ends it where nothing is read
        self._refused = False

    def connection_made(self, transport: BaseTransport) -> None:
        """Begin to wait for a request."""
        super().connection_made(transport)  # type: ignore[arg-type]
        if len(self.connections) > self._most:
            self.app = _crowded
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no more."""
        for timer in (self._late, self._stuck):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take what was sent; of a client that was refused it is thrown away, or it would not read why."""
        if not self._refused:
            super().data_received(data)

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        super().on_response_complete()
        self._wait()

    def pause_writing(self) -> None:
        """Wait for the client to read."""
        super().pause_writing()
        self._stuck = self.loop.call_later(self._seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """Go on: it has read."""
        super().resume_writing()
        if self._stuck is not None:
            self._stuck.cancel()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no request of HTTP, and hear no more of it until the client ends, or has had its time."""
        body = json.dumps(ApiError(msg).document()).encode()
        headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
        for event in (
            h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.write_eof()
        self._refused = True
        self._wait()

    def _wait(self) -> None:
        if self._late is not None:
            self._late.cancel()
        self._late = self.loop.call_later(self._seconds, self._end_unless_begun)

    def _end_unless_begun(self) -> None:
        if self.conn.their_state is h11.IDLE or self._refused or self.transport.is_closing():
            self.transport.abort()


async def _crowded(scope: Scope, receive: Receive, send: Send) -> None:
    error = ApiError("too many connections are open; try again later", status=503)
    headers = {"Retry-After": "5", "Connection": "close"}
    await JSONResponse(error.document(), error.status, headers)(scope, receive, send)
