"""YAML text to :class:`Item` trees: YAML 1.2 core scalars, a place for every value, nothing constructed by tag.

PyYAML only parses here; its own scalar rules are YAML 1.1's, where ``no`` is false and ``010`` is eight.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

try:
    from yaml import CSafeLoader as _Parser
except ImportError:  # PyYAML built without libyaml: slower, and the same
    from yaml import SafeLoader as _Parser  # type: ignore[assignment]

from stagegraph.spec.item import Item, Problems, Scalar, Value, found

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from stagegraph.spec.model import Place

DEPTH_LIMIT = 64
# Values and keys, those that aliases stand for included, and keys that merges copy; a pipeline of 30,000 entries has
# about 330,000. What these many take is measured in docs/guarantees.md.
SIZE_LIMIT = 400_000
DIRECTIVES_LIMIT = 100  # of %TAG, each of which the parser compares with all before it

_STANDARD_TAGS = {None, "!", "tag:yaml.org,2002:str", "tag:yaml.org,2002:seq", "tag:yaml.org,2002:map"}
# What YAML 1.1 lets no document hold. The second takes ten milliseconds to compile, which ASCII files are spared.
_UNREADABLE_ASCII = "[^\t\n\r\x20-\x7e]"
_UNREADABLE = "[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]"

_CONSTANTS: dict[str, Scalar] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
    **{sign + name: float(sign + "inf") for sign in ("", "+", "-") for name in (".inf", ".Inf", ".INF")},
}
# Digits are bounded because Python refuses to convert or print integers of thousands of them.
_NUMBER = re.compile(
    r"(?P<int>[-+]?[0-9]{1,400})|0o(?P<oct>[0-7]{1,400})|0x(?P<hex>[0-9a-fA-F]{1,400})"
    r"|(?P<float>[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?)"
)


def core_scalar(text: str) -> Scalar:
    """Return what a plain scalar means under YAML 1.2's core schema."""
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if not (text[0].isdigit() or text[0] in "+-."):
        return text
    match = _NUMBER.fullmatch(text)
    if match is None:
        return text
    digits = match[match.lastgroup or 0]
    if match.lastgroup == "float":
        return float(digits)
    return int(digits, {"int": 10, "oct": 8, "hex": 16}[match.lastgroup or "int"])


def parse(text: str, at: Callable[[int, int], Place], base: Path, problems: Problems) -> Item | None:
    """Read one YAML document, null if it is empty; ``None``, with a problem noted, if it is not YAML.

    ``at`` makes the place of a line and column (both from 1); ``base`` is where relative paths in it start.
    """
    unreadable = re.search(_UNREADABLE_ASCII if text.isascii() else _UNREADABLE, text)
    if unreadable:
        line_start = text.rfind("\n", 0, unreadable.start()) + 1
        place = at(text.count("\n", 0, line_start) + 1, unreadable.start() - line_start + 1)
        problems.add(place, f"character U+{ord(unreadable[0]):04X} is not allowed in YAML; expected printable text")
        return None
    directives = text.count("%TAG")
    if directives > DIRECTIVES_LIMIT:  # of which those in texts and comments count for nothing
        directives = sum(line.startswith("%TAG") for line in text.splitlines())
    if directives > DIRECTIVES_LIMIT:
        problems.add(at(1, 1), f"{directives:,} %TAG directives; expected none, for values have no tags here")
        return None
    parser = _Parser(text)
    try:
        return _Reader(parser.get_event, at, base, problems).document()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = at(mark.line + 1, mark.column + 1) if mark else at(1, 1)
        start = error.context_mark
        started = f" ({at(start.line + 1, start.column + 1)})" if start else ""
        context = f"{error.context}{started}, " if error.context else ""
        problems.add(
            place, f"cannot be read as YAML: {context}{error.problem}{_advice(text, mark, str(error.problem))}"
        )
        return None
    finally:
        parser.dispose()


def _advice(text: str, mark: Any, problem: str) -> str:
    """Say what people have in mind where YAML's own message does not."""
    line = [*text.split("\n")[mark.line :], ""][0] if mark else ""
    at = line[max(0, mark.column - 1) : mark.column + 1] if mark else ""
    if "cannot start any token" in problem and "\t" in at:
        return "; YAML is indented with spaces, and this is a tab"
    if "mapping values are not allowed" in problem:
        return "; a text that has ': ' in it needs quotes, or the line above lacks its ':'"
    return "; inside braces and brackets a text with ${ } needs quotes" if at == "${" else ""


