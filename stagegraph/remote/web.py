"""Single files as sources by URL, pinned by their content: ``https://HOST/PATH#sha256=DIGITS``, and so of ``s3://``.

What was fetched lies in the user's cache under its digest, for every pipeline. A transfer that broke off goes on where
it stopped; what is not what its digest says is removed. The interface is that of :mod:`stagegraph.planning.urls`.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO
from urllib.parse import unquote, urldefrag, urlsplit

from stagegraph.digest import BLOCK
from stagegraph.errors import Progress

PIN = re.compile(r"sha256=([0-9a-f]{64})")
SILENCE = 60  # seconds without a byte


def check(url: str) -> None:
    """Raise :class:`ValueError` for a URL that names no file, or not its content."""
    _parts(url)


def files(url: str) -> dict[str, str]:
    """Return the one file that a URL names, and its digest."""
    _, name, digest = _parts(url)
    return {name: digest}


def here(url: str, wanted: Mapping[str, str]) -> Path | None:  # noqa: ARG001 - one file, or nothing
    """Return the file if it is in the cache; asks nobody."""
    path = _path(url)
    return path if path.is_file() else None


def get(url: str, wanted: Mapping[str, str]) -> Path:  # noqa: ARG001
    """Fetch the file, and return where it is; :class:`OSError` if it cannot be, or is not what it should be."""
    address, name, digest = _parts(url)
    path = _path(url)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{name}.part")
    with part.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # two runs do not fetch it twice
        for again in (True, False):
            if path.is_file():
                return path
            begun = file.seek(0, os.SEEK_END)
            found = _fetch(address, file)
            if found == digest:
                part.chmod(0o444)
                part.rename(path)
                return path
            file.truncate(0)
            if not (begun and again):  # else what it went on from may have been of another file
                break
    part.unlink()
    raise OSError(f"the file there now has another sha256: {found}")


def _parts(url: str) -> tuple[str, str, str]:
    address, pin = urldefrag(url)
    split = urlsplit(address)
    name = unquote(split.path).rpartition("/")[2]
    if not split.netloc or not name or name.startswith("."):
        raise ValueError("names no file")
    if "@" in split.netloc:
        raise ValueError("has a password in it, which would be kept and shown; expected a URL without")
    match = PIN.fullmatch(pin)
    if match is None:
        raise ValueError(
            f"may be another file tomorrow; expected what it is: {address}#sha256=DIGITS (`sha256sum` of it)"
        )
    return address, name, match[1]


def _path(url: str) -> Path:
    _, name, digest = _parts(url)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "stagegraph" / "sources" / digest / name


def _fetch(address: str, file: IO[bytes]) -> str:
    """Append what a file lacks, and return the SHA-256 of all."""
    hasher = hashlib.sha256()
    file.seek(0)
    while block := file.read(BLOCK):
        hasher.update(block)
    done = file.tell()
    with _opened(address, done) as (start, total, blocks):
        if start != done:  # it sends the whole file whatever it is asked for
            hasher, done = hashlib.sha256(), 0
            file.truncate(0)
        progress = Progress(f"fetching {address}:", total - done)
        for block in blocks:
            file.write(block)
            hasher.update(block)
            progress(len(block))
            done += len(block)
    file.flush()
    if done < total:
        raise OSError(f"the transfer was interrupted after {done:,} of {total:,} bytes; run again to resume")
    os.fsync(file.fileno())
    return hasher.hexdigest()


@contextmanager
def _opened(address: str, start: int) -> Iterator[tuple[int, int, Iterator[bytes]]]:
    """Yield where what follows begins, how many bytes there are in all (0 if nobody says), and those that follow."""
    if address.startswith("s3://"):
        yield _bucket(address, start)
        return
    from http.client import HTTPException
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    request = Request(address, headers={"Range": f"bytes={start}-"} if start else {})  # noqa: S310 - http or https
    try:
        with urlopen(request, timeout=SILENCE) as answer:  # noqa: S310
            begins = start if answer.status == 206 else 0
            total = begins + int(answer.headers.get("Content-Length") or 0)
            yield begins, total, iter(lambda: answer.read(BLOCK), b"")
    except HTTPError as error:
        if error.code == 416:  # all of it is there, or more
            yield start, start, iter(())
            return
        raise OSError(f"the server answers {error.code} {error.reason}") from None
    except HTTPException as error:
        raise OSError(f"the transfer was interrupted ({type(error).__name__}); run again to resume") from None
    except OSError as error:
        raise OSError(f"{getattr(error, 'reason', error)}; run again to resume") from None


def _bucket(address: str, start: int) -> tuple[int, int, Iterator[bytes]]:
    from stagegraph.remote.buckets import stream

    return stream(address, start)
