"""Files of S3, Google Cloud Storage, Azure, or of a web server to read, by ``obstore``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from stagegraph.errors import PlanError
from stagegraph.remote.errors import RangeError, RemoteError
from stagegraph.remote.signing import NEEDS

BLOCK = 256 << 10  # bytes: what is lost of a transfer that breaks off
CONNECT = timedelta(seconds=2)
# The longest silence: of a record, after which a run goes on without the remote within three seconds, and of an object.
ANSWER, TRANSFER = timedelta(seconds=2.5), timedelta(minutes=1)


class Bucket:
    """The files below a URL; the interface is that of :class:`stagegraph.remote.storage.Backend`."""

    def __init__(self, url: str) -> None:
        with _failures():
            self._quick, self._bulk = _open(url, ANSWER), _open(url, TRANSFER)

    def size(self, path: str) -> int | None:
        """Return a file's size in bytes, None if there is none."""
        import obstore

        with _failures():
            try:
                return obstore.head(self._quick, path)["size"]
            except FileNotFoundError:
                return None

    def read(self, path: str, start: int, *, quick: bool) -> Iterator[bytes]:
        """Yield what a file has from ``start`` on; ``quick``: from a remote that answers soon, or not at all."""
        import obstore

        with _failures():
            options: Any = {"range": {"offset": start}} if start else None
            found = obstore.get(self._quick if quick else self._bulk, path, options=options)
            for chunk in found.stream(min_chunk_size=BLOCK):
                yield bytes(chunk)

    def put(self, path: str, data: bytes | Path) -> None:
        """Put a file, whole or not at all: in parts where it is large."""
        import obstore

        with _failures():
            obstore.put(self._bulk, path, data)


def stream(url: str, start: int) -> tuple[int, int, Iterator[bytes]]:
    """Return where what follows begins, the bytes of the object at ``url`` in all, and those from ``start`` on.

    :class:`OSError` if it cannot be had.
    """
    base, _, path = url.partition("://")[2].partition("/")
    try:
        bucket = Bucket(f"{url.partition('://')[0]}://{base}")
        size = bucket.size(path)
    except RemoteError as error:
        raise OSError(f"cannot be fetched: {error}") from None
    if size is None:
        raise OSError("cannot be fetched: there is no such object")
    return start, size, _chunks(bucket, path, start) if start < size else iter(())


def _chunks(bucket: Bucket, path: str, start: int) -> Iterator[bytes]:
    try:
        yield from bucket.read(path, start, quick=False)
    except (RemoteError, FileNotFoundError) as error:
        raise OSError(f"the transfer was interrupted ({error}); run again to resume") from None


def _open(url: str, silence: timedelta) -> Any:
    try:
        from obstore.store import from_url
    except ImportError:
        raise PlanError(NEEDS) from None
    options: Any = {"connect_timeout": CONNECT, "read_timeout": silence, "allow_http": True}
    retries: Any = {"max_retries": 1, "retry_timeout": silence}
    return from_url(url, client_options=options, retry_config=retries)


@contextmanager
def _failures() -> Iterator[None]:
    from obstore.exceptions import BaseError, NotSupportedError

    try:
        yield
    except NotSupportedError as error:
        raise RangeError(str(error)) from None
    except (BaseError, PermissionError, NotADirectoryError) as error:
        first = str(error).partition("\n")[0].strip()
        raise RemoteError(first or type(error).__name__) from None
