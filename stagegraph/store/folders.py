"""Directories that show the outputs of nodes: what is in them, and what has to be out of the way."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from stagegraph.digest import stat_id


def stat_or_none(path: str | Path) -> list[int] | None:
    """Return what tells whether a file changed, or None if there is none."""
    try:
        return list(stat_id(path))
    except OSError:
        return None


def folder_times(folder: str, wanted: Iterable[str]) -> dict[str, int]:
    """Return the modification times of the directories that hold ``wanted``: they move when a file comes or goes."""
    names = {"", *(parent for name in wanted if "/" in name for parent in _parents(name))}
    times = {name: stat_or_none(f"{folder}/{name}") for name in sorted(names)}
    return {name: found[3] for name, found in times.items() if found}


def _parents(name: str) -> Iterator[str]:
    while name := name.rpartition("/")[0]:
        yield name


def real_directories(base: str, below: str) -> None:
    """Make ``base/below`` a real directory from ``base`` on; a link or file in its way is removed."""
    path = base
    for part in below.split("/"):
        path = f"{path}/{part}"
        try:
            os.mkdir(path)  # noqa: PTH102 - texts all along: every node is shown
        except FileExistsError:
            if not stat.S_ISDIR(os.lstat(path).st_mode):
                os.unlink(path)  # noqa: PTH108
                os.mkdir(path)  # noqa: PTH102


def remove_strays(folder: str, wanted: Collection[str]) -> list[str]:
    """Remove files that are no output of the node, and directories left empty; return the files' names."""
    stray = []
    for current, _, names in os.walk(folder, topdown=False):
        for name in names:
            path = f"{current}/{name}"
            relative = path[len(folder) + 1 :]
            if relative not in wanted:
                os.unlink(path)  # noqa: PTH108
                stray.append(relative)
        if current != folder and not os.listdir(current):  # noqa: PTH208
            os.rmdir(current)  # noqa: PTH106
    return stray
