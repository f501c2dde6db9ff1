"""The ``foreach`` of an entry: every combination of its values, without those it excludes and with those it includes.

A value is a scalar; a path, whose last folder is part of the nodes' names; or a record, whose ``name`` is, and whose
other fields are values of their own, ``${each.KEY.FIELD}``.
"""

from __future__ import annotations

import itertools
import math
import os
import re
from typing import TYPE_CHECKING, NamedTuple

from stagegraph.errors import nearest
from stagegraph.files import path_name
from stagegraph.spec.item import Item, Problems, text_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from stagegraph.spec.entries import Entry
    from stagegraph.spec.scope import Bindings, Scope

NAME, RULES = "name", ("exclude", "include")
_VALUE_NAME = re.compile(r"[\w.+-]+")  # becomes part of a directory's name and of patterns on the command line
NODES_LIMIT = 30_000
_EXCLUDED_LIMIT = 3_000_000  # combinations times rules that exclude some: each is compared with each


class InstanceValues(NamedTuple):
    """The values of one instance as its name has them, and what ``${each.…}`` stands for: None without ``foreach``."""

    labels: dict[str, str]
    each: Bindings | None


class _Value(NamedTuple):
    label: str
    item: Item
    fields: Mapping[str, Item]


def instances(entry: Entry, scope: Scope, problems: Problems) -> Iterator[InstanceValues]:
    """Yield the instances of an entry in the written order; one with poisoned values where ``foreach`` is unsound."""
    subject = f"{entry.name}.foreach"
    if entry.foreach is None:
        yield InstanceValues({}, None)
        return
    keys = problems.mapping(entry.foreach, subject)
    if keys is None:
        return
    reader = _Reader(scope, problems, subject)
    rules = {key: item for key, item in keys.items() if key in RULES and _is_rules(item)}
    lists = {key: reader.values(item, f"{subject}.{key}") for key, item in keys.items() if key not in rules}
    sound = [values for values in lists.values() if values]
    count = math.prod(map(len, sound))
    if not lists:
        problems.unexpected(entry.foreach, "a mapping of names to lists", subject)
    elif count > NODES_LIMIT:
        problems.add(entry.foreach.place, f"makes {count:,} nodes; expected at most {NODES_LIMIT:,}", subject)
    elif len(sound) < len(lists):
        bound = {key: values[0].item if values else None for key, values in lists.items()}
        yield InstanceValues({key: text_of(item.value) for key, item in bound.items() if item}, bound)
    else:
        chosen = [dict(zip(lists, values, strict=True)) for values in itertools.product(*sound)]
        for values in reader.ruled(chosen, lists, rules):
            yield InstanceValues({key: value.label for key, value in values.items()}, _bindings(values))


def _is_rules(item: Item) -> bool:
    """Say whether a key holds mappings, so that it is not one more list of values."""
    return isinstance(item.value, list) and all(isinstance(part.value, dict) and part.value for part in item.value)


def _bindings(values: Mapping[str, _Value]) -> dict[str, Item]:
    bound = {key: value.item for key, value in values.items()}
    return bound | {f"{key}.{name}": item for key, value in values.items() for name, item in value.fields.items()}


