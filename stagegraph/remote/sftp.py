"""Files below a folder of another machine over SFTP, by ``asyncssh``.

Keys, the agent, known hosts and ``~/.ssh/config`` mean what they mean for ``ssh``; nothing asks for a password.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Awaitable, Iterator
from pathlib import Path
from threading import Lock, Thread
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import unquote, urlsplit

from stagegraph.errors import PlanError
from stagegraph.remote.errors import RemoteError

if TYPE_CHECKING:
    from asyncssh import SFTPClient, SSHClientConnection

T = TypeVar("T")
BLOCK = 8 << 20  # bytes
CONNECT, ANSWER, TRANSFER = 3.0, 3.0, 60.0  # seconds of silence: of a login, of a record, of an object
HOME = "/~/"  # a path that begins so counts from the user's folder
NEEDS = "a remote over sftp:// needs one more package: pip install 'stagegraph[sftp]'"


class Sftp:
    """The files below ``sftp://[USER@]HOST[:PORT]/FOLDER``; interface: :class:`stagegraph.remote.storage.Backend`.

    One connection, in a thread of its own, serves all who ask.
    """

    def __init__(self, url: str) -> None:
        import asyncio

        try:
            import asyncssh
        except ImportError:
            raise PlanError(NEEDS) from None
        self._library = asyncssh
        where = urlsplit(url)
        self._host, self._folder = where.hostname or "", unquote(where.path).removeprefix(HOME) or "."
        self._login = {"username": where.username, "port": where.port}
        self._connection: SSHClientConnection | None = None
        self._client: SFTPClient | None = None
        self._opening = Lock()
        self._loop = asyncio.new_event_loop()
        Thread(target=self._loop.run_forever, name="sftp", daemon=True).start()

    def size(self, path: str) -> int | None:
        """Return a file's size in bytes, None if there is none."""
        try:
            found = self._wait(self._connected().stat(self._at(path)), ANSWER)
        except FileNotFoundError:
            return None
        return found.size

    def read(self, path: str, start: int, *, quick: bool) -> Iterator[bytes]:
        """Yield what a file has from ``start`` on; ``quick``: from a remote that answers soon, or not at all."""
        silence, client = ANSWER if quick else TRANSFER, self._connected()
        file = self._wait(client.open(self._at(path), "rb"), silence)
        try:
            while chunk := self._wait(file.read(BLOCK, start), silence):
                assert isinstance(chunk, bytes)  # of a file that is opened as bytes
                start += len(chunk)
                yield chunk
        finally:
            with contextlib.suppress(RemoteError):
                self._wait(file.close(), ANSWER)

    def put(self, path: str, data: bytes | Path) -> None:
        """Put a file, whole or not at all."""
        client, target = self._connected(), self._at(path)
        folder, _, name = target.rpartition("/")
        part = f"{folder}/.{name}.{uuid.uuid4().hex}"
        self._wait(client.makedirs(folder, exist_ok=True), ANSWER)
        file = self._wait(client.open(part, "wb"), TRANSFER)
        try:
            for chunk in _chunks(data):
                self._wait(file.write(chunk), TRANSFER)
            self._wait(file.close(), TRANSFER)
            self._wait(client.posix_rename(part, target), TRANSFER)
        except BaseException:
            with contextlib.suppress(RemoteError, FileNotFoundError):
                self._wait(client.remove(part), ANSWER)
            raise

    def _at(self, path: str) -> str:
        return f"{self._folder.rstrip('/')}/{path}"

    def _connected(self) -> SFTPClient:
        with self._opening:
            if self._client is None:
                self._client = self._wait(self._connect(), CONNECT)
            return self._client

    async def _connect(self) -> SFTPClient:
        if self._connection is not None:  # the one before, which was cut or lost its server of files
            self._connection.abort()
        given = {name: value for name, value in self._login.items() if value is not None}
        connect = self._library.connect(self._host, **given, password=None, client_version="stagegraph")
        self._connection = connection = await connect
        return await connection.start_sftp_client()

    def _wait(self, what: Awaitable[T], seconds: float) -> T:
        """Return what a call answers, in the thread of the connection."""
        import asyncio

        library = self._library
        try:
            return asyncio.run_coroutine_threadsafe(asyncio.wait_for(what, seconds), self._loop).result()
        except (library.SFTPNoSuchFile, library.SFTPNoSuchPath) as error:
            raise FileNotFoundError(str(error)) from None
        except TimeoutError:
            raise RemoteError(f"no answer within {seconds:g} s") from None
        except (library.Error, OSError) as error:
            refused = isinstance(error, library.SFTPError)  # by a server that answers
            if not refused or isinstance(error, library.SFTPConnectionLost | library.SFTPNoConnection):
                self._client = None  # who asks next connects again
            raise RemoteError(f"{type(error).__name__}: {error}".strip(": ")) from None


def _chunks(data: bytes | Path) -> Iterator[bytes]:
    if isinstance(data, bytes):
        yield data
        return
    with data.open("rb") as file:
        while chunk := file.read(BLOCK):
            yield chunk
