"""Removes what gc chose, in short batches, except what has come into use since.

The store's lock keeps runs waiting, so it is held for one batch only. Between two batches a run may settle on a result
that was to go, or make one of objects that were. It writes the index, a pin or the journal then; whenever one of these
has changed, what came into use is looked up before anything more goes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterator, Mapping
from itertools import chain, repeat
from pathlib import Path
from typing import Any

from stagegraph.files import remove_tree
from stagegraph.query.contents import Removable, Sweep, objects_of
from stagegraph.store.leftovers import idle_locks
from stagegraph.store.pins import pinned
from stagegraph.store.workspace import Workspace

BATCH_SECONDS = 0.1
AT_ONCE = 64  # documents that are removed between two looks at the clock: each is a file
PAUSE_SECONDS = 0.005  # in which those who wait for the lock get it
NAMED = ("records", "parts", "others")
TRIES = 3


class Watch:
    """Tracks changes of a store; must be created before its contents are listed."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self.changed = False
        self.running = 0
        self.spared: set[str] = set()  # keys, names in the index, and digests of objects
        (workspace.root / "running").mkdir(exist_ok=True)
        with workspace.alone(), workspace.scratch("gc") as folder:
            self._since = folder.stat().st_mtime_ns  # as the file system has the time
            pinned(workspace.root)  # which removes claims of runs that were killed: no change that others make
            self._state = self._now()

    def _now(self) -> Any:
        root = self._workspace.root
        claims = sorted((entry.name, entry.stat().st_size) for entry in os.scandir(root / "running"))
        journal = _stat(root / "journal.jsonl")
        return self._workspace.index.version(), claims, journal and journal.st_size

    def is_quiet(self) -> bool:
        """Say whether nothing has changed since the last time; the caller holds the store's lock."""
        return bool(self._now() == self._state)

    def own_changes(self) -> None:
        """Take the caller's changes, made under the store's lock, as known."""
        self._state = self._now()

    def look(self) -> None:
        """Spare all that has come into use since this was made."""
        self._state, self.changed = self._now(), True
        self.running, pins = pinned(self._workspace.root)
        fresh = Workspace(self._workspace.artifacts)  # what this one knows of nodes it has read before
        try:
            self.spared |= pins | {last["key"] for last in fresh.lasts().values() if "key" in last}
            for name, document in self._written(fresh):
                self.spared.add(name.removeprefix("rec:"))
                self.spared.update([document["digest"]] if name.startswith("part:") else objects_of(document))
        finally:
            fresh.close()

    def _written(self, fresh: Workspace) -> Iterator[tuple[str, Any]]:
        """Yield the records and parts, by their name in the index, that were written since this was made."""
        for kind, prefix in zip(NAMED, ("rec:", "part:", "alt:"), strict=True):
            top = self._workspace.root / kind
            for folder in top.iterdir() if top.is_dir() else ():
                if (stat := _stat(folder)) and stat.st_mtime_ns >= self._since:
                    for entry in os.scandir(folder):
                        if not entry.name.startswith(".") and entry.stat().st_mtime_ns >= self._since:
                            name = f"{prefix}{entry.name}"
                            document = fresh.index.get(name)
                            if isinstance(document, dict):
                                yield name, document


def remove(workspace: Workspace, sweep: Sweep, watch: Watch, sizes: Mapping[str, int], texts: Collection[str]) -> None:
    """Remove what ``sweep`` names, and of the source ``texts``, in that order: a record goes before its objects.

    Whenever this is interrupted, what remains is whole or is seen to be missing and rebuilt. What is spared is taken
    out of ``sweep``; ``sizes`` are those of objects.
    """
    steps = chain(
        zip(repeat("item"), sweep.items, strict=False),
        zip(repeat("object"), sorted(sweep.digests), strict=False),
        zip(repeat("text"), texts, strict=False),
    )
    spared, tries, more = _Spared(watch, sweep, sizes), 0, True
    while more:
        with workspace.alone():
            quiet = watch.is_quiet()
            if not quiet and tries == TRIES:  # it changes all the time: it is looked at while it cannot
                spared.look()
                quiet = True
            if quiet:
                more = _batch(workspace, steps, spared)
                watch.own_changes()
                tries = 0
        if not quiet:
            spared.look()
            tries += 1
        time.sleep(PAUSE_SECONDS)


