"""Stores source texts beside results, and finds the functions, classes and constants that differ between two texts.

A text is kept when a result is committed, under the digest that stands for the module in the key, so that planning
never looks at it and equal code is kept once.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from stagegraph.planning.summary import strip_docstrings, table_name
from stagegraph.planning.syntax import syntax_text

if TYPE_CHECKING:
    from stagegraph.store.index import Index

REST = "the rest of the module"
Definition = tuple[str, str]  # kind, qualified name


def keep(index: Index, code: Mapping[str, str], files: Mapping[str, Path]) -> None:
    """Store the source texts of the modules in ``code`` (module -> digest) that are not stored yet."""
    for module, path in files.items():
        if path.suffix == ".py" and index.get(f"text:{code[module]}") is None:
            index.set(f"text:{code[module]}", path.read_text("utf-8", "replace"))


def kept(index: Index, digest: str) -> str | None:
    """Return the stored text for a module's digest, or None."""
    text = index.get(f"text:{digest}")
    return text if isinstance(text, str) else None


def changed_definitions(old: str, new: str) -> list[str]:
    """Return what differs: ``functions Attention.forward, run``, ``class Layer (new)``; "" if a text does not parse."""
    try:
        before, after = definitions(old), definitions(new)
    except SyntaxError:
        return []
    found: dict[str, list[str]] = {}
    for kind, name in sorted({*before, *after}):
        was, now = before.get((kind, name)), after.get((kind, name))
        if was != now:
            found.setdefault(kind, []).append(name + (" (new)" if was is None else " (gone)" if now is None else ""))
    rest = found.pop("", None)
    changes = [f"{_plural(kind, len(names))} {', '.join(names)}" for kind, names in sorted(found.items(), reverse=True)]
    return changes + ([REST] if rest else [])


def _plural(kind: str, count: int) -> str:
    return kind if count == 1 else "classes" if kind == "class" else f"{kind}s"


def definitions(source: str) -> dict[Definition, str]:
    """Return (kind, qualified name) -> syntax tree as text, without docstrings; tables count by row, not here."""
    tree = ast.parse(source)
    strip_docstrings(tree)
    body = [node for node in tree.body if table_name(node) is None]
    found: dict[Definition, str] = {}
    for key, text in _parts(body, "", ""):
        found[key] = found.get(key, "") + text  # of the same name in branches of an ``if``
    return found


def _parts(body: Iterable[ast.stmt], prefix: str, rest: str) -> Iterator[tuple[Definition, str]]:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield ("function", prefix + node.name), syntax_text(node)
        elif isinstance(node, ast.ClassDef):
            yield from _parts(node.body, f"{prefix}{node.name}.", f"{prefix}{node.name}")
            node.body = []
            yield ("class", prefix + node.name), syntax_text(node)
        elif rest:
            yield ("class", rest), syntax_text(node)
        elif names := _assigned(node):
            yield ("constant", names), syntax_text(node)
        else:
            yield ("", ""), syntax_text(node)


def _assigned(node: ast.stmt) -> str:
    if isinstance(node, ast.Assign):
        return ", ".join(ast.unparse(target) for target in node.targets)
    return ast.unparse(node.target) if isinstance(node, ast.AnnAssign) else ""
