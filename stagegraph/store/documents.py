"""Sealed JSON: small documents that are believed only as they were written, and those of them that are files.

A seal is a digest of the name and the text, written behind the text: whatever changed either, one bit or all of it, the
document is as good as gone. Records and parts cannot be told from anything else once they are lost; each is a file
beside the objects that it names, written whole or not at all.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stagegraph.digest import digest_bytes
from stagegraph.files import read_regular, remove_tree

if TYPE_CHECKING:
    from io import FileIO

SEAL_DIGITS = 32
LIMIT = 256 << 20  # bytes; no document comes near it
FOLDERS = {"rec:": "records", "part:": "parts", "alt:": "others"}
_PREFIXES = tuple(FOLDERS)
SYNCED = ("rec:", "alt:")  # a part that a power cut takes is made again
DIGEST = re.compile(r"[0-9a-f]{64}")
_decode = json.JSONDecoder().raw_decode  # of what json.dumps wrote: no blanks are looked for


class DamagedError(Exception):
    """A document is not what was written under its name."""


def seal(name: str, document: Any) -> str:
    """Return the text of a document to be kept under ``name``."""
    text = json.dumps(document)
    return f"{text}#{_seal(name, text)}"


def unseal(name: str, text: Any) -> Any:
    """Return the document of a sealed text, or of one from before there were seals; :class:`DamagedError` otherwise."""
    body = intact(name, text)
    try:
        return _decode(body)[0] if body is not text else json.loads(text)
    except (ValueError, RecursionError):
        raise DamagedError(name) from None


def intact(name: str, text: Any) -> str:
    """Return a sealed text without its seal, which is right, so that it is what :func:`seal` was given.

    A text from before there were seals is returned as it is; :class:`DamagedError` for any other.
    """
    if not isinstance(text, str):
        raise DamagedError(name)
    body, mark, found = text.rpartition("#")
    if not mark or len(found) != SEAL_DIGITS:
        return text
    if found != _seal(name, body):
        raise DamagedError(name)
    return body


def _seal(name: str, text: str) -> str:
    return digest_bytes(f"{name}\0{text}".encode(errors="surrogatepass"))[:SEAL_DIGITS]


class Documents:
    """The documents that are files, ``root/records/ab/abcd...`` and so on, by the index's names."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.damaged: set[str] = set()  # names of files that were read and not believed

    def owns(self, name: str) -> bool:
        """Say whether documents of this name are files."""
        return name.startswith(_PREFIXES)

    def path(self, name: str) -> Path | None:
        """Return where a document is, whether or not it exists; None if nothing can have this name."""
        file = self._file(name)
        return Path(file) if file else None

    def _file(self, name: str) -> str | None:
        prefix, mark, digest = name.partition(":")
        if not DIGEST.fullmatch(digest):
            return None
        return f"{self._root}/{FOLDERS[prefix + mark]}/{digest[:2]}/{digest}"

    def get(self, name: str) -> Any:
        """Return a document, or None if there is none or it is damaged."""
        path = self._file(name)
        if path is None:
            return None
        try:
            return unseal(name, read_regular(path, LIMIT).decode(errors="replace"))
        except FileNotFoundError:
            return None
        except (OSError, DamagedError):
            self.damaged.add(name)
            return None

    def set(self, name: str, document: Any) -> None:
        """Write a document, whole or not at all."""
        path = self.path(name)
        assert path is not None, name
        folder, file_name = os.path.split(path)
        temporary = f"{folder}/.{file_name}.{os.getpid()}.{time.monotonic_ns()}"
        try:
            try:
                file = open(temporary, "xb", buffering=0)  # noqa: PTH123, SIM115 - a text: every node writes one
            except FileNotFoundError:
                path.parent.mkdir(parents=True, exist_ok=True)
                file = open(temporary, "xb", buffering=0)  # noqa: PTH123, SIM115
            with file:
                _write_all(file, seal(name, document).encode())
                if name.startswith(SYNCED):
                    os.fsync(file.fileno())
            try:
                os.replace(temporary, path)  # noqa: PTH105
            except IsADirectoryError:
                _clear(path)
                os.replace(temporary, path)  # noqa: PTH105
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)  # noqa: PTH108
            raise
        self.damaged.discard(name)

    def delete_all(self, names: Sequence[str]) -> None:
        """Remove documents, and folders that have none then; no error for those that are not there."""
        paths = [path for name in names if (path := self._file(name)) is not None]
        for path in paths:
            try:
                os.unlink(path)  # noqa: PTH108 - one of many
            except OSError:
                _clear(Path(path))
        for folder in {os.path.dirname(path) for path in paths}:  # noqa: PTH120
            with contextlib.suppress(OSError):
                os.rmdir(folder)  # noqa: PTH106

    def names(self, prefix: str) -> Iterator[str]:
        """Yield the names that begin with ``prefix``, sorted; damaged ones too."""
        kind = next(kind for kind in FOLDERS if prefix.startswith(kind))
        start = prefix.removeprefix(kind)
        top = self._root / FOLDERS[kind]
        for folder in sorted(top.glob(f"{start[:2]}*") if top.is_dir() else ()):
            for digest in sorted(os.listdir(folder) if folder.is_dir() else ()):  # noqa: PTH208 - one of many
                if digest.startswith(start) and DIGEST.fullmatch(digest):
                    yield kind + digest


def _write_all(file: FileIO, data: bytes) -> None:
    while data:
        data = data[file.write(data) or 0 :]


def _clear(path: Path) -> None:
    """Remove what is at a document's place, also a directory."""
    remove_tree(path)