class _Reader:
    """Turns a parser's events into items. An alias shares its anchor's item, so following one costs nothing."""

    def __init__(
        self, event: Callable[[], Any], at: Callable[[int, int], Place], base: Path, problems: Problems
    ) -> None:
        self._event, self._at, self._base, self._problems = event, at, base, problems
        self._anchors: dict[str, _Anchor] = {}
        self._depth = self._values = self._copied = 0

    def document(self) -> Item:
        """Return the one document there is, null if there is none."""
        self._event()  # the start of the stream
        if isinstance(self._event(), yaml.StreamEndEvent):
            return Item(None, self._at(1, 1), self._base)
        first = self._event()
        item = self._item(first)
        self._event()  # the end of the document
        more = self._event()
        if not isinstance(more, yaml.StreamEndEvent):
            context = "expected a single document in the stream"
            raise yaml.MarkedYAMLError(context, first.start_mark, "but found another document", more.start_mark)
        return item

    def _item(self, event: Any, key: Place | None = None) -> Item:
        if type(event) is yaml.AliasEvent:
            return self._aliased(event)._replace(key=key)
        mark, values = event.start_mark, self._values
        place = self._at(mark.line + 1, mark.column + 1)
        self._values += 1
        if self._values > SIZE_LIMIT:
            raise _refusal(f"it has more than {SIZE_LIMIT:,} values", event)
        if event.tag not in _STANDARD_TAGS:
            self._problems.add(place, f"tag '{event.tag}' is not allowed; expected a plain value without a tag")
        if event.anchor is not None:
            self._begin(event)
        value: Value
        if type(event) is yaml.ScalarEvent:
            value = core_scalar(event.value) if _is_plain(event) else event.value
        else:
            self._depth += 1
            if self._depth > DEPTH_LIMIT:
                raise _refusal(f"values are nested deeper than {DEPTH_LIMIT} levels", event)
            value = self._list() if type(event) is yaml.SequenceStartEvent else self._mapping()
            self._depth -= 1
        item = Item(value, place, self._base, key)
        if event.anchor is not None:
            self._anchors[event.anchor] = _Anchor(event.start_mark, item, self._values - values)
        return item

    def _list(self) -> list[Item]:
        items = []
        while type(event := self._event()) is not yaml.SequenceEndEvent:
            items.append(self._item(event))
        return items

    def _mapping(self) -> dict[str, Item]:
        own: dict[str, Item] = {}
        inherited: dict[str, Item] = {}
        while type(key := self._event()) is not yaml.MappingEndEvent:
            name, place, *_ = self._item(key)
            event = self._event()
            item = self._item(event, place)
            if name == "<<" and _is_plain(key):
                self._copied += len(inherited)
                inherited = {**self._merged(item, event), **inherited}
            elif not isinstance(name, str):
                self._problems.add(
                    place, f"a key is {found(name)}; expected text, in quotes where it would not be read as such"
                )
            elif name in own:
                self._problems.add(place, f"duplicate key '{name}'; it is already written at {own[name].key}")
            else:
                own[name] = item
        return {**inherited, **own} if inherited else own

    def _merged(self, item: Item, event: Any) -> dict[str, Item]:
        """Return what a merge key brings in; of several mappings the first that has a key wins."""
        mappings = [part.value for part in (item.value if isinstance(item.value, list) else [item])]
        if not all(isinstance(mapping, dict) for mapping in mappings):
            self._problems.unexpected(item, "a mapping or a list of mappings to merge", "<<")
            return {}
        merged: dict[str, Item] = {}
        for mapping in mappings:
            merged = {**mapping, **merged} if isinstance(mapping, dict) else merged
            self._copied += len(merged)
            if self._copied > SIZE_LIMIT:
                raise _refusal(f"its merges copy more than {SIZE_LIMIT:,} keys", event)
        return merged

    def _aliased(self, event: Any) -> Item:
        """Return the item that an alias names; what it stands for counts again."""
        anchor = self._anchors.get(event.anchor)
        if anchor is None:
            raise _refusal("found undefined alias", event)
        if anchor.item is None:
            raise _refusal("an alias stands inside the value it names", event)
        self._values += anchor.values
        if self._values > SIZE_LIMIT:
            raise _refusal(f"its aliases stand for more than {SIZE_LIMIT:,} values", event)
        return anchor.item

    def _begin(self, event: Any) -> None:
        if event.anchor in self._anchors:
            context, first = "found duplicate anchor; first occurrence", self._anchors[event.anchor].mark
            raise yaml.MarkedYAMLError(context, first, "second occurrence", event.start_mark)
        self._anchors[event.anchor] = _Anchor(event.start_mark, None, 0)


class _Anchor(NamedTuple):
    """Where an anchor is, the item that it names (None until that is whole), and how many values that has."""

    mark: Any
    item: Item | None
    values: int


def _is_plain(event: Any) -> bool:
    return type(event) is yaml.ScalarEvent and event.implicit[0] and event.tag in {None, "!"}


def _refusal(problem: str, event: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
