"""Pins: the results that a run under way still needs, which garbage collection must leave.

A run that executes something keeps a file ``running/<pid>-<time>`` locked while it lasts and writes the keys of the
results it has settled on into it. A killed run's lock is gone, and with it its claim.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterable
from pathlib import Path

from stagegraph.errors import warn


class Pin:
    """The claim of one run on the results it has settled on."""

    def __init__(self, root: Path) -> None:
        self._path = root / "running" / f"{os.getpid()}-{time.time_ns()}"
        self._file: int | None = None
        self._unclaimed = False
        try:
            self._path.parent.mkdir(exist_ok=True)
            self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            fcntl.flock(self._file, fcntl.LOCK_EX)
        except OSError as error:
            self._give_up(error)

    def add(self, keys: Iterable[str]) -> None:
        """Claim more results."""
        text = "".join(f"{key}\n" for key in keys).encode()
        if self._file is None or self._unclaimed:
            return
        try:
            if os.write(self._file, text) < len(text):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        """Go on without a claim: that costs no result, unless something is removed beside this run."""
        self._unclaimed = True
        advice = "what this run needs is not claimed: run no `pipeline gc` beside it"
        warn(f"{self._path}: {error.strerror}; {advice}")

    def release(self) -> None:
        """End the claim."""
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)
        if self._file is not None:
            os.close(self._file)


def pinned(root: Path) -> tuple[int, set[str]]:
    """Return how many runs are under way and the keys they claim; files of runs that are gone are removed."""
    running, keys = 0, set()
    folder = root / "running"
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            running += 1
            keys.update(path.read_text().split())
        else:
            path.unlink()
        finally:
            os.close(descriptor)
    return running, keys
