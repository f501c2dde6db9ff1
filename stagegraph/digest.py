"""Content digests (BLAKE3) and the canonical JSON they are taken over.

Files are read in large blocks and hashed on all cores; a memory map would be no faster and would turn a file that is
truncated meanwhile into a crash of the process.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from stagegraph.files import open_regular

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from threading import Event

BLOCK = 8 << 20
_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False)
StatId = tuple[int, int, int, int, int]


def stat_id(path: str | Path) -> StatId:
    """Return (device, inode, size, mtime_ns, ctime_ns) of what ``path`` points to; :class:`OSError` if nothing."""
    s = os.stat(path)  # noqa: PTH116 - on the path of every no-op
    return s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns


def is_unchanged(path: str | Path, stat: Sequence[int], holds: Callable[[], bool]) -> bool:
    """Say whether a file is what it was when it had ``stat``, as :func:`stat_id` returns it.

    Another name for a file (a hard link, as installers and backups make them) and other rights move its ctime alone:
    ``holds`` then says whether the content is what it was, and is asked in no other case.
    """
    try:
        now = stat_id(path)
        return now == tuple(stat) or (now[:-1] == tuple(stat)[:-1] and holds())
    except OSError:
        return False


def digest_bytes(data: bytes) -> str:
    """Return the BLAKE3 hex digest (64 digits) of ``data``."""
    return blake3(data).hexdigest()


def digest_file(path: str | Path, stop: Event | None = None, read: Callable[[int], None] | None = None) -> str:
    """Return the BLAKE3 hex digest of a file's content; :class:`InterruptedError` soon after ``stop`` is set.

    ``read`` is told the bytes of each block.
    """
    hasher = blake3(max_threads=blake3.AUTO)
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        buffer = bytearray(min(BLOCK, size + 1))
        view = memoryview(buffer)
        while count := file.readinto(buffer):
            hasher.update(view[:count])
            if read is not None:
                read(count)
            if stop is not None and stop.is_set():
                raise InterruptedError(path)
    return hasher.hexdigest()


def canonical(document: Any) -> bytes:
    """Return the one JSON encoding of ``document`` that digests are taken over: sorted keys, no spaces, UTF-8."""
    return _ENCODER.encode(document).encode(errors="surrogatepass")  # names that are not UTF-8 have lone surrogates


def digest_json(document: Any) -> str:
    """Return the BLAKE3 hex digest of a document's canonical encoding."""
    return digest_bytes(canonical(document))
