"""Entries with ``uses: shell``: their ``with`` says what the stage is, so the stage is made from it.

What is declared becomes a :class:`~stagegraph.shell.Declaration`; its values become parameters like any stage's, which
are then interpolated, checked and hashed as such: ``cmd``, ``in_NAME`` for a source, ``env_NAME`` for a variable.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, NamedTuple

from stagegraph.errors import nearest
from stagegraph.shell import Declaration, tool_field

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stagegraph.spec.item import Item, Problems
    from stagegraph.spec.model import Place
    from stagegraph.spec.scope import Scope

KEYS = ("cmd", "inputs", "sources", "outputs", "env", "tools")
NAME = re.compile(r"[a-z][a-z0-9_]*")
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
PATH = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*")
INPUT = re.compile(r"([a-z0-9-]+)\.(\w[\w-]*)")


class ShellEntry(NamedTuple):
    """What an entry declares, its values as parameters, and the entries it reads."""

    declared: Declaration
    given: dict[str, Item]
    needs: dict[str, Place]


def read_shell(
    name: str, item: Item | None, stages: Mapping[str, Item], scope: Scope, problems: Problems
) -> ShellEntry:
    """Return the shell entry ``name`` whose ``with`` is ``item``; what is wrong with it is noted."""
    reader = _Reader(name, stages, scope, problems)
    body = (problems.mapping(item, f"{name}.with", KEYS) if item is not None else None) or {}
    outputs = {key: reader.output(key, value) for key, value in reader.named(body, "outputs", NAME).items()}
    reader.check_apart(outputs, body)
    inputs = {key: reader.input(key, value) for key, value in reader.named(body, "inputs", NAME).items()}
    sources = reader.named(body, "sources", NAME)
    for key in sources.keys() & inputs.keys():
        problems.add(
            sources[key].named_at, f"'{key}' is an input too; expected another name, as ${{in.{key}}} is one of them"
        )
    env = reader.named(body, "env", VARIABLE)
    given = {f"in_{key}": value for key, value in sources.items()} | {f"env_{key}": v for key, v in env.items()}
    if "cmd" in body:
        given["cmd"] = body["cmd"]
    script = "cmd" in body and not isinstance(body["cmd"].value, list)
    return ShellEntry(
        Declaration(script, inputs, sorted(sources), outputs, sorted(env), reader.tools(body.get("tools"))),
        given,
        reader.needs,
    )


class _Reader:
    def __init__(self, name: str, stages: Mapping[str, Item], scope: Scope, problems: Problems) -> None:
        self._name, self._stages, self._scope, self._problems = name, stages, scope, problems
        self.needs: dict[str, Place] = {}

    def named(self, body: Mapping[str, Item], key: str, allowed: re.Pattern[str]) -> dict[str, Item]:
        """Return the mapping under one key, without what has no proper name."""
        values = (self._problems.mapping(body[key], f"{self._name}.{key}") if key in body else None) or {}
        for name, item in values.items():
            if not allowed.fullmatch(name):
                letters = "lower-case letters" if allowed is NAME else "letters"
                text = f"'{name}' cannot be a name here; expected {letters}, digits and '_', starting with a letter"
                self._problems.add(item.named_at, text, f"{self._name}.{key}")
        return {name: item for name, item in values.items() if allowed.fullmatch(name)}

    def _text(self, item: Item, expected: str, subject: str) -> str:
        resolved = self._scope.resolve(item)
        if resolved is None:
            return ""
        if not isinstance(resolved.value, str):
            self._problems.unexpected(resolved, expected, subject)
            return ""
        return resolved.value

    def output(self, key: str, item: Item) -> str:
        """Return the path of an output, which is one below the folder of the command."""
        subject = f"{self._name}.outputs.{key}"
        path = self._text(item, "a path", subject)
        if path and not PATH.fullmatch(path):
            expected = "a path below the command's folder, of letters, digits, '_', '.', '-' and '/'"
            self._problems.unexpected(item._replace(value=path), expected, subject)
        return path

    def check_apart(self, outputs: Mapping[str, str], body: Mapping[str, Item]) -> None:
        """Note that there is no output, or one inside another."""
        place = body["outputs"].named_at if "outputs" in body else self._stages[self._name].named_at
        if not outputs:
            self._problems.add(place, "declares no output; expected a name and a path", f"{self._name}.outputs")
        paths = {name: PurePosixPath(path) for name, path in outputs.items() if path}
        for one, path in paths.items():
            for other, above in paths.items():
                if one != other and path.is_relative_to(above) and (path != above or one > other):
                    self._problems.add(place, f"'{one}' ({path}) lies in '{other}' ({above}); expected them apart")

    def input(self, key: str, item: Item) -> list[str]:
        """Return the entry and the port that an input reads."""
        subject = f"{self._name}.inputs.{key}"
        text = self._text(item, "ENTRY.OUTPUT", subject)
        match = INPUT.fullmatch(text)
        if match is None:
            if text:
                self._problems.unexpected(item._replace(value=text), "ENTRY.OUTPUT, as in compile.library", subject)
            return ["", ""]
        entry, port = match.groups()
        if entry == self._name:
            self._problems.add(item.place, f"'{entry}' reads itself; expected another entry", subject)
        elif entry not in self._stages:
            self._problems.add(item.place, f"unknown entry '{entry}'{nearest(entry, self._stages)}", subject)
        else:
            self.needs.setdefault(entry, item.place)
        return [entry, port]

    def tools(self, item: Item | None) -> list[str]:
        """Return the programs whose content counts."""
        resolved = self._scope.resolve(item) if item is not None else None
        if resolved is None:
            return []
        subject = f"{self._name}.tools"
        if not isinstance(resolved.value, list):
            self._problems.unexpected(resolved, "a list of programs", subject)
            return []
        tools: dict[str, str] = {}
        for part in resolved.value:
            if not isinstance(part.value, str) or not part.value or "\0" in part.value:
                self._problems.unexpected(part, "the name of a program", subject)
            elif tools.setdefault(tool_field(part.value), part.value) != part.value:
                self._problems.add(
                    part.place, f"'{part.value}' and '{tools[tool_field(part.value)]}' differ in signs only"
                )
        return sorted(tools.values())
