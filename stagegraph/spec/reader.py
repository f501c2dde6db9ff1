"""YAML text to :class:`Item` trees: YAML 1.2 core scalars, a place for every value, nothing constructed by tag.

PyYAML only parses here; its own scalar rules are YAML 1.1's, where ``no`` is false and ``010`` is eight.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import yaml

try:
    from yaml import CSafeLoader as _BaseLoader
except ImportError:  # PyYAML built without libyaml: slower, and the same
    from yaml import SafeLoader as _BaseLoader  # type: ignore[assignment]

from stagegraph.spec.item import Item, Problems, Scalar, found

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from stagegraph.spec.model import Place

DEPTH_LIMIT = 64
# Values and keys as written, values after aliases are followed, keys that merges copy; a pipeline of 1,000 entries has
# about 20,000. What these many take is measured in docs/guarantees.md.
SIZE_LIMIT = 100_000

_PLAIN = "plain"
_STANDARD_TAGS = {_PLAIN, "tag:yaml.org,2002:str", "tag:yaml.org,2002:seq", "tag:yaml.org,2002:map"}
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


class _Loader(_BaseLoader):
    """Composes nodes, marks plain scalars as such and refuses nesting that only an attack would write."""

    depth = composed = 0

    def resolve(self, kind: Any, value: Any, implicit: Any) -> str:  # noqa: ARG002 - called by PyYAML
        if kind is not yaml.ScalarNode:
            return "tag:yaml.org,2002:seq" if kind is yaml.SequenceNode else "tag:yaml.org,2002:map"
        return _PLAIN if implicit[0] else "tag:yaml.org,2002:str"

    def descend_resolver(self, current_node: Any, current_index: Any) -> None:  # noqa: ARG002
        self.depth += 1
        self.composed += 1
        if self.composed > SIZE_LIMIT:  # each takes 400 bytes, before any is looked at
            raise yaml.MarkedYAMLError(
                problem=f"it has more than {SIZE_LIMIT:,} values", problem_mark=current_node.start_mark
            )
        if self.depth > DEPTH_LIMIT:
            mark = current_node.start_mark
            raise yaml.MarkedYAMLError(problem=f"values are nested deeper than {DEPTH_LIMIT} levels", problem_mark=mark)

    def ascend_resolver(self) -> None:
        self.depth -= 1


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
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        return _Reader(at, base, problems).read(node) if node else Item(None, at(1, 1), base)
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
        loader.dispose()


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
    """Turns composed nodes into items. An alias shares its anchor's item, so following one costs nothing."""

    def __init__(self, at: Callable[[int, int], Place], base: Path, problems: Problems) -> None:
        self._at, self._base, self._problems = at, base, problems
        self._done: dict[int, Item] = {}
        self._size: dict[int, int] = {}
        self._open: set[int] = set()
        self._copied = 0  # keys, by merges

    def read(self, node: yaml.Node) -> Item:
        if id(node) in self._done:
            return self._done[id(node)]
        if id(node) in self._open:
            raise yaml.MarkedYAMLError(
                problem="an alias stands inside the value it names", problem_mark=node.start_mark
            )
        if node.tag not in _STANDARD_TAGS:
            self._problems.add(
                self._place(node), f"tag '{node.tag}' is not allowed; expected a plain value without a tag"
            )
        self._open.add(id(node))
        item = self._item(node)
        self._open.discard(id(node))
        self._done[id(node)] = item
        return item

    def _item(self, node: yaml.Node) -> Item:
        place = self._place(node)
        if isinstance(node, yaml.ScalarNode):
            return Item(core_scalar(node.value) if node.tag == _PLAIN else node.value, place, self._base)
        if isinstance(node, yaml.SequenceNode):
            items = [self.read(child) for child in node.value]
            self._measure(node, node.value)
            return Item(items, place, self._base)
        mapping = self._mapping(node)
        self._measure(node, [value for _, value in node.value])
        return Item(mapping, place, self._base)

    def _mapping(self, node: yaml.Node) -> dict[str, Item]:
        own: dict[str, Item] = {}
        inherited: dict[str, Item] = {}
        for key_node, value_node in node.value:
            place, item = self._place(key_node), self.read(value_node)
            name = self.read(key_node).value
            if name == "<<" and key_node.tag == _PLAIN:
                self._copied += len(inherited)
                inherited = {**self._merged(item, value_node.start_mark), **inherited}
            elif not isinstance(name, str):
                self._problems.add(
                    place, f"a key is {found(name)}; expected text, in quotes where it would not be read as such"
                )
            elif name in own:
                self._problems.add(place, f"duplicate key '{name}'; it is already written at {own[name].key}")
            else:
                own[name] = Item(item.value, item.place, item.base, place)
        return {**inherited, **own} if inherited else own

    def _merged(self, item: Item, mark: Any) -> dict[str, Item]:
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
                raise yaml.MarkedYAMLError(problem=f"its merges copy more than {SIZE_LIMIT:,} keys", problem_mark=mark)
        return merged

    def _measure(self, node: yaml.Node, children: list[yaml.Node]) -> None:
        self._size[id(node)] = size = 1 + sum(self._size.get(id(child), 1) for child in children)
        if size > SIZE_LIMIT:
            raise yaml.MarkedYAMLError(
                problem=f"its aliases stand for more than {SIZE_LIMIT:,} values", problem_mark=node.start_mark
            )

    def _place(self, node: yaml.Node) -> Place:
        return self._at(node.start_mark.line + 1, node.start_mark.column + 1)
