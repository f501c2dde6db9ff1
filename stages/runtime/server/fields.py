"""Reads the parameters of a request strictly: checks types and ranges, and refuses unknown parameters."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from stages.runtime.server.errors import ApiError

if TYPE_CHECKING:
    from collections.abc import Collection

    from stages.runtime.documents import JsonObject

DEEPEST = 100  # levels of nested lists and objects
_ESCAPED_SURROGATE = re.compile(rb"\\u[dD]")
_NAMES: dict[Any, str] = {bool: "true or false", str: "a string", list: "a list", dict: "an object"}


def parsed(data: bytes) -> Any:
    """Return the document in JSON ``data``; :class:`ValueError` says why there is none.

    Text with lone surrogates, and documents nested too deep, are refused too, as later steps could not process them.
    """
    try:
        document = json.loads(data.decode())  # stricter than json's own decoding
        if _ESCAPED_SURROGATE.search(data):
            json.dumps(document, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("holds text with lone surrogates") from None
    except (ValueError, RecursionError):
        raise ValueError("is not JSON") from None
    level = [document]
    for _ in range(DEEPEST + 1):
        level = [part for part in level if isinstance(part, dict | list)]
        if not level:
            return document
        level = [part for each in level for part in (each.values() if isinstance(each, dict) else each)]
    raise ValueError(f"is nested more than {DEEPEST} levels deep")


class Fields:
    """An object in a request's body; ``where`` is its path in the body. Parameters that are null count as absent."""

    def __init__(self, document: Any, known: Collection[str] | None = None, *, where: str = "") -> None:
        self._where = where
        if not isinstance(document, dict):
            raise ApiError(f"{where or 'the body'} must be an object, found {_shown(document)}", param=where or None)
        self._given: JsonObject = {name: value for name, value in document.items() if value is not None}
        if known is not None and (unknown := sorted(self._given.keys() - {*known})):
            import difflib  # imported only for an error

            close = difflib.get_close_matches(unknown[0], known, n=1, cutoff=0.7)
            advice = f"; did you mean {close[0]}?" if close else ""
            name = self.path(unknown[0])
            raise ApiError(f"unknown parameter {name:.80}{advice}", param=name[:80], code="unknown_parameter")

    def __contains__(self, name: str) -> bool:
        return name in self._given

    def path(self, name: str) -> str:
        """Return the path of a parameter."""
        return f"{self._where}.{name}" if self._where else name

    def raw(self, name: str) -> Any:
        """Return a parameter unchecked, None if it is absent."""
        return self._given.get(name)

    def wrong(self, name: str, wanted: str) -> ApiError:
        """Return the error for a parameter that is not ``wanted``."""
        path = self.path(name)
        return ApiError(f"{path} must be {wanted}, found {_shown(self.raw(name))}", param=path, code="invalid_value")

    def take(self, name: str, kind: type, default: Any = None) -> Any:
        """Return a parameter, which must be of ``kind``: bool, str, list or dict."""
        if name not in self._given:
            return default
        value = self._given[name]
        if not isinstance(value, kind):
            raise self.wrong(name, _NAMES[kind])
        return value

    def number(self, name: str, default: float, low: float, high: float) -> float:
        """Return a number from ``low`` to ``high``, both included."""
        value = self._given.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise self.wrong(name, f"a number from {low:g} to {high:g}")
        return float(value)

    def integer(self, name: str, default: int | None, low: int, high: int) -> int | None:
        """Return an integer from ``low`` to ``high``, both included."""
        if name not in self._given:
            return default
        value = self._given[name]
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.wrong(name, f"a whole number from {low:,} to {high:,}")
        return value

    def texts(self, name: str, most: int) -> list[str]:
        """Return a string, or a list of at most ``most`` strings, as a list."""
        value = self._given.get(name, [])
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or len(values) > most or not all(isinstance(v, str) and v for v in values):
            raise self.wrong(name, f"a string that is not empty, or a list of at most {most} such strings")
        return values


def _shown(value: Any) -> str:
    return f"{value!a:.60}"
