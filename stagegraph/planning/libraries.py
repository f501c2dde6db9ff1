"""Third-party libraries that a stage's code imports: which they are, and which build of each is installed.

Found by the imports of the code itself, also those inside functions, so no list can miss one. A version says too
little: two wheels of one version differ by what they were compiled with, and a library may be rebuilt in place. So a
distribution counts as its version and a digest of what it installed: of native libraries (``.so``) the content, read
again only if their stat has changed, and of all other files the digests that the installer wrote into ``RECORD``.
Nothing is imported. A package without such a list counts as all its sources and native libraries.

Of one version an index has a wheel for each Python, whose native modules differ though they do the same, so that the
keys of two Pythons would. A wheel for one Python that came from an index, and whose native libraries are those that it
brought, counts as its version and its platforms.

To ask each of thousands of Python files for its stat would cost a run without news more than all else. So whether one
was edited in place is found out before anything is executed (:meth:`Libraries.sweep`): what is younger than ``RECORD``
is read, and what differs from it counts by its content from then on, like a native library.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from stagegraph.digest import digest_json, is_unchanged, stat_id
from stagegraph.registry import SHIPPED
from stagegraph.store.index import Index

if TYPE_CHECKING:
    from stagegraph.planning.installed import Build
    from stagegraph.stage import Json

SCHEMA = 2
READ = "libraries:read"  # in the index: Python files that are younger than their RECORD, with stat and digest
ABSENT, UNREADABLE = "absent", "unreadable"
DIGITS = 16  # of a digest, behind a version: people read it
Swept = tuple[list[int], str]  # the stat and the digest of a Python file
# What the index keeps: under a path, [its stat, what was made of it]; of "edited", {row of RECORD: the digest there}.
SECTIONS = ("folders", "builds", "files", "edited")


class Libraries:
    """The installed libraries; a file is read at most once, and only if its stat has changed since the last time."""

    def __init__(self, index: Index) -> None:
        self._index = index
        saved = index.get("libraries")
        saved = saved if isinstance(saved, dict) and saved.get("schema") == SCHEMA else {}
        self._saved: dict[str, dict[str, Json]] = {name: saved.get(name, {}) for name in SECTIONS}
        self._fresh: dict[tuple[str, str], Any] = {}
        self._found: dict[str, dict[str, str]] = {}
        self._stats: dict[str, dict[str, list[int]]] = {}
        self._grown = False
        self._swept: dict[str, dict[str, Swept]] | None = None  # RECORD -> the Python files that it lists

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
        """Return the files behind the answers so far, with their stats: native libraries, and swept Python files."""
        return self.stats(self._stats) | {path: stat for path, (stat, _) in self._python(self._stats).items()}

    def changed(self, modules: Iterable[str]) -> list[str]:
        """Return the files behind ``modules`` whose content is no longer what was digested or swept."""
        modules = list(modules)
        natives = {path: (stat, self._saved["files"][path][1]) for path, stat in self.stats(modules).items()}
        return sorted(
            path
            for path, (stat, digest) in (natives | self._python(modules)).items()
            if not is_unchanged(path, stat, functools.partial(_is, path, digest))
        )

    def sweep(self) -> bool:
        """Examine every Python file of the libraries, now and in later answers; say whether an earlier answer changes.

        Only the first time: what is edited later changes under a run.
        """
        if self._swept is not None:
            return False
        self._swept = {}
        before, self._found = self._found, {}
        self.of(before)
        return self._found != before

    def save(self) -> None:
        """Write new digests back to the index."""
        if self._grown:
            self._index.set("libraries", {"schema": SCHEMA, **self._saved})
            self._grown = False

    def _identify(self, module: str) -> dict[str, str]:
        self._stats[module] = {}
        builds = [(self._remembered("builds", record), record) for record in self._records(module)]
        builds = builds or [(_unlisted(module), "")]
        return {name: self._identity(module, record, *about) for (name, *about), record in builds}

    def _identity(
        self, module: str, record: str, version: str, platforms: str, rest: str, natives: Mapping[str, str]
    ) -> str:
        if version == ABSENT:
            return version
        contents = {path: self._content(module, path) for path in natives}
        edited = self._edited(module, record)
        if platforms and contents == natives and not edited:
            return f"{version} {platforms}"
        named = {os.path.basename(path): content for path, content in contents.items()}  # noqa: PTH119
        return f"{version} {digest_json([rest, {**named, **edited}])[:DIGITS]}"

    def _edited(self, module: str, record: str) -> dict[str, str]:
        """Return the Python files of a distribution that are not what its installer listed, by content."""
        if self._swept is not None and record and record not in self._swept:
            self._swept[record], edited = self._sweep(record)
            if edited != self._saved["edited"].get(record, {}):
                self._saved["edited"][record], self._grown = edited, True
        listed = self._saved["edited"].get(record)
        if not listed:
            return {}
        folder = _site(record)
        contents = {row: self._content(module, f"{folder}/{row}") for row in listed}
        return {row: content for row, content in contents.items() if content != listed[row]}

    def _sweep(self, record: str) -> tuple[dict[str, Swept], dict[str, str]]:
        """Return the Python files that ``RECORD`` lists, and rows with the digests there of those that differ."""
        from stagegraph.planning.installed import python_files

        folder, installed = _site(record), stat_id(record)[-1]
        read = self._index.get(READ) or {}
        swept: dict[str, Swept] = {}
        edited, grown = {}, False
        for row, digest in python_files(record):
            path = f"{folder}/{row}"
            now = _stat(path)
            if now and now[-1] < installed:  # the list was written last
                swept[path] = now, digest
                continue
            if path not in read or read[path][0] != now:
                read[path], grown = [now, _digest(path)], True
            swept[path] = now, read[path][1]
            if read[path][1] != digest:
                edited[row] = digest
        if grown:
            self._index.set(READ, read)
        return swept, edited

    def _python(self, modules: Iterable[str]) -> dict[str, Swept]:
        """Return the Python files behind ``modules``, as far as they were swept."""
        swept = self._swept or {}
        records = {record for module in modules for record in self._records(module)}
        return {path: found for record in records for path, found in swept.get(record, {}).items()}

    def _content(self, module: str, path: str) -> str:
        try:
            content: str = self._remembered("files", path)
            self._stats[module][path] = self._saved["files"][path][0]
        except OSError:
            return UNREADABLE
        return content

    def _records(self, module: str) -> list[str]:
        """Return the ``RECORD`` of each distribution that brings a module; the first folder on the path wins."""
        for folder in sys.path:
            try:
                brought = self._remembered("folders", folder or ".")
            except OSError:
                continue
            if module in brought:
                return [f"{folder}/{info}/RECORD" for info in brought[module]]
        return []

    def _remembered(self, kind: str, path: str) -> Any:
        """Return what is read of a path, again only if its stat is another."""
        if (kind, path) not in self._fresh:
            now = list(stat_id(path))
            saved = self._saved[kind].get(path)
            if saved is None or saved[0] != now:
                from stagegraph.planning.installed import READERS

                saved = self._saved[kind][path] = [now, READERS[kind](path)]
                self._grown = True
                if kind == "builds":
                    self._saved["edited"].pop(path, None)  # it was installed anew
            self._fresh[kind, path] = saved[1]
        return self._fresh[kind, path]


def followed(module: str) -> frozenset[str]:
    """Return the packages whose modules count for a module: its own, and the one that comes with the engine."""
    return frozenset({module.partition(".")[0], SHIPPED.partition(".")[0]})


def imported(names: Iterable[str], own: Iterable[str]) -> list[str]:
    """Return the third-party top-level names: neither of the standard library nor of the packages ``own``."""
    return sorted({*names} - {*own} - sys.stdlib_module_names)


def _site(record: str) -> str:
    """Return the folder that the rows of a ``RECORD`` start from."""
    return os.path.dirname(os.path.dirname(record))  # noqa: PTH120


def _stat(path: str) -> list[int]:
    try:
        return list(stat_id(path))
    except OSError:
        return []


def _is(path: str, digest: str) -> bool:
    return _digest(path) == digest


def _digest(path: str) -> str:
    from stagegraph.planning.installed import recorded_digest

    try:
        return recorded_digest(path)
    except OSError:
        return UNREADABLE


def _unlisted(module: str) -> Build:
    """Return what a module is made of that no installed distribution lists."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        return module, ABSENT, "", "", {}
    from stagegraph.planning.installed import loose

    return loose(module, spec)


def _libc() -> dict[str, str]:
    """Return the C library and its version, where the system says."""
    try:
        library = os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (AttributeError, ValueError, OSError):
        return {}
    name, _, version = library.partition(" ")
    return {"libc": f"{name} {version}"} if version else {}
