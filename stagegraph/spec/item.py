"""A value of a pipeline file together with where it is written, and the list of what is wrong with such values."""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from stagegraph.errors import SpecError, listed, nearest
from stagegraph.stage import Secret

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from stagegraph.spec.model import Place

_OF_A_KIND = 20  # problems shown
_PROBLEMS_LIMIT = 2_000  # each may take a comparison with all names there are


class Item(NamedTuple):
    """A value, its place, the directory that a relative path written there starts from, and the place of its key."""

    value: Value
    place: Place
    base: Path
    key: Place | None = None

    @property
    def named_at(self) -> Place:
        """The place of the key this value is written under; of the value itself where it has none."""
        return self.key or self.place


Scalar = None | bool | int | float | str
Value = Scalar | list[Item] | dict[str, Item]


class Reads:
    """What besides the code of stages a pipeline was read from: the same again makes the same pipeline.

    ``files``: path -> content; ``links``: path with ``..`` in it -> where that led; ``env``: variable -> value.
    ``lasting`` is False where reading it again says or finds something that nobody may keep: a secret, a warning.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.links: dict[str, str] = {}
        self.env: dict[str, str] = {}
        self.lasting = True

    def expanded(self, path: str) -> str:
        """Return a path with the home directory that a ``~`` at its beginning stands for."""
        if not path.startswith("~"):
            return path
        if home := os.environ.get("HOME"):
            self.env["HOME"] = home
        self.lasting &= bool(home) and path.partition("/")[0] == "~"  # else the system was asked
        return os.path.expanduser(path)  # noqa: PTH111 - of a text

    def absolute(self, path: Path) -> Path:
        """Return an absolute path without ``..``, which a symbolic link before it makes more than a matter of text."""
        if ".." not in path.parts:
            return path.absolute()
        self.links[str(path)] = real = os.path.realpath(path)
        return Path(real)


def text_of(value: Value) -> str:
    """Return a scalar as it reads inside other text and in a node's name."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)


def found(value: Value) -> str:
    """Describe a value of the wrong kind for a message."""
    if isinstance(value, dict):
        return "a mapping" if value else "an empty mapping"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    if isinstance(value, Secret):
        return "a secret"
    if isinstance(value, str):
        return f"the text '{value if len(value) <= 60 else value[:57] + '...'}'"
    if value is None or isinstance(value, bool):
        return text_of(value)
    return f"the number {value}"


class Problems:
    """What is wrong, by place. One mistake that shows in several subjects, say a variable, is one problem.

    ``reads`` is what was read to find that out.
    """

    def __init__(self, reads: Reads | None = None) -> None:
        self.reads = reads or Reads()
        self._subjects: dict[tuple[Place, str], list[str]] = {}

    def __bool__(self) -> bool:
        return bool(self._subjects)

    def add(self, place: Place, text: str, subject: str = "") -> None:
        """Note that ``subject`` (a key path or ``entry.parameter``) is wrong in the way that ``text`` says.

        Of a file with thousands of problems the first are raised at once.
        """
        if len(self._subjects) >= _PROBLEMS_LIMIT:
            raise self.error()
        subjects = self._subjects.setdefault((place, text), [])
        if subject and subject not in subjects:
            subjects.append(subject)

    def unexpected(self, item: Item, expected: str, subject: str = "") -> None:
        """Note that a value is not what was expected."""
        self.add(item.place, f"found {found(item.value)}; expected {expected}", subject)

    def mapping(
        self, item: Item, subject: str, keys: Collection[str] = (), *, advice: Callable[[str], str] = lambda _: ""
    ) -> dict[str, Item] | None:
        """Return the mapping that ``item`` is, noting keys that are not allowed; ``None``, noted too, if it is none.

        ``advice`` says of a key that is not allowed what it may be, if it knows.
        """
        if not isinstance(item.value, dict):
            self.unexpected(item, f"a mapping with keys of {', '.join(keys)}" if keys else "a mapping", subject)
            return None
        for key, value in item.value.items():
            if keys and key not in keys:
                self.add(value.named_at, f"unknown key '{key}'{advice(key) or nearest(key, keys)}")
        return item.value

    def check(self) -> None:
        """Raise :class:`SpecError` with every problem noted so far, sorted by place, if there is any."""
        if self._subjects:
            raise self.error()

    def error(self) -> SpecError:
        """Return every problem as one line, sorted by place; of many of a kind the first."""
        ordered = sorted(self._subjects.items(), key=lambda row: (row[0][0].file, row[0][0].line, row[0][0].column))
        kinds = Counter(_kind(text) for _, text in self._subjects)
        shown: Counter[str] = Counter()
        lines = []
        for (place, text), subjects in ordered:
            shown[_kind(text)] += 1
            if shown[_kind(text)] <= _OF_A_KIND:
                lines.append(f"{place}: {f'{listed(subjects)}: ' if subjects else ''}{text}")
            elif shown[_kind(text)] == _OF_A_KIND + 1:
                lines.append(f"{place}: and {kinds[_kind(text)] - _OF_A_KIND:,} more of this kind from here on")
        if len(self._subjects) >= _PROBLEMS_LIMIT:
            lines.append(f"reading ended after {_PROBLEMS_LIMIT:,} problems")
        return SpecError(*lines)


def _kind(text: str) -> str:
    """Return a problem without the names and numbers in it."""
    return re.sub(r"'[^']*'|[0-9]+", "", text)
