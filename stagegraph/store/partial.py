"""Files in which objects are fetched: a transfer that breaks off goes on there, in this run or in a later one."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FOLDER = "partial"


@contextmanager
def partial_file(root: Path, digest: str, target: Path) -> Iterator[Path]:
    """Lend the file in which the object of a digest is fetched, with what an earlier transfer left of it.

    It becomes ``target`` where nothing goes wrong, and is left to the next otherwise. Where somebody else is fetching
    the same object, it is ``target`` itself, from the beginning.
    """
    path = root / FOLDER / digest
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        if not _is_mine(descriptor, path):
            target.unlink(missing_ok=True)
            yield target
            return
        try:
            yield path
            path.rename(target)
        finally:
            with contextlib.suppress(FileNotFoundError):
                if not path.stat().st_size:
                    path.unlink()
    finally:
        os.close(descriptor)


def _is_mine(descriptor: int, path: Path) -> bool:
    """Take the lock of a file, and say whether it is had, and still that of the file at ``path``."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except (BlockingIOError, FileNotFoundError):
        return False
