"""What one source file contributes to the code digest: a summary, which :mod:`stagegraph.planning.code` remembers."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypedDict

from stagegraph.digest import digest_bytes, digest_file
from stagegraph.local import LOCAL
from stagegraph.planning.libraries import followed
from stagegraph.planning.syntax import nodes, statements, syntax_text

FILE_NAME = re.compile(r"([\w-]+/)*[\w-]+(\.[\w-]+)+")  # below the folder of its module
BY_NAME = {"import_module", "__import__", "find_spec"}  # what imports, or looks for, a module by its name


class RowSummary(TypedDict):
    """What one row of a table adds: ``imports`` of first-party modules; ``data``, which may name files near it."""

    digest: str
    imports: list[str]
    data: list[str]


class Summary(RowSummary):
    """What a source file contributes; ``foreign`` are top-level names of others, ``tables`` name -> row -> summary."""

    foreign: list[str]
    tables: dict[str, dict[str, RowSummary]]


def summarise(module: str, path: Path) -> Summary:
    """Parse one file into what it contributes; source that does not parse, and what is compiled, are their bytes."""
    if path.suffix != ".py":
        return {"digest": digest_file(str(path)), "imports": [], "foreign": [], "data": [], "tables": {}}
    source = path.read_bytes()
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return {"digest": digest_bytes(source), "imports": [], "foreign": [], "data": [], "tables": {}}
    tables = {name: _rows(module, value) for name, value in _tables(tree)}
    tree.body = [node for node in tree.body if table_name(node) not in tables]
    strip_docstrings(tree)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = nodes(tree)
    return {
        "digest": digest_bytes(syntax_text(tree).encode()),
        "imports": sorted(set(_imports(found, package))),
        "foreign": sorted(set(top_names(tree))),
        "tables": tables,
        "data": sorted(set(_data_names(found))),
    }


def table_name(node: ast.stmt) -> str | None:
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
        name = table_name(node)
        if name is not None and isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict):
            yield name, node.value


def _rows(module: str, table: ast.Dict) -> dict[str, RowSummary]:
    roots = followed(module)
    rows: dict[str, RowSummary] = {}
    for key, value in zip(table.keys, table.values, strict=True):
        found = nodes(value)
        strings = [n.value for n in found if isinstance(n, ast.Constant) and isinstance(n.value, str)]
        modules = sorted({module for s in strings for module in _named(s, roots)})
        data = sorted(set(_data_names(found)))
        if isinstance(key, ast.Constant):
            digest = digest_bytes(syntax_text(value).encode())
            rows[str(key.value)] = {"digest": digest, "imports": modules, "data": data}
    return rows


def strip_docstrings(tree: ast.Module) -> None:
    """Remove the docstrings of a module and of all it defines."""
    for node in statements(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                node.body = node.body[1:]


def _imports(found: Iterable[ast.AST], package: str) -> Iterable[str]:
    """Yield what may be modules that count; of a file of a pipeline's folder, those that may lie beside it too."""
    roots = followed(package)
    for node in found:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]  # a name may be a submodule
        else:
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield from _named(node.value, roots)
            continue
        yield from (name for name in names if name.partition(".")[0] in roots)
        if package.partition(".")[0] == LOCAL and not (isinstance(node, ast.ImportFrom) and node.level):
            yield from (f"{package}.{name}" for name in names)


def top_names(tree: ast.AST) -> Iterator[str]:
    """Yield the top-level name of every absolute import, wherever it stands but under ``TYPE_CHECKING``.

    A module that is imported or looked for by a name written there counts too.
    """
    for node in nodes(tree, for_types=False):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            names = [str(node.args[0].value)] if called in BY_NAME else []
        yield from (top for name in names if (top := name.partition(".")[0]).isidentifier())


def _named(text: str, roots: Iterable[str]) -> list[str]:
    """Return what may be modules of the packages ``roots`` in a string: ``m`` of ``m:NAME``, of ``import m``."""
    return [found for root in roots if root in text for found in re.findall(rf"(?<![\w.]){root}(?:\.\w+)+", text)]


def _data_names(found: Iterable[ast.AST]) -> Iterator[str]:
    """Yield what looks like the name of a file, with folders where these are written before it as strings.

    Whether there is such a file is asked at every use.
    """
    for node in found:
        text = "/".join(_path(node))
        if text and FILE_NAME.fullmatch(text) and not text.endswith(".py"):
            yield text


def _path(node: ast.AST) -> list[str]:
    """Return the strings at the end of a path as code writes it: of ``here / "lib" / "a.so"`` the last two."""
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, str) else []
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
        return [*_path(node.left), *last] if (last := _path(node.right)) else []
    name = getattr(node.func, "attr", "") if isinstance(node, ast.Call) else ""
    if isinstance(node, ast.Call) and name in {"join", "joinpath", "with_name"}:
        parts = [_path(argument) for argument in node.args]
        known = next((i for i, part in enumerate(reversed(parts)) if not part), len(parts))
        return [text for part in parts[len(parts) - known :] for text in part]
    return []