class _Spared:
    """Which steps are left out, because of what a watch saw."""

    def __init__(self, watch: Watch, sweep: Sweep, sizes: Mapping[str, int]) -> None:
        self._watch, self._sweep, self._sizes = watch, sweep, sizes
        self._done: set[int] = set()  # items that are gone, by identity

    def leaves(self, kind: str, what: Any) -> bool:
        """Say whether something is to stay."""
        watch = self._watch
        if kind == "object":
            return what in watch.spared
        if kind == "text":
            return watch.changed
        if what.kind == "leftover":
            return watch.changed
        if what.kind == "part" and watch.running:
            return True  # a worker may be reading it
        return what.name in watch.spared

    def gone(self, item: Removable) -> None:
        """Note that an item is gone."""
        self._done.add(id(item))

    def kept(self, digest: str) -> None:
        """Note that an object stays."""
        self._sweep.freed -= self._sizes.get(digest, 0)
        self._sweep.left += self._sizes.get(digest, 0)

    def look(self) -> None:
        """Look what has come into use; take it out of the sweep, and spare its objects."""
        self._watch.look()
        sweep = self._sweep
        pairs = list(zip(sweep.items, sweep.sizes, strict=True))
        stays = [pair for pair in pairs if id(pair[0]) not in self._done and self.leaves("item", pair[0])]
        for item, size in stays:
            self._watch.spared.update(item.digests)
            sweep.freed -= size * (item.kind == "leftover")
        out = {id(item) for item, _ in stays}
        sweep.items = [item for item, _ in pairs if id(item) not in out]
        sweep.sizes = [size for item, size in pairs if id(item) not in out]


def _batch(workspace: Workspace, steps: Iterator[tuple[str, Any]], spared: _Spared) -> bool:
    """Take steps for a moment; return whether there may be more."""
    until, names, before = time.monotonic() + BATCH_SECONDS, list[str](), ""
    for kind, what in steps:
        if len(names) >= AT_ONCE or kind != before:  # records are gone before the first of their objects goes
            workspace.index.delete_all(names)
            names, before = [], kind
        if not spared.leaves(kind, what):
            names += _remove(workspace, kind, what)
            if kind == "item":
                spared.gone(what)
        elif kind == "object":
            spared.kept(what)
        if time.monotonic() >= until:
            break
    else:
        until = 0.0
    workspace.index.delete_all(names)
    return bool(until)


def _remove(workspace: Workspace, kind: str, what: Any) -> list[str]:
    """Remove the files of one thing; return the names in the index that are to go with it."""
    if kind == "text":
        return [what]
    if kind == "object":
        _unlink(workspace.store.file(what))
        return [f"obj:{what}"]
    if what.kind == "object":  # it is one of the objects
        return []
    if what.kind == "leftover":
        remove_tree(workspace.root / what.name)
        return []
    if what.kind == "result":
        _unlink(os.fspath(workspace.log_path(what.name)))
        return [f"rec:{what.name}"]
    return [what.name]


def remove_idle_locks(workspace: Workspace) -> None:
    """Remove the files of locks that nobody holds, while nothing runs."""
    more = True
    while more:
        with workspace.alone():
            until, more = time.monotonic() + BATCH_SECONDS, False
            for path in idle_locks(workspace) if not pinned(workspace.root)[0] else ():
                path.unlink()
                if more := time.monotonic() >= until:
                    break
        time.sleep(PAUSE_SECONDS)


def _unlink(path: str) -> None:
    try:
        os.unlink(path)  # noqa: PTH108 - one of many
    except FileNotFoundError:
        pass
    except OSError:  # something else took its place
        remove_tree(Path(path))


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None
