"""Recognises what is in the place of a checkpoint or of one of its files, and says what to do."""

from __future__ import annotations

import codecs
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

CONFIG = "config.json"
SHOWN = 3  # names in a message
HEAD = 64  # bytes of a file by which it is recognised
MARKS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def pointer(data: bytes) -> str:
    """Describe a file that begins with ``data`` and stands for another one; empty if it does not."""
    if data.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer and not the file itself; run `git lfs pull` in the checkpoint"
    if data[:HEAD].lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "a web page and not the file itself; fetch it again"
    return ""


def no_text(data: bytes) -> str:
    """Describe a file of JSON that is no text in UTF-8, or a pointer; empty if it may be JSON."""
    if data.startswith(MARKS):
        return "begins with a byte order mark, which JSON has not; save it as UTF-8 without one"
    return pointer(data) if data.strip() else "is empty; fetch it again"


def broken_links(root: Path, patterns: Collection[str]) -> str:
    """Name the links in a folder, of the names that are wanted by ``patterns``, that lead to no file, as those of a hub
    cache that was copied; empty if none does.
    """
    links = sorted(path.name for path in root.iterdir() if path.is_symlink() and not path.exists())
    broken = [name for name in links if any(fnmatchcase(name, pattern) for pattern in patterns)]
    more = f" and {len(broken) - SHOWN} more" if len(broken) > SHOWN else ""
    are = "is a link to a file that is" if len(broken) == 1 else "are links to files that are"
    if not broken:
        return ""
    return (
        f"{', '.join(broken[:SHOWN])}{more} {are} not there; copy a folder of a hub cache with `cp -rL`, or fetch the "
        "checkpoint again"
    )


def checkpoints_below(root: Path) -> str:
    """Name the checkpoints in a folder's folders, as in a repository of a hub cache; empty if there are none."""
    found = sorted(path.parent for pattern in ("*", "snapshots/*") for path in root.glob(f"{pattern}/{CONFIG}"))
    more = f" or one of {len(found) - 1} more" if len(found) > 1 else ""
    return f"name the folder in it that has one: {found[0]}{more}" if found else ""
