"""Copies of artifacts to ship: real files that share nothing with the store, all there or not at all.

A directory that an export wrote says so itself: ``.stagegraph-export.json`` in it holds the digest of every file. Only
such a directory, with nothing added and nothing edited, is ever replaced. The new one is written beside it and the two
change places at once, so that a kill leaves one or the other; what it leaves beside them goes with the next export.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from stagegraph.digest import digest_file
from stagegraph.errors import PlanError, StoreError, listed
from stagegraph.files import remove_tree
from stagegraph.store.objects import fsync_file

if TYPE_CHECKING:
    from stagegraph.store.workspace import Workspace

MANIFEST, MANIFEST_SCHEMA = ".stagegraph-export.json", 1
REPOSITORY = (".git", ".hg", ".svn")
ELSEWHERE = "name a directory that can be written"
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # renameat2(2)


def export(
    files: Mapping[str, str],
    fetch: Callable[[str], Path],
    target: Path,
    *,
    replace: bool,
    workspace: Workspace,
) -> list[str]:
    """Write files, name -> digest, below ``target``; :class:`PlanError` if that exists and may not be replaced.

    ``fetch`` returns where the content of one is in the store of ``workspace``, verified.
    """
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise PlanError(f"{target} exists already and is no directory; name another one")
    target = target.resolve()
    _refuse_precious(target, workspace.artifacts.resolve())
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target)
    except OSError as error:
        raise PlanError(f"{target}: {error.strerror}; {ELSEWHERE}") from None
    old = _replaceable(target, replace=replace)
    with _partial(target) as partial:
        for name, digest in files.items():
            _copy(fetch(name), partial / name)
            if digest_file(partial / name) != digest:
                workspace.store.check(digest)  # the object itself may have rotted
                raise StoreError(f"{partial / name}: the copy is not what is stored; nothing was exported")
        _describe(partial, files)
        if not old:
            partial.rename(target)  # in place of nothing, or of an empty directory
        else:
            partial.chmod(stat.S_IMODE(target.stat().st_mode))
            replaced = _exchange(partial, target)
            _remove(replaced, old)
            if replaced.exists():
                raise StoreError(f"{replaced} holds what was added to {target} meanwhile; the export itself is done")
    return list(files)


def _copy(stored: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(stored, target)
    target.chmod(0o644)
    fsync_file(target)


# -- what may be replaced ----------------------------------------------------------------------------------------------


def _refuse_precious(target: Path, artifacts: Path) -> None:
    """Refuse directories that no export may take the place of, whatever they hold."""
    why = ""
    if target in {artifacts.parent, *artifacts.parents}:
        why = "holds the pipeline itself"
    elif target == artifacts or artifacts in target.parents:
        why = "belongs to the store, and runs remove what they did not put there"
    elif target in {home := Path(os.path.expanduser("~")).resolve(), *home.parents}:  # noqa: PTH111 - never fails
        why = "holds your home directory"
    elif any((target / name).exists() for name in REPOSITORY):
        why = "is the root of a repository"
    if why:
        raise PlanError(f"{target} {why}; export into a directory of its own, as dist/NAME")


def _replaceable(target: Path, *, replace: bool) -> Mapping[str, str]:
    """Return the files of an earlier export in ``target``; refuse if there is anything else, or it may not go."""
    found = _listed(target)
    if not found:
        return {}
    written = _written(target)
    foreign = [name for name in found if name not in written and name != MANIFEST]
    edited = [name for name in found if name in written and _digest_or_none(target / name) != written[name]]
    problems = [f"{target}: no export wrote {listed(foreign)}"] if foreign else []
    problems += [f"{target}: no longer as exported: {listed(edited)}"] if edited else []
    if problems:
        raise PlanError(*problems, f"{target} is left as it is: name another directory, or move these files away")
    if not replace:
        raise PlanError(f"{target} exists already; name another directory, or --force to replace what was exported")
    return written


def _listed(folder: Path) -> list[str]:
    """Return everything below a folder that is no directory with something in it, by relative name."""
    found = []
    for current, folders, names in os.walk(folder):
        links = [name for name in folders if Path(current, name).is_symlink()]
        empty = [name for name in folders if name not in links and not os.listdir(Path(current, name))]  # noqa: PTH208
        found += [Path(current, name).relative_to(folder).as_posix() for name in (*names, *links, *empty)]
    return sorted(found)


def _describe(folder: Path, files: Mapping[str, str]) -> None:
    document = {"schema": MANIFEST_SCHEMA, "what": "files that `pipeline export` wrote here", "files": dict(files)}
    (folder / MANIFEST).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    fsync_file(folder / MANIFEST)


def _written(folder: Path) -> Mapping[str, str]:
    """Return what an export wrote into a folder, as it says itself: name -> digest; nothing if it does not."""
    try:
        document = json.loads((folder / MANIFEST).read_bytes())
        files = document["files"] if document["schema"] == MANIFEST_SCHEMA else {}
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return {}
    return files if isinstance(files, dict) else {}


def _digest_or_none(path: Path) -> str | None:
    return digest_file(path) if path.is_file() and not path.is_symlink() else None


# -- changing places ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _partial(target: Path) -> Iterator[Path]:
    """Make the directory that takes the place of ``target``; what is not in its place at the end is removed."""
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        partial.mkdir()
    except OSError as error:
        raise PlanError(f"{target}: {error.strerror}; {ELSEWHERE}") from None
    inode = partial.stat().st_ino
    lock = os.open(partial, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)  # what is being written is not swept
        yield partial
    finally:
        if partial.is_dir() and partial.stat().st_ino == inode:
            remove_tree(partial)
        os.close(lock)


def _exchange(partial: Path, target: Path) -> Path:
    """Let two directories change places, at once where the system can; return where the old one is now."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename and not rename(AT_FDCWD, os.fsencode(partial), AT_FDCWD, os.fsencode(target), RENAME_EXCHANGE):
        return partial
    aside = partial.with_suffix(".replaced")
    target.rename(aside)  # killed here, the next export puts it back
    try:
        partial.rename(target)
    except BaseException:
        aside.rename(target)
        raise
    return aside


def _remove(folder: Path, names: Iterable[str]) -> None:
    """Remove what an export wrote, and nothing that came since."""
    for name in (*names, MANIFEST):
        (folder / name).unlink(missing_ok=True)
    for current, _, _ in os.walk(folder, topdown=False):
        with contextlib.suppress(OSError):
            Path(current).rmdir()


def _sweep(target: Path) -> None:
    """Put back, or remove, what killed exports to ``target`` left beside it."""
    ours = re.compile(rf"\.{re.escape(target.name)}\.\d+\.(partial|replaced)")
    for folder in sorted(path for path in target.parent.iterdir() if ours.fullmatch(path.name)):
        lock = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue  # being written, or no way to know
        finally:
            os.close(lock)
        if folder.suffix == ".replaced" and not target.exists():
            folder.rename(target)
        elif (written := _written(folder)) or folder.suffix == ".replaced":
            _remove(folder, written)
        else:  # killed before it was whole
            remove_tree(folder)
