"""Finds files in a store that nobody needs: of killed runs, of damage, of nodes that are gone."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from stagegraph.files import dotted
from stagegraph.store.partial import FOLDER

if TYPE_CHECKING:
    from stagegraph.store.workspace import Workspace

STORE_LOCK = "store"
BLOCK = 512  # bytes, in stats


def leftovers(workspace: Workspace) -> Iterator[Path]:
    """Yield files and directories that may go while nothing runs and nothing begins to (``alone``)."""
    root = workspace.root
    yield from _entries(root / "quarantine")
    yield from sorted(root.glob("index.damaged-*"))
    yield from (path for path in _entries(workspace.work) if _is_free(root / "locks" / path.name))
    yield from (path for path in _entries(root / FOLDER) if _is_free(path))
    for folder in ("objects", "records", "parts", "others"):  # copies that a kill cut short
        for shard in _entries(root / folder):
            names = os.listdir(shard) if shard.is_dir() else ()  # noqa: PTH208 - of very many the few are taken
            yield from (shard / name for name in sorted(names) if name.startswith("."))
    failed = [name.partition("/") for name, last in workspace.lasts().items() if last.get("failed")]
    looked_at = {(pipeline, dotted(node)) for pipeline, _, node in failed}
    for pipeline in _entries(workspace.failed):
        yield from (node for node in _entries(pipeline) if (pipeline.name, node.name) not in looked_at)


def idle_locks(workspace: Workspace) -> Iterator[Path]:
    """Yield the files of locks that nobody holds, while nothing begins to."""
    for path in _entries(workspace.root / "locks"):
        if path.name != STORE_LOCK and _is_free(path):
            yield path


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _is_free(lock: Path) -> bool:
    """Say whether no process holds a lock."""
    try:
        descriptor = os.open(lock, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    else:
        return True
    finally:
        os.close(descriptor)


def disk_bytes(workspace: Workspace) -> tuple[int, int]:
    """Return what the kernel counts for ``artifacts/``, and how much of that is not the store: the copies it shows.

    Blocks, those of directories too, of each file once whatever names it has; what a file system shares is counted.
    """
    store = str(workspace.root)
    seen: set[tuple[int, int]] = set()
    inside = _blocks(store, seen, "")
    outside = _blocks(str(workspace.artifacts), seen, store)
    return inside + outside, outside


def _blocks(top: str, seen: set[tuple[int, int]], without: str) -> int:
    total, queue = 0, [top]
    while queue:
        folder = queue.pop()
        with contextlib.suppress(OSError):  # gone meanwhile
            total += os.lstat(folder).st_blocks
            for entry in os.scandir(folder):
                if entry.is_dir(follow_symlinks=False):
                    queue += [entry.path] if entry.path != without else []
                else:
                    total += _new_blocks(entry, seen)
    return total * BLOCK


def _new_blocks(entry: os.DirEntry[str], seen: set[tuple[int, int]]) -> int:
    try:
        found = entry.stat(follow_symlinks=False)
    except OSError:  # gone meanwhile
        return 0
    if found.st_nlink > 1:  # it may have been counted by another of its names
        inode = found.st_dev, found.st_ino
        if inode in seen:
            return 0
        seen.add(inode)
    return found.st_blocks


def tree_size(path: Path) -> int:
    """Return the bytes of a file, or of all files below a directory."""
    if path.is_dir() and not path.is_symlink():
        return sum(file.lstat().st_size for file in path.rglob("*") if file.is_file())
    return path.lstat().st_size
