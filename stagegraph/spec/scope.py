"""Interpolation: what ``${vars.x}``, ``${each.x}``, ``${env.X}`` and ``${secret.X}`` stand for, and ``--set``.

A resolved value keeps the place where it was defined, for that is where a user mends it, and the directory that a
relative path starts from: of a text with references, that of its first part.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from stagegraph.errors import nearest, warn
from stagegraph.spec.cycles import circle, order
from stagegraph.spec.item import Item, Problems, text_of
from stagegraph.spec.reader import core_scalar
from stagegraph.stage import Secret

# Names of variables that are likely to hold what nobody may see.
_LIKELY = re.compile(r"(^|_)(TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS?)(_|$)")
_PART = re.compile(r"\$\$\{|\$\{([^{}\n]*)(\}?)")
VARIABLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
_TEXT_LIMIT = 100_000
_ALL_TEXTS_LIMIT = 20_000_000  # 2,000 characters for each of as many nodes as there may be
_FORMS = "${vars.NAME}, ${each.NAME}, ${env.NAME} or ${secret.NAME}"
_SECRET_LEAST = 4  # characters: what is shorter cannot be told from other text, and so not be masked

Bindings = Mapping[str, Item | None]  # None: its own problem is already noted, so references to it stay silent


class _Reading(NamedTuple):
    """How one text is read: the values of its instance, and the references in it that stay."""

    each: Bindings | None
    unresolved: Collection[str]


class Scope:
    """The variables of a pipeline and the environment: resolves items that refer to them."""

    def __init__(self, env: Mapping[str, str], problems: Problems) -> None:
        self._env, self._problems = env, problems
        self._variables: dict[str, Item | None] = {}
        self._warned: set[str] = set()
        self._written = 0  # characters of all texts that were made of references

    def define(self, variables: Mapping[str, Item]) -> None:
        """Resolve the variables themselves, which may refer to one another, in the order this needs."""
        self._variables = dict.fromkeys(variables)
        uses = {name: [ref for ref in _variables_in(item) if ref in variables] for name, item in variables.items()}
        ordered, cycles = order(uses)
        for cycle in cycles:
            places = ", ".join(f"{name}: {variables[name].place}" for name in cycle)
            text = f"variables refer to each other in a circle: {circle(cycle)} ({places}); expected one with a value"
            self._problems.add(variables[cycle[0]].place, text)
        for name in ordered:
            self._variables[name] = self._variable(name, variables[name])

    @property
    def variables(self) -> dict[str, Item]:
        """The variables that have a value."""
        return {name: item for name, item in self._variables.items() if item is not None}

    def _variable(self, name: str, item: Item) -> Item | None:
        if not VARIABLE_NAME.fullmatch(name):
            text = f"'{name}' cannot name a variable; expected letters, digits, '_' and '-'"
            self._problems.add(item.named_at, text)
            return None
        resolved = self.parameter(item)
        if resolved is None:
            return None
        for part in resolved.value if isinstance(resolved.value, list) else [resolved]:
            if isinstance(part.value, list | dict):
                self._problems.unexpected(part, "a scalar or a list of scalars", f"vars.{name}")
                return None
        return resolved

    def resolve(self, item: Item, each: Bindings | None = None) -> Item | None:
        """Return what :meth:`parameter` does; a secret is a problem, as names, paths and amounts are shown."""
        resolved = self.parameter(item, each)
        for part in resolved.value if resolved and isinstance(resolved.value, list) else [resolved]:
            if part is not None and isinstance(part.value, Secret):
                self._problems.add(part.place, "a secret cannot stand here; expected it under 'with', for a text")
                return None
        return resolved

    def parameter(self, item: Item, each: Bindings | None = None, unresolved: Collection[str] = ()) -> Item | None:
        """Return the item with its references replaced; ``None``, with a problem noted, where that is impossible.

        A text that is one reference and nothing else becomes the typed value; one that holds a secret is one.
        ``each`` holds the instance's values. References in ``unresolved`` stay as they are written; if there are any,
        every other ``${`` of the result is a ``$${``.
        """
        value = item.value
        if isinstance(value, str):
            return self._text(item, value, _Reading(each, unresolved)) if "${" in value else item
        if isinstance(value, list):
            resolved = [self.parameter(part, each, unresolved) for part in value]
            parts = [part for part in resolved if part is not None]
            return item._replace(value=parts) if len(parts) == len(value) else None
        return item

    def _text(self, item: Item, text: str, reading: _Reading) -> Item | None:
        whole = _PART.fullmatch(text)
        if whole and whole[2]:
            return self._look_up(whole[1].strip(), item, reading)
        written: list[str] = []
        base, end, sound, kind = item.base, 0, True, str
        for match in _PART.finditer(text):
            written.append(text[end : match.start()])
            end = match.end()
            part = self._part(match, item, reading)
            if part is None:
                sound = False
                continue
            if match.start() == 0:
                base = part.base
            kind = Secret if isinstance(part.value, Secret) else kind
            written.append(text_of(part.value))
            if sum(map(len, written)) > _TEXT_LIMIT:  # doubled a few dozen times it would fill the memory
                self._problems.add(item.place, f"becomes a text of more than {_TEXT_LIMIT:,} characters")
                return None
        self._written += sum(map(len, written))
        if self._written > _ALL_TEXTS_LIMIT:
            self._problems.add(
                item.place, f"is where the texts of all instances become more than {_ALL_TEXTS_LIMIT:,} characters"
            )
            return None
        return Item(kind("".join(written) + text[end:]), item.place, base) if sound else None

    def _part(self, match: re.Match[str], item: Item, reading: _Reading) -> Item | None:
        """Return what one match within a longer text contributes to it."""
        if match[1] is None:
            return item._replace(value=match[0] if reading.unresolved else "${")
        if not match[2]:
            text = f"'{match[0]}' has no closing brace; expected {_FORMS}, or '$${{' for a literal '${{'"
            self._problems.add(item.place, text)
            return None
        part = self._look_up(match[1].strip(), item, reading)
        if part is not None and isinstance(part.value, list | dict):
            text = f"'{match[0]}' is a list inside a text; expected a scalar there, or the list alone"
            self._problems.add(item.place, text)
            return None
        return part

    def _look_up(self, reference: str, item: Item, reading: _Reading) -> Item | None:
        if reference in reading.unresolved:
            return item._replace(value=f"${{{reference}}}")
        found = self._value(reference, item, reading)
        if found is not None and reading.unresolved and isinstance(found.value, str) and "${" in found.value:
            return found._replace(value=type(found.value)(found.value.replace("${", "$${")))
        return found

    def _value(self, reference: str, item: Item, reading: _Reading) -> Item | None:
        each = reading.each
        kind, _, name = reference.partition(".")
        if kind == "vars" and name in self._variables:
            return self._variables[name]
        if kind == "each" and each is not None and name in each:
            return each[name]
        if kind in {"env", "secret"} and name in self._env:
            found = self._environment(kind, name, item)
            if found is not None:
                return found
            text = f"environment variable '{name}' has less than {_SECRET_LEAST} characters; expected a longer secret"
        elif kind in {"env", "secret"} and name:
            text = f"'${{{kind}.{name}}}': environment variable '{name}' is not set; `export {name}=VALUE` sets it"
        elif kind == "each" and each is None:
            where = "expected it under 'with', 'resources' or 'timeout' of an entry with 'foreach'"
            text = f"'${{{reference}}}' means nothing here; {where}"
        elif kind == "vars" and name:
            text = unknown_variable(name, self._variables)
        elif kind == "each" and each is not None:
            text = f"unknown '${{{reference}}}'{nearest(name, each)}"
        elif reading.unresolved and kind in {"in", "out"}:
            advice = nearest(reference, reading.unresolved)
            if kind == "in" and "did you mean" not in advice:
                advice = "; `inputs: {NAME: ENTRY.OUTPUT}` declares ${in.NAME}"
            text = f"unknown '${{{reference}}}'{advice}"
        else:
            hint = f"; did you mean '${{vars.{reference}}}'?" if reference in self._variables else ""
            text = f"unknown reference '${{{reference}}}'; expected {_FORMS}{hint}"
        self._problems.add(item.place, text)
        return None

    def _environment(self, kind: str, name: str, item: Item) -> Item | None:
        """Return an environment variable: a typed value in clear, or a secret text; None if that is too short."""
        value = self._problems.reads.env[name] = self._env[name]
        if kind == "secret":
            self._problems.reads.lasting = False
            return Item(Secret(value), item.place, Path.cwd()) if len(value) >= _SECRET_LEAST else None
        if name not in self._warned and _LIKELY.search(name.upper()):
            self._warned.add(name)
            self._problems.reads.lasting = False
            advice = f"write ${{secret.{name}}} if nobody may see it"
            warn(f"{item.place}: ${{env.{name}}} is kept and shown in clear; {advice}")
        return Item(core_scalar(value), item.place, Path.cwd())


def unknown_variable(name: str, variables: Mapping[str, object]) -> str:
    """Return what is said of a variable that is not there."""
    return f"unknown variable '{name}'" + (nearest(name, variables) or "; the pipeline defines none")


def _variables_in(item: Item) -> Iterable[str]:
    for part in item.value if isinstance(item.value, list) else [item]:
        if isinstance(part.value, str) and "${" in part.value:
            for match in _PART.finditer(part.value):
                kind, _, name = (match[1] or "").strip().partition(".")
                if kind == "vars":
                    yield name