class _Reader:
    def __init__(self, scope: Scope, problems: Problems, subject: str) -> None:
        self._scope, self._problems, self._subject = scope, problems, subject

    def values(self, item: Item, subject: str) -> list[_Value]:
        """Return values that tell nodes apart by name; none, with problems noted, if they cannot."""
        resolved = self._scope.resolve(item)
        if resolved is None:
            return []
        if not isinstance(resolved.value, list) or not resolved.value:
            alone = not isinstance(resolved.value, list | dict) and resolved.value is not None
            example = f", as [{text_of(resolved.value)}]" if alone else ""
            self._problems.unexpected(resolved, f"a list of at least one scalar{example}", subject)
            return []
        seen: dict[str, _Value] = {}
        for part in resolved.value:
            value = self._value(part, subject)
            if value is not None and value.label in seen:
                text = f"'{value.label}' is written twice; expected distinct values"
                self._problems.add(part.place, text, subject)
            elif value is not None:
                seen[value.label] = value
        return list(seen.values()) if len(seen) == len(resolved.value) else []

    def _value(self, item: Item, subject: str) -> _Value | None:
        named, fields = item, {}
        if isinstance(item.value, dict):
            if NAME not in item.value:
                self._problems.add(
                    item.place, f"a record without '{NAME}'; expected what its nodes are called", subject
                )
                return None
            found = {key: self._scope.resolve(part) for key, part in item.value.items()}
            if any(part is None for part in found.values()):
                return None
            fields = {key: part for key, part in found.items() if part is not None}
            named = fields[NAME]
        if isinstance(named.value, list | dict):
            self._problems.unexpected(named, "a scalar, or a record of a name and other values", subject)
            return None
        text, label = text_of(named.value), self._label(named)
        if _VALUE_NAME.fullmatch(label):
            return _Value(label, named, fields)
        expected = "expected letters, digits, '.', '_', '+' and '-'"
        self._problems.add(named.place, f"'{text}' cannot be part of a node's name; {expected}", subject)
        return None

    def _label(self, item: Item) -> str:
        """Return how a value reads in a node's name: a path by its last folder."""
        text = text_of(item.value)
        return path_name(self._problems.reads.absolute(item.base / text)) if os.sep in text else text

    def ruled(
        self, chosen: list[dict[str, _Value]], lists: Mapping[str, list[_Value]], rules: Mapping[str, Item]
    ) -> list[dict[str, _Value]]:
        """Return combinations without those that are excluded, then those that are included."""
        excluding = self._rules(rules, "exclude")
        if len(chosen) * len(excluding) > _EXCLUDED_LIMIT:
            text = f"has {len(excluding):,} rules for {len(chosen):,} combinations, more than can be compared"
            self._problems.add(rules["exclude"].place, text, f"{self._subject}.exclude")
            return []
        for item in excluding:
            wanted = {key: self._label(part) for key, part in self._known(item, lists).items()}
            remaining = [values for values in chosen if any(values[key].label != text for key, text in wanted.items())]
            if len(remaining) == len(chosen):
                self._problems.add(
                    item.place, "excludes nothing; expected values of a combination there is", self._subject
                )
            chosen = remaining
        known = {key: {value.label: value for value in values} for key, values in lists.items()}
        present = {tuple(value.label for value in values.values()) for values in chosen}
        for item in self._rules(rules, "include"):
            given = self._known(item, lists)
            if missing := [key for key in lists if key not in given]:
                self._problems.add(item.place, f"does not say {', '.join(missing)}; expected every key", self._subject)
                continue
            added = {
                key: known[key].get(self._label(given[key])) or self._value(given[key], f"{self._subject}.include")
                for key in lists
            }
            values = {key: value for key, value in added.items() if value is not None}
            labels = tuple(value.label for value in values.values())
            if labels in present:
                self._problems.add(item.place, "is there already; expected another combination", self._subject)
            elif len(values) == len(lists):
                chosen.append(values)
                present.add(labels)
        if not chosen and not self._problems:
            self._problems.add(
                rules["exclude"].place, "excludes every combination; expected some to be left", self._subject
            )
        return chosen

    @staticmethod
    def _rules(rules: Mapping[str, Item], kind: str) -> list[Item]:
        found = rules[kind].value if kind in rules else []
        assert isinstance(found, list), "it was told by that to be a rule"
        return found

    def _known(self, item: Item, lists: Mapping[str, list[_Value]]) -> dict[str, Item]:
        """Return the resolved values of a rule, noting keys that ``foreach`` does not have."""
        assert isinstance(item.value, dict), "it was told by that to be a rule"
        found = {}
        for key, part in item.value.items():
            if key not in lists:
                self._problems.add(part.named_at, f"no key '{key}' in it{nearest(key, lists)}", self._subject)
            elif (resolved := self._scope.resolve(part)) is not None:
                found[key] = resolved
        return found
