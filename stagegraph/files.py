"""Lists the files that a source parameter names; opens regular files only."""

from __future__ import annotations

import errno
import functools
import os
import re
import stat
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from stagegraph.errors import PlanError

if TYPE_CHECKING:
    from io import FileIO

READING = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC  # no pipe is waited for
WILDCARD = frozenset("*?[")
FIRST = re.compile(r"(.+-)00001-of-(\d{5})(\.[^.]+)")  # of the files of one that was split


def list_files(path: Path, include: Sequence[str], alone: Sequence[str] = ()) -> tuple[Path, dict[str, Path]]:
    """List the files of a source that match a pattern: (root, relative POSIX name -> path).

    A pattern is a file name with wildcards, after directories without any; symbolic links to files are followed (a hub
    cache's snapshot is made of them). ``**`` takes all files at any depth but those in ``__pycache__``. ``path`` may
    name one file, which may also match one of ``alone``; the first of one that was split (NAME-00001-of-00003.EXT)
    brings the others that are there. :class:`FileNotFoundError` if nothing is there.
    """
    if path.is_file():
        if _matcher(tuple(alone))(path.name):
            return path.parent, _with_others(path)
        return path.parent, {path.name: path} if _matcher(tuple(include))(path.name) else {}
    if not path.is_dir():
        raise FileNotFoundError(path)
    if "**" in include:
        return path, _all_files(path)
    folders: dict[str, list[str]] = {}
    for pattern in include:
        folder, _, name = pattern.rpartition("/")
        folders.setdefault(folder, []).append(name)
    files: dict[str, Path] = {}
    for folder, names in folders.items():
        matches = _matcher(tuple(names))
        try:
            entries = list(os.scandir(path / folder if folder else path))
        except OSError:
            continue
        for entry in entries:
            if matches(entry.name) and entry.is_file():
                _check_name(path, entry.name)
                files[f"{folder}/{entry.name}" if folder else entry.name] = Path(entry.path)
    return path, dict(sorted(files.items()))


def _with_others(path: Path) -> dict[str, Path]:
    """Return a file by its name, and those that were split from it."""
    files = {path.name: path}
    if found := FIRST.fullmatch(path.name):
        for number in range(2, int(found[2]) + 1):
            other = path.with_name(f"{found[1]}{number:05}-of-{found[2]}{found[3]}")
            files |= {other.name: other} if other.is_file() else {}
    return files


def choose(names: Iterable[str], include: Sequence[str], alone: Sequence[str] = ()) -> list[str]:
    """Return the files that :func:`list_files` would list if these names were in a folder.

    If there is one file only, that may be one that is read alone.
    """
    found = list(names)
    if len(found) == 1 and _matcher((*include, *alone))(found[0].rpartition("/")[2]):
        return found
    if "**" in include:
        return [name for name in found if "__pycache__" not in name.split("/")]
    patterns = [pattern.rpartition("/") for pattern in include]
    split = {name: name.rpartition("/") for name in found}
    return [n for n, (at, _, last) in split.items() if any(at == f and _matcher((p,))(last) for f, _, p in patterns)]


def _all_files(path: Path) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for folder, folders, names in os.walk(path):
        folders[:] = [name for name in folders if name != "__pycache__"]
        for file in (Path(folder, name) for name in names):
            if file.is_file():
                _check_name(path, str(file.relative_to(path)))
                files[file.relative_to(path).as_posix()] = file
    return dict(sorted(files.items()))


def _check_name(path: Path, name: str) -> None:
    if not name.isprintable() or any("\ud800" <= c <= "\udfff" for c in name):
        raise PlanError(f"{path}: the file name {name!r} is not text; rename it")


@functools.cache
def _matcher(patterns: tuple[str, ...]) -> Callable[[str], bool]:
    """Return whether a file name matches one of ``patterns``; names and ``*.suffix`` need no regular expression."""
    names = {p for p in patterns if not WILDCARD & set(p)}
    suffixes = {p for p in patterns if p[:1] == "*" and not WILDCARD & set(p[1:])}
    others = set(patterns) - names - suffixes
    endings = tuple(p[1:] for p in suffixes)
    return lambda name: name in names or name.endswith(endings) or any(fnmatchcase(name, p) for p in others)


def open_regular(path: str | Path) -> FileIO:
    """Open a file for reading; :class:`OSError` for a pipe or a device, which might never end, and for a directory."""
    descriptor = os.open(path, READING)
    try:
        _check_regular(descriptor, path)
        return open(descriptor, "rb", buffering=0)  # noqa: PTH123 - a descriptor
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: str, limit: int) -> bytes:
    """Return what is in a small file: as :func:`open_regular`, for one of very many; :class:`OSError` beyond ``limit``
    bytes.
    """
    descriptor = os.open(path, READING)
    try:
        size = _check_regular(descriptor, path).st_size
        if size > limit:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), path)
        content = os.read(descriptor, size + 1)
        while len(content) < size and (more := os.read(descriptor, size - len(content))):
            content += more
        return content
    finally:
        os.close(descriptor)


def _check_regular(descriptor: int, path: str | Path) -> os.stat_result:
    found = os.fstat(descriptor)
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "is no regular file", os.fspath(path))
    return found


def remove_tree(path: Path) -> None:
    """Remove a file or directory, read-only parts too; no error if there is none."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(mode):
        path.unlink(missing_ok=True)
        return
    import shutil

    try:
        shutil.rmtree(path)
    except OSError:  # of folders that may not be written
        for folder, _, _ in os.walk(path):
            Path(folder).chmod(stat.S_IRWXU)
        shutil.rmtree(path, ignore_errors=True)


def dotted(node: str) -> str:
    """Return a node's name as its directory is named, which no shell expands: ``build.x86.debug`` of
    ``build[x86,debug]``. Of several values one of which has a dot it stays: two nodes could be called the same.
    """
    entry, _, instance = node.removesuffix("]").partition("[")
    values = instance.split(",") if instance else []
    return node if len(values) > 1 and "." in instance else ".".join([entry, *values])


def typed(node: str) -> str:
    """Return a node's name as it is typed in a shell."""
    name = dotted(node)
    return f"'{name}'" if "[" in name else name


def path_name(path: str | Path) -> str:
    """Return what people call a file or folder, as a safe name: of a revision in a download cache
    (``models--ORG--NAME/snapshots/REVISION``) the name of what it is a revision of, of a URL that without its pin.
    """
    path = Path(re.sub(r"[@#].*", "", str(path)) if "://" in str(path) else path)
    name = path.parents[1].name.rpartition("--")[2] if path.parent.name == "snapshots" else path.name
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")
