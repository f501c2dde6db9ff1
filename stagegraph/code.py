"""The code digest: what a stage with given parameters can reach inside its own package, by content.

A module counts as its syntax tree without comments, docstrings and positions, so that cosmetic edits stay cosmetic.
The closure follows imports wherever they stand, also inside functions. Two things are finer than a module:

- a *table*, an upper-case module-level dictionary literal with string keys, contributes only the rows that
  :meth:`Stage.rows` names (all rows if it names none), and the modules that the strings of those rows name;
- a data file beside a module, named by a string constant in it, contributes its bytes.

Parsing is slow, so what one file contributes is summarised once and kept in the index under the file's stat.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from stagegraph.digest import digest_bytes, digest_file, digest_json, stat_id
from stagegraph.index import Index

SUMMARY_SCHEMA = f"1/py{sys.version_info.major}.{sys.version_info.minor}"
Summary = dict[str, Any]  # {"digest", "imports": [...], "tables": {table: {row: {"digest", "imports"}}}, "data": [...]}


class CodeDigests:
    """Digests of the code behind stages; summaries of source files are shared between runs through the index."""

    def __init__(self, index: Index) -> None:
        self._index = index
        saved = index.get("code") or {}
        self._saved: dict[str, Any] = saved.get("files", {}) if saved.get("schema") == SUMMARY_SCHEMA else {}
        self._summaries: dict[str, Summary] = {}
        self._paths: dict[str, Path | None] = {}
        self._closures: dict[tuple[str, str], dict[str, str]] = {}
        self._grown = False

    def closure(self, module: str, rows: Mapping[str, str | Sequence[str]]) -> dict[str, str]:
        """Return what ``module`` reaches: module, ``module:TABLE[row]`` or data file -> digest."""
        chosen = {table: [names] if isinstance(names, str) else sorted(names) for table, names in rows.items()}
        asked = (module, digest_json(chosen))
        if asked not in self._closures:
            self._closures[asked] = dict(sorted(self._walk(module, chosen)))
        return self._closures[asked]

    def save(self) -> None:
        """Write new summaries back to the index."""
        if self._grown:
            self._index.set("code", {"schema": SUMMARY_SCHEMA, "files": self._saved})
            self._grown = False

    def _walk(self, module: str, chosen: Mapping[str, list[str]]) -> Iterator[tuple[str, str]]:
        root = module.partition(".")[0]
        seen: set[str] = set()
        queue = [module]
        while queue:
            name = queue.pop()
            for part in _with_parents(name):
                path = None if part in seen else self._find(part, root)
                if path is None:
                    continue
                seen.add(part)
                summary = self._summary(part, path)
                yield part, summary["digest"]
                queue += summary["imports"]
                for file in summary["data"]:
                    yield file, digest_file(path.with_name(file))
                for table, contents in summary["tables"].items():
                    for row in chosen.get(f"{part}:{table}", contents):
                        if row in contents:
                            yield f"{part}:{table}[{row}]", contents[row]["digest"]
                            queue += contents[row]["imports"]

    def _find(self, module: str, root: str) -> Path | None:
        """Return the source file of a first-party module, without importing it."""
        if module.partition(".")[0] != root:
            return None
        if module not in self._paths:
            self._paths[module] = self._locate(module, root)
        return self._paths[module]

    def _locate(self, module: str, root: str) -> Path | None:
        if module == root:
            spec = importlib.util.find_spec(root)
            return Path(spec.origin) if spec and spec.origin else None
        top = self._find(root, root)
        if top is None:
            return None
        base = top.parent.joinpath(*module.split(".")[1:])
        for candidate in (base.with_suffix(".py"), base / "__init__.py"):
            if candidate.is_file():
                return candidate
        return None

    def _summary(self, module: str, path: Path) -> Summary:
        if module not in self._summaries:
            now = list(stat_id(path))
            saved = self._saved.get(str(path))
            if saved is None or saved[0] != now:
                saved = [now, summarise(module, path)]
                self._saved[str(path)] = saved
                self._grown = True
            self._summaries[module] = saved[1]
        return self._summaries[module]


def summarise(module: str, path: Path) -> Summary:
    """Parse one source file into what it contributes; a file that does not parse contributes its bytes."""
    source = path.read_bytes()
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return {"digest": digest_bytes(source), "imports": [], "tables": {}, "data": []}
    tables = {name: _rows(module, value) for name, value in _tables(tree)}
    tree.body = [node for node in tree.body if _table_name(node) not in tables]
    _strip_docstrings(tree)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    return {
        "digest": digest_bytes(ast.dump(tree).encode()),
        "imports": sorted(set(_imports(tree, package))),
        "tables": tables,
        "data": sorted(set(_data_files(tree, path.parent))),
    }


def _with_parents(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _table_name(node: ast.stmt) -> str | None:
    """Return the name of a table, if this statement defines one."""
    if isinstance(node, ast.Assign) and len(node.targets) == 1:
        target: ast.expr = node.targets[0]
    elif isinstance(node, ast.AnnAssign) and node.value is not None:
        target = node.target
    else:
        return None
    value = node.value
    keys = value.keys if isinstance(value, ast.Dict) else []
    literal = bool(keys) and all(isinstance(k, ast.Constant) and isinstance(k.value, str) for k in keys)
    return target.id if literal and isinstance(target, ast.Name) and target.id.isupper() else None


def _tables(tree: ast.Module) -> Iterator[tuple[str, ast.Dict]]:
    for node in tree.body:
        name = _table_name(node)
        if name is not None and isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict):
            yield name, node.value


def _rows(module: str, table: ast.Dict) -> dict[str, dict[str, Any]]:
    root = module.partition(".")[0]
    rows = {}
    for key, value in zip(table.keys, table.values, strict=True):
        strings = [n.value for n in ast.walk(value) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
        modules = sorted({s.partition(":")[0] for s in strings if s.startswith(f"{root}.")})
        if isinstance(key, ast.Constant):
            rows[str(key.value)] = {"digest": digest_bytes(ast.dump(value).encode()), "imports": modules}
    return rows


def _strip_docstrings(tree: ast.Module) -> None:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                node.body = node.body[1:]


def _imports(tree: ast.Module, package: str) -> Iterable[str]:
    root = package.partition(".")[0]
    for node in _runtime_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] == root)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            if base.partition(".")[0] == root:
                yield base
                yield from (f"{base}.{alias.name}" for alias in node.names)  # a name may be a submodule


def _runtime_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Walk a tree, leaving out ``if TYPE_CHECKING:`` blocks."""
    if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
        return
    yield node
    for child in ast.iter_child_nodes(node):
        yield from _runtime_nodes(child)


def _data_files(tree: ast.Module, folder: Path) -> Iterator[str]:
    for node in ast.walk(tree):
        text = node.value if isinstance(node, ast.Constant) else None
        if isinstance(text, str) and _like_file_name(text) and (folder / text).is_file():
            yield text


def _like_file_name(text: str) -> bool:
    plain = 3 < len(text) < 100 and "." in text and not {"/", "\n", "\0"} & set(text)
    return plain and not text.endswith(".py")
