"""The code digest: what a stage with given parameters can reach in its own package and the shipped one, by content.

A module counts as its syntax tree without comments, docstrings and positions, so that cosmetic edits stay cosmetic.
The closure follows imports wherever they stand: inside functions too, where code of a module runs that planning never
imports, and under ``TYPE_CHECKING``, where a module names what it is handed and calls. A string that names a module of
the package counts as an import of it. A compiled module (``.so``) is its bytes, and so is a native library that the
code names by its path from the module. Libraries of others that the code imports count as they are installed
(:mod:`stagegraph.planning.libraries`). Two things are finer than a module:

- a *table*, an upper-case module-level dictionary literal with string keys, contributes only the rows that
  :meth:`Stage.rows` names (all rows if it names none), and the modules that the strings of those rows name;
- a data file beside a module, named by a string constant in it, contributes its bytes; it may come and go.

The folder of the pipeline is a package too, :data:`stagegraph.local.LOCAL`, whose files import those beside them.

Parsing is slow, so what one file contributes is summarised once and kept in the index under the file's stat.

What a stage memoises (:mod:`stagegraph.store.memo`) is kept under the digest of the same closure, begun at the module
that makes it. Rows that the stage chose are left out there: like parameters, they are for the part's document to tell.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from importlib.machinery import BYTECODE_SUFFIXES, EXTENSION_SUFFIXES, SOURCE_SUFFIXES
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stagegraph.digest import digest_file, digest_json, stat_id
from stagegraph.errors import PlanError
from stagegraph.local import LOCAL
from stagegraph.planning.libraries import Libraries, followed, imported
from stagegraph.store.index import Index

if TYPE_CHECKING:
    from stagegraph.planning.summary import RowSummary, Summary
    from stagegraph.store.memo import PartCode

ENGINE = __name__.partition(".")[0]
# What may follow the name of a module, in the order in which Python looks: a compiled one comes before its source.
SUFFIXES = (*EXTENSION_SUFFIXES, *SOURCE_SUFFIXES, *BYTECODE_SUFFIXES)
SUMMARY_SCHEMA = 6


class CodeDigests:
    """Digests of the code behind stages; summaries of source files are shared between runs through the index."""

    def __init__(self, index: Index, folder: Path | None = None) -> None:
        """``folder`` is that of the pipeline, where the modules of the package ``local`` are."""
        self._index, self._folder = index, folder
        saved = index.get("code") or {}
        self._saved: dict[str, list[Any]] = saved.get("files", {}) if saved.get("schema") == SUMMARY_SCHEMA else {}
        self._contents: dict[str, Summary | str] = {}  # of a data file, its digest
        self._stats: dict[str, list[int]] = {}  # of files as they were when their contents were taken
        self._paths: dict[str, str | None] = {}
        self._closures: dict[tuple[str, str], tuple[dict[str, str], list[str]]] = {}
        self._installed = Libraries(index)
        self._packages: dict[str, list[str]] = {LOCAL: [str(folder)]} if folder else {}
        self._listings: dict[str, frozenset[str]] = {}
        self._grown = False

    def closure(self, module: str, rows: Mapping[str, str | Sequence[str]]) -> dict[str, str]:
        """Return what ``module`` reaches: module, ``module:TABLE[row]`` or ``module/data file`` -> digest."""
        return self._reach(module, rows)[0]

    def libraries(self, modules: Iterable[str], rows: Mapping[str, str | Sequence[str]]) -> dict[str, str]:
        """Return what all that ``modules`` reach imports of others: distribution -> version and build."""
        return self._installed.of(self._foreign(modules, rows))

    def changed_libraries(self, modules: Iterable[str], rows: Mapping[str, str | Sequence[str]]) -> list[str]:
        """Return the files of :meth:`libraries` that are no longer what they were when they counted."""
        return self._installed.changed(self._foreign(modules, rows))

    def sweep_libraries(self) -> bool:
        """Look once for Python files of libraries that were edited in place; say whether an earlier answer changes."""
        return self._installed.sweep()

    def _foreign(self, modules: Iterable[str], rows: Mapping[str, str | Sequence[str]]) -> list[str]:
        return sorted({name for module in modules for name in self._reach(module, rows)[1]})

    def _reach(self, module: str, rows: Mapping[str, str | Sequence[str]]) -> tuple[dict[str, str], list[str]]:
        """Return the closure, and the top-level names of others that it imports."""
        chosen = {table: [names] if isinstance(names, str) else sorted(names) for table, names in rows.items()}
        closure_id = (module, digest_json(chosen) if chosen else "")
        if closure_id not in self._closures:
            foreign: set[str] = set()
            found = dict(sorted(self._walk(module, chosen, foreign).items()))
            if module not in found:
                raise PlanError(f"the source of {module} cannot be found, so its results cannot be cached")
            self._closures[closure_id] = found, imported(foreign, (*followed(module), ENGINE))
        return self._closures[closure_id]

    def part_code(self, modules: Iterable[str], rows: Mapping[str, str | Sequence[str]]) -> PartCode:
        """Return the code behind the memoised parts of a stage that uses ``rows``: all that ``modules`` reach."""
        from stagegraph.store.memo import PartCode

        modules = list(modules)
        found = {name: digest for module in modules for name, digest in self.closure(module, rows).items()}
        counting = {name: digest for name, digest in found.items() if name.partition("[")[0] not in rows}
        stats = {path: self._stats[path] for path in filter(None, map(self._path, found))}
        libraries = self.libraries(modules, rows)
        stats |= self._installed.stats(self._foreign(modules, rows))
        return PartCode(digest_json([counting, libraries]), stats)

    def files_read(self) -> dict[str, list[int]]:
        """Return every file that was read for the answers so far, those of libraries too, with its stat."""
        return self._stats | self._installed.files_read()

    def changed(self, closure: Mapping[str, str]) -> list[str]:
        """Return the files behind a closure whose content is no longer what was digested."""
        fresh = CodeDigests(self._index, self._folder)
        fresh._saved = self._saved
        files = []
        for name, digest in closure.items():
            path = self._path(name)
            if path and "/" in name:
                files += [] if Path(path).is_file() and digest_file(path) == digest else [path]
            elif path and fresh.summary(name, path) != self._contents[path]:
                files.append(path)
        return files

    def _path(self, name: str) -> str | None:
        """Return the file behind a module or a data file of a closure; None for a row, whose module is in it too."""
        module, _, data = name.partition("/")
        path = self._paths.get(module)
        return str(Path(path).with_name(data)) if path and data else path

    def files(self, closure: Mapping[str, str]) -> dict[str, Path]:
        """Return where the modules of a closure are: module -> source file."""
        return {name: Path(path) for name in closure if (path := self._paths.get(name))}

    def own_files(self, closure: Mapping[str, str]) -> set[Path]:
        """Return the files of the pipeline's folder in a closure: modules, and data beside them."""
        return {Path(path) for name in closure if name.partition(".")[0] == LOCAL and (path := self._path(name))}

    def save(self) -> None:
        """Write new summaries back to the index."""
        if self._grown:
            self._index.set("code", {"schema": SUMMARY_SCHEMA, "files": self._saved})
            self._grown = False
        self._installed.save()

    def _walk(self, module: str, chosen: Mapping[str, list[str]], foreign: set[str]) -> dict[str, str]:
        """Return the closure; add what it imports of others to ``foreign``."""
        roots = followed(module)
        found: dict[str, str] = {}
        if ENGINE in roots and (path := self._find(module, roots)):  # the rest of the engine is in no key
            return {module: self.summary(module, path)["digest"]}
        queue, seen = [module], set[str]()
        while queue:
            parts = [part for part in _with_parents(queue.pop()) if part not in seen]
            seen.update(parts)
            for part in parts:
                if (path := self._find(part, roots)) is None:
                    continue
                summary = self.summary(part, path)
                found[part] = summary["digest"]
                others = summary["foreign"]
                if part.partition(".")[0] == LOCAL:
                    others = [name for name in others if not self._is_beside(part, name)]
                foreign.update(others)
                reaching: list[RowSummary] = [summary]
                for table, contents in summary["tables"].items():
                    rows = [row for row in chosen.get(f"{part}:{table}", contents) if row in contents]
                    found |= {f"{part}:{table}[{row}]": contents[row]["digest"] for row in rows}
                    reaching += [contents[row] for row in rows]
                for reached in reaching:
                    queue += [name for name in reached["imports"] if name not in seen]
                    found |= self._data(part, path, reached["data"]) if reached["data"] else {}
        return found

    def _is_beside(self, module: str, name: str) -> bool:
        """Say whether a module of the pipeline's folder finds the module ``name`` beside it or above."""
        return any(self._find(f"{package}.{name}", [LOCAL]) for package in _with_parents(module))

    def _data(self, module: str, path: str, names: Iterable[str]) -> dict[str, str]:
        """Return the digests of those ``names`` that are files beside a module; the listing rules out most."""
        folder = os.path.dirname(path)  # noqa: PTH120 - on the path of every no-op, like all strings here
        places = [(name, f"{folder}/{name}") for name in names]
        files = [(name, at) for name, at in places if at.rpartition("/")[2] in self._listing(at.rpartition("/")[0])]
        return {f"{module}/{name}": self._remembered(file, digest_file) for name, file in files if Path(file).is_file()}

    def _find(self, module: str, roots: Collection[str]) -> str | None:
        """Return the source file of a module of one of the packages ``roots``, without importing it."""
        if module.partition(".")[0] not in roots:
            return None
        if module not in self._paths:
            self._paths[module] = self._locate(module)
        return self._paths[module]

    def _locate(self, module: str) -> str | None:
        root, *parts = module.split(".")
        for base in self._roots(root):
            folder = "/".join([base, *parts[:-1]])
            package = f"{folder}/{parts[-1]}" if parts else base
            found = None if parts and parts[-1] not in self._listing(folder) else self._file(package, "__init__")
            found = found or (self._file(folder, parts[-1]) if parts else None)
            if found:
                return found
        return None

    def _file(self, folder: str, stem: str) -> str | None:
        """Return the file that Python would load as a module of that name in a folder."""
        names = self._listing(folder)
        return next((f"{folder}/{stem}{suffix}" for suffix in SUFFIXES if f"{stem}{suffix}" in names), None)

    def _listing(self, folder: str) -> frozenset[str]:
        """Return the names in a directory, none if there is no such directory; asked once a run."""
        if folder not in self._listings:
            try:
                self._listings[folder] = frozenset(os.listdir(folder))  # noqa: PTH208
            except OSError:
                self._listings[folder] = frozenset()
        return self._listings[folder]

    def _roots(self, root: str) -> list[str]:
        """Return the directories of a top-level package, which need not have an ``__init__.py``."""
        if root not in self._packages:
            spec = importlib.util.find_spec(root)
            self._packages[root] = list(spec.submodule_search_locations or ()) if spec else []
        return self._packages[root]

    def summary(self, module: str, path: str) -> Summary:
        """Return what one source file contributes; parsed only if its stat is not the one remembered."""

        def parsed(file: str) -> Summary:
            from stagegraph.planning.summary import summarise

            return summarise(module, Path(file))

        found: Summary = self._remembered(path, parsed)
        return found

    def _remembered(self, path: str, compute: Callable[[str], Any]) -> Any:
        if path not in self._contents:
            now = list(stat_id(path))
            saved = self._saved.get(path)
            if saved is None or saved[0] != now:
                _forget_bytecode(path)
                saved = [now, compute(path)]
                self._saved[path] = saved
                self._grown = True
            self._stats[path], self._contents[path] = saved
        return self._contents[path]


def _forget_bytecode(path: str) -> None:
    """Remove what Python compiled of a file: of the same size and second, it would run that instead of an edit."""
    if path.endswith(".py"):
        with contextlib.suppress(OSError, NotImplementedError):
            os.unlink(importlib.util.cache_from_source(path))  # noqa: PTH108


@functools.cache
def _with_parents(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]
