"""Files below a directory: of a disk that machines share, or that is carried from one to the other.

``obstore`` reads a directory too, in pieces of 8 KiB, which takes ten times what reading the files takes.
"""

from __future__ import annotations

import contextlib
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

from stagegraph.files import open_regular
from stagegraph.remote.errors import RemoteError
from stagegraph.store.objects import fsync_file

BLOCK = 1 << 20  # bytes


class Directory:
    """The files below a ``file://`` URL; the interface is that of :class:`stagegraph.remote.storage.Backend`."""

    def __init__(self, url: str) -> None:
        self._root = Path(unquote(urlsplit(url).path))
        with _failures():
            self._root.mkdir(parents=True, exist_ok=True)

    def size(self, path: str) -> int | None:
        """Return a file's size in bytes, None if there is none."""
        with _failures():
            try:
                return (self._root / path).stat().st_size
            except FileNotFoundError:
                return None

    def read(self, path: str, start: int, *, quick: bool) -> Iterator[bytes]:  # noqa: ARG002 - a disk answers when it can
        """Yield what a file has from ``start`` on."""
        with _failures(), open_regular(self._root / path) as file:
            file.seek(start)
            while block := file.read(BLOCK):
                yield block

    def put(self, path: str, data: bytes | Path) -> None:
        """Put a file, whole or not at all, and onto the disk before it has its name."""
        target = self._root / path
        part = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
        with _failures():
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                if isinstance(data, Path):
                    shutil.copyfile(data, part)
                else:
                    part.write_bytes(data)
                fsync_file(part)
                part.replace(target)
            except BaseException:
                with contextlib.suppress(OSError):
                    part.unlink()
                raise


@contextmanager
def _failures() -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        at = error.filename2 or error.filename  # of a copy that failed the target: it is what may be full
        raise RemoteError(f"{at}: {error.strerror}" if at else str(error)) from None
