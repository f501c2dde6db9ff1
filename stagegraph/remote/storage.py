"""One remote's objects and records, by ``obstore``: a directory, S3, Google Cloud Storage, Azure, or HTTP to read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from stagegraph.errors import PlanError
from stagegraph.remote.signing import NEEDS
from stagegraph.store.objects import fsync_file

if TYPE_CHECKING:
    from threading import Event

    from stagegraph.remote.settings import Remote

RECORD_LIMIT = 64 << 20  # bytes
CONNECT = timedelta(seconds=2)
ANSWER, TRANSFER = timedelta(seconds=3), timedelta(minutes=1)  # the longest silence: of a record, of an object


class RemoteError(Exception):
    """A remote does not do what is asked of it: it is away, refuses, or is full."""


class StoppedError(Exception):
    """The run was abandoned."""


class MismatchError(Exception):
    """What came is not what was asked for."""


class Storage:
    """A remote; every method raises :class:`RemoteError` where it cannot be reached.

    Downloads end with :class:`StoppedError` soon after ``stop`` is set.
    """

    def __init__(self, remote: Remote, stop: Event) -> None:
        self.remote = remote
        self._stop = stop
        with _failures():
            self._quick, self._bulk = _open(remote.url, ANSWER), _open(remote.url, TRANSFER)

    def read(self, path: str) -> bytes | None:
        """Return a small document, or None if there is none."""
        import obstore

        with _failures():
            try:
                found = obstore.get(self._quick, path)
            except FileNotFoundError:
                return None
            if found.meta["size"] > RECORD_LIMIT:
                raise MismatchError(f"{path} has {found.meta['size']:,} bytes")
            return bytes(found.bytes())

    def has(self, path: str) -> bool:
        """Say whether there is something."""
        import obstore

        with _failures():
            try:
                obstore.head(self._quick, path)
            except FileNotFoundError:
                return False
            return True

    def write(self, path: str, data: bytes) -> None:
        """Put a small document."""
        import obstore

        with _failures():
            obstore.put(self._bulk, path, data)

    def download(self, path: str, target: Path, digest: str, size: int) -> None:
        """Put an object into the new file ``target``; :class:`MismatchError` unless it is what its digest says."""
        import obstore

        hasher, done = blake3(), 0
        with _failures(), target.open("xb") as file:
            try:
                for chunk in obstore.get(self._bulk, path).stream(min_chunk_size=8 << 20):
                    done += len(chunk)
                    if self._stop.is_set():
                        raise StoppedError
                    if done > size:
                        break
                    hasher.update(bytes(chunk))
                    file.write(chunk)
            except FileNotFoundError:
                raise MismatchError(f"{path} is not there") from None
        if done != size or hasher.hexdigest() != digest:
            raise MismatchError(f"{path} does not match its digest")

    def upload(self, path: str, source: Path) -> None:
        """Put a file, in parts where it is large."""
        import obstore

        with _failures():
            obstore.put(self._bulk, path, source)

    def take(self, digest: str, size: int, target: Path) -> None:
        """Fetch an object into a file, which is synced; :class:`MismatchError` if it is not there as it should be."""
        target.unlink(missing_ok=True)
        self.download(object_path(digest), target, digest, size)
        fsync_file(target)

    def give(self, digest: str, source: Path) -> bool:
        """Put an object, and return True, unless it is there."""
        path = object_path(digest)
        if self.has(path):
            return False
        self.upload(path, source)
        return True


def object_path(digest: str) -> str:
    """Return where an object is in a remote."""
    return f"objects/{digest[:2]}/{digest}"


def stream(url: str, start: int) -> tuple[int, int, Iterator[bytes]]:
    """Return where what follows begins, the bytes of the object at ``url`` in all, and those from ``start`` on.

    :class:`OSError` if it cannot be had.
    """
    import obstore

    bucket, _, path = url.partition("://")[2].partition("/")
    try:
        with _failures():
            store = _open(f"{url.partition('://')[0]}://{bucket}", TRANSFER)
            size = obstore.head(store, path)["size"]
            if start >= size:
                return start, size, iter(())
            found = obstore.get(store, path, options={"range": {"offset": start}})
    except (RemoteError, FileNotFoundError) as error:
        raise OSError(f"cannot be fetched: {error}") from None
    return start, size, _chunks(found)


def _chunks(found: Any) -> Iterator[bytes]:
    try:
        with _failures():
            for chunk in found.stream(min_chunk_size=8 << 20):
                yield bytes(chunk)
    except RemoteError as error:
        raise OSError(f"the transfer was interrupted ({error}); run again to resume") from None


def _open(url: str, silence: timedelta) -> Any:
    try:
        from obstore.store import LocalStore, from_url
    except ImportError:
        raise PlanError(NEEDS) from None
    if url.startswith("file://"):
        from urllib.parse import unquote, urlsplit

        return LocalStore(unquote(urlsplit(url).path), mkdir=True)
    options: Any = {"connect_timeout": CONNECT, "read_timeout": silence, "allow_http": True}
    retries: Any = {"max_retries": 1, "retry_timeout": silence}
    return from_url(url, client_options=options, retry_config=retries)


@contextmanager
def _failures() -> Iterator[None]:
    from obstore.exceptions import BaseError

    try:
        yield
    except (BaseError, PermissionError, NotADirectoryError) as error:
        first = str(error).partition("\n")[0].strip()
        raise RemoteError(first or type(error).__name__) from None
