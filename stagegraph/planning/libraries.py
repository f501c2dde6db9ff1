"""Libraries of others that a stage's code imports: which they are, and which build of them is installed.

Found by the imports of the code itself, also those inside functions, so no list can miss one. A version says too
little: two wheels of one version differ by what they were compiled with, and a library may be rebuilt in place. So a
distribution counts as its version and a digest of what it installed: of native libraries (``.so``) the content, read
again only if their stat has changed, and of all other files the digests that the installer wrote into ``RECORD``.
Nothing is imported. A package without such a list counts as all its sources and native libraries.

Of one version an index has a wheel for each Python, whose native modules differ though they do the same, so that the
keys of two Pythons would. A wheel for one Python that came from an index, and whose native libraries are those that it
brought, counts as its version and its platforms.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from stagegraph.digest import digest_file, digest_json, stat_id
from stagegraph.store.index import Index

SCHEMA = 2
NATIVE = re.compile(r"\.(so(\.\d+)*|dylib|dll|pyd)$")
ABSENT = "absent"
BY_NAME = {"import_module", "__import__", "find_spec"}  # what imports, or looks for, a module by its name
DIGITS = 16  # of a digest, behind a version: people read it
ONE_PYTHON = re.compile(r"[a-z]+\d+-(?!abi)[a-z]+\d+[a-z]*-((?:many|musl)linux_\w+|macosx_\w+|win\w+)")  # a wheel's tag
# Name, version, platforms of a wheel for one Python from an index ("" for any other), digest of all but native
# libraries, path of each native library -> what RECORD says of it.
Build = tuple[str, str, str, str, dict[str, str]]


class Libraries:
    """What is installed, each file read at most once and only if its stat has changed since it was read last."""

    def __init__(self, index: Index) -> None:
        self._index = index
        saved = index.get("libraries")
        saved = saved if isinstance(saved, dict) and saved.get("schema") == SCHEMA else {}
        self._saved: dict[str, dict[str, Any]] = {name: saved.get(name, {}) for name in ("folders", "builds", "files")}
        self._fresh: dict[tuple[str, str], Any] = {}
        self._found: dict[str, dict[str, str]] = {}
        self._stats: dict[str, dict[str, list[int]]] = {}
        self._grown = False

    def of(self, modules: Iterable[str]) -> dict[str, str]:
        """Return distribution -> version and build of all that brings the top-level ``modules``, ``"absent"`` if none.

        Where native code is among them, the C library counts too: exponents and logarithms are its own.
        """
        found: dict[str, str] = {}
        for module in modules:
            if module not in self._found:
                self._found[module] = self._identify(module)
            found |= self._found[module]
        native = any(self._stats[module] for module in modules)
        return dict(sorted({**found, **(_libc() if native else {})}.items()))

    def stats(self, modules: Iterable[str]) -> dict[str, list[int]]:
        """Return the stats of the native libraries behind ``modules``, which :meth:`of` was asked for."""
        return {path: stat for module in modules for path, stat in self._stats[module].items()}

    def files_read(self) -> dict[str, list[int]]:
        """Return the native libraries behind all that was asked for, with their stats."""
        return self.stats(self._stats)

    def changed(self, modules: Iterable[str]) -> list[str]:
        """Return those of the native libraries that are no longer what was digested."""
        return sorted(path for path, stat in self.stats(modules).items() if _stat(path) != stat)

    def save(self) -> None:
        """Write what was learned back to the index."""
        if self._grown:
            self._index.set("libraries", {"schema": SCHEMA, **self._saved})
            self._grown = False

    def _identify(self, module: str) -> dict[str, str]:
        self._stats[module] = {}
        builds = [self._remembered("builds", record, _build) for record in self._records(module)]
        builds = builds or [_loose(module)]
        return {name: self._identity(module, *about) for name, *about in builds}

    def _identity(self, module: str, version: str, platforms: str, rest: str, natives: Mapping[str, str]) -> str:
        if version == ABSENT:
            return version
        contents = {path: self._content(module, path) for path in natives}
        if platforms and contents == natives:
            return f"{version} {platforms}"
        named = {os.path.basename(path): content for path, content in contents.items()}  # noqa: PTH119
        return f"{version} {digest_json([rest, named])[:DIGITS]}"

    def _content(self, module: str, path: str) -> str:
        try:
            content: str = self._remembered("files", path, _recorded_digest)
            self._stats[module][path] = self._saved["files"][path][0]
        except OSError:
            return "unreadable"
        return content

    def _records(self, module: str) -> list[str]:
        """Return the ``RECORD`` of each distribution that brings a module; the first folder on the path wins."""
        for folder in sys.path:
            try:
                brought = self._remembered("folders", folder or ".", _brought)
            except OSError:
                continue
            if module in brought:
                return [f"{folder}/{info}/RECORD" for info in brought[module]]
        return []

    def _remembered(self, kind: str, path: str, compute: Any) -> Any:
        """Return what ``compute`` makes of a path, again only if its stat is another."""
        if (kind, path) not in self._fresh:
            now = list(stat_id(path))
            saved = self._saved[kind].get(path)
            if saved is None or saved[0] != now:
                saved = self._saved[kind][path] = [now, compute(path)]
                self._grown = True
            self._fresh[kind, path] = saved[1]
        return self._fresh[kind, path]


def top_names(tree: ast.AST) -> Iterator[str]:
    """Yield the top-level name of every absolute import, wherever it stands but under ``TYPE_CHECKING``.

    A module that is imported or looked for by a name written there counts too.
    """
    if isinstance(tree, ast.If) and "TYPE_CHECKING" in ast.dump(tree.test):
        for node in tree.orelse:
            yield from top_names(node)
        return
    names: list[str] = []
    if isinstance(tree, ast.Import):
        names = [alias.name for alias in tree.names]
    elif isinstance(tree, ast.ImportFrom) and not tree.level:
        names = [tree.module or ""]
    elif isinstance(tree, ast.Call) and tree.args and isinstance(tree.args[0], ast.Constant):
        called = getattr(tree.func, "attr", getattr(tree.func, "id", ""))
        names = [str(tree.args[0].value)] if called in BY_NAME else []
    yield from (top for name in names if (top := name.partition(".")[0]).isidentifier())
    for child in ast.iter_child_nodes(tree):
        yield from top_names(child)


def imported(names: Iterable[str], own: Iterable[str]) -> list[str]:
    """Return those of top-level names that are of others: neither of Python nor of the packages ``own``."""
    return sorted({*names} - {*own} - sys.stdlib_module_names)


def _stat(path: str) -> list[int]:
    try:
        return list(stat_id(path))
    except OSError:
        return []


def _brought(folder: str) -> dict[str, list[str]]:
    """Return top-level module -> the ``.dist-info`` folders of the distributions that bring it."""
    found: dict[str, list[str]] = {}
    for info in sorted(name for name in os.listdir(folder) if name.endswith(".dist-info")):  # noqa: PTH208
        try:
            tops = {row[0].partition("/")[0] for row in _rows(f"{folder}/{info}/RECORD")}
        except OSError:
            continue
        for module in {top.partition(".")[0] if "." in top else top for top in tops if not top.endswith(".dist-info")}:
            if module.isidentifier():
                found.setdefault(module, []).append(info)
    return found


def _build(record: str) -> Build:
    """Return what a distribution is made of, by its ``RECORD``: rows of path, digest and size."""
    folder, info = os.path.split(os.path.dirname(record))  # noqa: PTH120
    name, _, version = info.removesuffix(".dist-info").rpartition("-")
    rows = [row for row in _rows(record) if not row[0].endswith(".pyc") and row[0].partition("/")[0] != info]
    natives = {os.path.normpath(f"{folder}/{row[0]}"): row[1] for row in sorted(rows) if NATIVE.search(row[0])}
    rest = sorted(row[:2] for row in rows if not NATIVE.search(row[0]) and not row[0].startswith(".."))
    return re.sub(r"[-_.]+", "-", name).lower(), version, _platforms(f"{folder}/{info}"), digest_json(rest), natives


def _platforms(info: str) -> str:
    """Return the platforms of a wheel that an index has for this Python alone, "" of any other.

    What came from a folder or a URL has a ``direct_url.json``; what was built here, a platform that no index takes.
    """
    try:
        lines = Path(info, "WHEEL").read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return ""
    tags = [ONE_PYTHON.fullmatch(line[5:]) for line in lines if line.startswith("Tag: ")]
    platforms = [tag[1] for tag in tags if tag]
    return "" if len(platforms) < len(tags) or Path(info, "direct_url.json").exists() else " ".join(sorted(platforms))


def _recorded_digest(path: str) -> str:
    """Return a file's digest as ``RECORD`` writes it."""
    import hashlib
    from base64 import urlsafe_b64encode

    with open(path, "rb") as file:  # noqa: PTH123
        return "sha256=" + urlsafe_b64encode(hashlib.file_digest(file, "sha256").digest()).decode().rstrip("=")


def _rows(record: str) -> Iterator[list[str]]:
    import csv

    with open(record, encoding="utf-8", newline="") as file:  # noqa: PTH123
        yield from (row for row in csv.reader(file) if row)


def _loose(module: str) -> Build:
    """Return what a module is made of that no installed distribution lists: installed as links, or on the path."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        return module, ABSENT, "", "", {}
    places = list(spec.submodule_search_locations or ())
    files = [str(path) for place in places for path in _walk(place)] or [spec.origin or ""]
    natives = {path: "" for path in sorted(files) if NATIVE.search(path)}
    rest = sorted([Path(path).name, digest_file(path)] for path in files if path.endswith(".py"))
    return module, "unversioned", "", digest_json(rest), natives


def _walk(folder: str) -> Iterator[Path]:
    for where, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name != "__pycache__" and not name.startswith(".")]
        yield from (Path(where, name) for name in names)


def _libc() -> dict[str, str]:
    """Return the C library and its version, where the system says."""
    try:
        said = os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (AttributeError, ValueError, OSError):
        return {}
    name, _, version = said.partition(" ")
    return {"libc": f"{name} {version}"} if version else {}
