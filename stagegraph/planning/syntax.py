"""Renders a syntax tree as text that is the same on every version of Python; code digests are taken over it.

``ast.dump`` is not: 3.12 gave functions and classes a list of type parameters, and the first of them the parts of
f-strings an empty text here and there; 3.13 leaves empty lists out.
"""

from __future__ import annotations

import ast
from typing import Any


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
            if isinstance(value, ast.JoinedStr):
                field = [part for part in value.values if not (isinstance(part, ast.Constant) and part.value == "")]
            if name != "kind" and field is not None and field != []:  # kind: the u of u"text", which means nothing
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
