"""One remote's objects and records, in a directory, a bucket, behind a web server or over SFTP."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Protocol

from blake3 import blake3

from stagegraph.digest import BLOCK
from stagegraph.remote.errors import MismatchError, RangeError, RemoteError, StoppedError
from stagegraph.store.objects import fsync_file

if TYPE_CHECKING:
    from threading import Event

    from stagegraph.spec.model import Remote

RECORD_LIMIT = 64 << 20  # bytes


class Backend(Protocol):
    """Files by path; every method raises :class:`RemoteError` where they cannot be reached."""

    def size(self, path: str) -> int | None:
        """Return a file's size in bytes, None if there is none."""

    def read(self, path: str, start: int, *, quick: bool) -> Iterator[bytes]:
        """Yield what a file has from byte ``start`` on; :class:`FileNotFoundError` if there is none.

        ``quick``: it is small, and a silence of seconds means that nobody answers.
        """

    def put(self, path: str, data: bytes | Path) -> None:
        """Put a file, whole or not at all."""


class Storage:
    """A remote; every method raises :class:`RemoteError` where it cannot be reached.

    Downloads end with :class:`StoppedError` soon after ``stop`` is set.
    """

    def __init__(self, remote: Remote, stop: Event) -> None:
        self.remote = remote
        self._stop = stop
        self._backend = _backend(remote.url)
        self._wrong: set[str] = set()  # objects that were not what their names say

    def read(self, path: str) -> bytes | None:
        """Return a small document, or None if there is none."""
        found = b""
        try:
            for chunk in self._backend.read(path, 0, quick=True):
                found += chunk
                if len(found) > RECORD_LIMIT:
                    raise MismatchError(f"{path} has more than {RECORD_LIMIT:,} bytes")
        except FileNotFoundError:
            return None
        return found

    def has(self, path: str) -> bool:
        """Say whether there is something."""
        return self._backend.size(path) is not None

    def write(self, path: str, data: bytes) -> None:
        """Put a small document."""
        self._backend.put(path, data)

    def take(self, digest: str, size: int, target: Path) -> None:
        """Fetch an object into a file, which is synced, and go on where that ends if there is one.

        :class:`MismatchError` if the object is not there as it should be; the file is empty then. Where the transfer
        breaks off otherwise, what has come stays in it.
        """
        with target.open("a+b") as file:
            begun = file.tell()
            right = self._complete(digest, size, file)
            if not right and begun:  # what it went on from may have been something else
                file.truncate(0)
                right = self._complete(digest, size, file)
            if not right:
                file.truncate(0)
        if not right:
            self._wrong.add(digest)
            raise MismatchError(f"{object_path(digest)} does not match its digest")
        fsync_file(target)

    def _complete(self, digest: str, size: int, file: IO[bytes]) -> bool:
        """Append what a file lacks of an object, and say whether it is the object then."""
        path, hasher = object_path(digest), blake3()
        file.seek(0)
        while block := file.read(BLOCK):
            hasher.update(block)
        done = file.tell()
        while done < size:
            before = done
            try:
                for chunk in self._backend.read(path, done, quick=False):
                    if self._stop.is_set():
                        raise StoppedError
                    hasher.update(chunk)
                    file.write(chunk)
                    done += len(chunk)
                    if done > size:
                        break
                break
            except FileNotFoundError:
                file.truncate(0)
                raise MismatchError(f"{path} is not there") from None
            except RangeError:
                file.truncate(0)
                hasher, done = blake3(), 0
                if not before:
                    raise
            except RemoteError:
                if done == before:  # else it goes on where it was cut
                    raise
        file.flush()
        return done == size and hasher.hexdigest() == digest

    def give(self, digest: str, source: Path) -> bool:
        """Put an object, and return True, unless it is there: one of another size, or found wrong before, is not."""
        path = object_path(digest)
        if digest not in self._wrong and self._backend.size(path) == source.stat().st_size:
            return False
        self._backend.put(path, source)
        self._wrong.discard(digest)
        return True


def object_path(digest: str) -> str:
    """Return where an object is in a remote."""
    return f"objects/{digest[:2]}/{digest}"


def _backend(url: str) -> Backend:
    if url.startswith("sftp://"):
        from stagegraph.remote.sftp import Sftp

        return Sftp(url)
    if url.startswith("file://"):
        from stagegraph.remote.directory import Directory

        return Directory(url)
    from stagegraph.remote.buckets import Bucket

    return Bucket(url)
