"""The files of one directory: opened only if they are files, and of a bundle only those that bundle.json lists.

What is read is digested on its way into memory, so that what is used is what was checked, and nothing is read twice.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import stat
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from stages.runtime.errors import BundleError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from stages.runtime.documents import JsonObject

MANIFEST = "bundle.json"
BLOCK = 1 << 20  # bytes read and digested at a time, while they are in the processor's cache
LIMIT = 256 << 20  # bytes of a JSON document; none comes near it


@dataclass(frozen=True)
class Entry:
    """One file of a bundle: its SHA-256 in hex and its size in bytes."""

    sha256: str
    size: int


@dataclass(frozen=True)
class Folder:
    """Files under ``root``: those that are ``listed``, each checked as it is read; None trusts whatever is there."""

    root: Path
    listed: Mapping[str, Entry] | None = None

    def __contains__(self, name: str) -> bool:
        """Say whether there is a file ``name`` to read; one that lies there unlisted is none."""
        return os.path.isfile(self.root / name) if self.listed is None else name in self.listed  # noqa: PTH113 - of any name

    def read(self, name: str, *, digest: bool = True) -> bytearray:
        """Return a file's content, of the size and digest that are listed; :class:`BundleError` where it is not.

        Without ``digest`` the size alone is compared with the list.
        """
        with self._opened(name) as file:
            data = bytearray(os.fstat(file.fileno()).st_size)
            hasher = hashlib.sha256()
            with memoryview(data) as view:
                at = 0
                while at < len(data) and (count := file.readinto(view[at : at + BLOCK])):
                    if digest:
                        hasher.update(view[at : at + count])
                    at += count
            if at < len(data):
                self._refuse(name, f"ended after {at} of {len(data)} bytes")
            if digest:
                self._compare(name, hasher.hexdigest())
        return data

    def json(self, name: str) -> Any:
        """Return the document that a file holds; :class:`BundleError` where it is none."""
        return parse(self.read(name), f"{self.root / name}")

    def check(self, name: str, *, digest: bool = True) -> Path:
        """Return the path of a file after holding it against the list; :class:`BundleError` as :meth:`read`."""
        with self._opened(name) as file:
            if digest:
                self._compare(name, hashlib.file_digest(file, "sha256").hexdigest())
        return self.root / name

    @contextmanager
    def _opened(self, name: str) -> Iterator[io.FileIO]:
        if name not in self and self.listed is not None:
            self._refuse(name, f"{MANIFEST} does not list it, and what it does not list is not read")
        path = self.root / name
        try:
            if self.listed is not None and not _real(path).is_relative_to(_real(self.root)):
                self._refuse(name, "a link that leaves the bundle; copy the bundle with its links followed (cp -L)")
            with open_regular(path) as file:
                size = os.fstat(file.fileno()).st_size
                if self.listed is not None and size != self.listed[name].size:
                    self._refuse(
                        name, f"{size} bytes, not the {self.listed[name].size} of {MANIFEST}; copy the bundle again"
                    )
                yield file
        except FileNotFoundError:
            self._refuse(name, "missing; copy the whole bundle again")
        except OSError as error:  # not to be read, or a name that no file can have
            self._refuse(name, f"{error.strerror or error}; copy the bundle again")

    def _compare(self, name: str, found: str) -> None:
        if self.listed is not None and found != self.listed[name].sha256:
            self._refuse(name, f"its SHA-256 is not the one in {MANIFEST}: damaged or changed; copy the bundle again")

    def _refuse(self, name: str, why: str) -> NoReturn:
        raise BundleError(f"{self.root / name}: {why}") from None


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path, strict=True))  # unlike resolve(), a circle of links is an OSError


def open_regular(path: Path) -> io.FileIO:
    """Open a file for reading; :class:`OSError` for a directory, and for a pipe or a device, which might never end."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    file = io.FileIO(descriptor, "rb") if stat.S_ISREG(os.fstat(descriptor).st_mode) else None
    if file is None:
        os.close(descriptor)
        raise OSError("is no regular file")
    return file


def read_document(path: Path) -> tuple[Any, bytes]:
    """Return the JSON document of a file that no list names, and its bytes; :class:`BundleError` for what is none."""
    try:
        with open_regular(path) as file:
            data = file.read(LIMIT + 1)
    except OSError as error:
        raise BundleError(f"{path}: {error.strerror or error}; copy the bundle again") from None
    document = parse(data, f"{path}", strict=True)
    try:
        json.dumps(document, ensure_ascii=False).encode()  # refuses escapes that are no characters
    except ValueError as error:
        raise BundleError(f"{path}: cannot be read as JSON: {error}; copy the bundle again") from None
    return document, data


def parse(data: bytes | bytearray, where: str, *, strict: bool = False) -> Any:
    """Return the JSON document of ``data``, read from ``where``; :class:`BundleError` for what is none.

    ``strict`` refuses what readers take differently: a key given twice, numbers that JSON does not have.
    """
    hooks: dict[str, Any] = {"object_pairs_hook": _unique, "parse_constant": _no_number} if strict else {}
    try:
        if len(data) > LIMIT:
            raise ValueError(f"{len(data):,} bytes are too many")
        return json.loads(data.decode(), **hooks)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{where}: cannot be read as JSON: {error!s:.200}; copy the bundle again") from None


def _unique(pairs: list[tuple[str, object]]) -> JsonObject:
    found: dict[str, object] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r:.60} is given twice")
        found[name] = value
    return found


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")
