"""External inputs: which files a source parameter names, and their digests behind a cache of their stats.

A source is identified by content. An unchanged file is never read again, whatever its size; a file that was touched
but not changed is read once and its stat remembered even if nothing runs. Sources are opened where they are: never
linked, moved or chmodded.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stagegraph.digest import StatId, digest_file, is_unchanged, stat_id
from stagegraph.errors import PlanError, Progress
from stagegraph.files import list_files
from stagegraph.store.index import Index

if TYPE_CHECKING:
    from threading import Event

MARK = "://"  # in a source that is a URL (:mod:`stagegraph.planning.urls`), and no path
RACY_NS = 50_000_000  # a file changed this shortly before it was digested may change again within one clock tick


@dataclass(frozen=True)
class SourceState:
    """The declared files of one source at one moment: relative POSIX name -> path, digest, stat."""

    root: Path
    files: dict[str, Path]
    digests: dict[str, str]
    stats: dict[str, StatId]

    def changed(self) -> list[str]:
        """Return the names whose file is no longer what was digested."""
        return [
            name
            for name, path in self.files.items()
            if not is_unchanged(path, self.stats[name], functools.partial(self._holds, name))
        ]

    def _holds(self, name: str) -> bool:
        """Say whether a file, read again, is what it was; its stat is then the one that it has now."""
        path = self.files[name]
        stat, digest = _digest_stable(path, None, Progress(f"reading {path.name} again:", path.stat().st_size))
        self.stats[name] = stat
        return digest == self.digests[name]


class Sources:
    """Digests of source files, each read at most once per run and only if its stat changed since the last."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._states: dict[tuple[str, tuple[str, ...], tuple[str, ...]], SourceState] = {}
        self._digests: dict[Path, tuple[StatId, str]] = {}

    def state(self, path: str, include: Sequence[str], alone: Sequence[str] = ()) -> SourceState:
        """Return the state of a source; :class:`FileNotFoundError` if there is nothing at ``path``."""
        source_id = (path, tuple(include), tuple(alone))
        if source_id not in self._states:
            root, files = list_files(Path(path), include, alone)
            self._digest_all(list(files.values()))
            known = {name: self._digests[file] for name, file in files.items()}
            self._states[source_id] = SourceState(
                root, files, {n: digest for n, (_, digest) in known.items()}, {n: s for n, (s, _) in known.items()}
            )
        return self._states[source_id]

    def is_intact(self, file: Path, digest: str) -> bool:
        """Say whether a file is there and has this digest."""
        try:
            if not file.is_file():
                return False
            self._digest_all([file])
        except OSError:
            return False
        return self._digests[file][1] == digest

    def _digest_all(self, files: list[Path]) -> None:
        stale: list[Path] = []
        for file in files:
            if file in self._digests:
                continue
            now = stat_id(file)
            memo = self._index.get(f"src:{file}")
            if memo is not None and memo[0] == list(now):
                self._digests[file] = now, memo[1]
            else:
                stale.append(file)
        read = Progress("reading sources:", sum(file.stat().st_size for file in stale))
        if len(stale) < 2:
            results = [_digest_stable(file, None, read) for file in stale]
        else:
            from concurrent.futures import ThreadPoolExecutor  # 5 ms that a run without news does not pay
            from threading import Event

            stop = Event()
            with ThreadPoolExecutor(min(len(stale), os.cpu_count() or 1)) as pool:
                try:
                    results = list(pool.map(lambda file: _digest_stable(file, stop, read), stale))
                except BaseException:
                    stop.set()  # leaving the pool waits for what is under way
                    pool.shutdown(cancel_futures=True)
                    raise
        for file, (now, digest) in zip(stale, results, strict=True):
            self._digests[file] = now, digest
            if time.time_ns() - now[4] > RACY_NS:
                self._index.set(f"src:{file}", [list(now), digest])


def _digest_stable(file: Path, stop: Event | None, read: Callable[[int], None]) -> tuple[StatId, str]:
    """Digest a file together with the stat it had all the while; read again if it changed under the reading."""
    for _ in range(3):
        before = stat_id(file)
        digest = digest_file(file, stop, read)
        if stat_id(file) == before:
            return before, digest
    raise PlanError(f"{file}: changes while it is read; wait until whatever writes it has finished")
