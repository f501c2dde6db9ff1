"""Renders a syntax tree as text that is the same on every version of Python; code digests are taken over it.

``ast.dump`` is not: 3.12 gave functions and classes a list of type parameters, and the first of them the parts of
f-strings an empty text here and there; 3.13 leaves empty lists out.
"""

from __future__ import annotations

import ast
from typing import Any


def nodes(tree: ast.AST, *, for_types: bool = True) -> list[ast.AST]:
    """Return a tree and all below it but operators and contexts (``Load``), level by level.

    ``for_types`` says whether that includes what stands under ``if TYPE_CHECKING``. ``ast.walk`` is slower by far.
    """
    found = [tree]
    for node in found:
        if not for_types and isinstance(node, ast.If) and is_for_types(node.test):
            found += node.orelse
            continue
        for name in node._fields:
            value = getattr(node, name, None)
            if type(value) is list:
                found += [item for item in value if isinstance(item, ast.AST)]
            elif name not in _NOT_WALKED and isinstance(value, ast.AST):
                found.append(value)
    return found


_NOT_WALKED = frozenset({"ctx", "op"})


def is_for_types(test: ast.expr) -> bool:
    """Say whether a condition asks for ``TYPE_CHECKING``."""
    return any("TYPE_CHECKING" in (getattr(node, "id", ""), getattr(node, "attr", "")) for node in nodes(test))


def statements(tree: ast.AST) -> list[ast.AST]:
    """Return a tree and all statements below it, with the branches that hold them, level by level."""
    found = [tree]
    for node in found:
        for name in ("body", "orelse", "finalbody", "handlers", "cases"):
            value = getattr(node, name, None)
            if type(value) is list:
                found += value
    return found


def syntax_text(tree: ast.AST) -> str:
    """Return a tree as text without places: what is None, empty or Python's choice of spelling is left out."""
    parts: list[str] = []
    _write(tree, parts)
    return "".join(parts)


def _write(value: Any, parts: list[str]) -> None:
    if isinstance(value, ast.AST):
        parts.append(f"{type(value).__name__}(")
        for name in value._fields:
            field = getattr(value, name, None)
            if field is None or field == [] or name == "kind":  # the u of u"text", which means nothing
                continue
            if name == "values" and isinstance(value, ast.JoinedStr):
                field = [part for part in field if not (isinstance(part, ast.Constant) and part.value == "")]
                if not field:
                    continue
            parts.append(f"{name}=")
            _write(field, parts)
            parts.append(",")
        parts.append(")")
    elif isinstance(value, list):
        parts.append("[")
        for item in value:
            _write(item, parts)
            parts.append(",")
        parts.append("]")
    else:
        parts.append(repr(value))
