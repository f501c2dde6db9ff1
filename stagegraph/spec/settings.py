"""What ``--set`` changes for one command: variables, and parameters of entries or of some of their instances.

``NAME=VALUE`` or ``vars.NAME=VALUE`` is a variable, ``ENTRY.PARAMETER=VALUE`` a parameter of every instance of an
entry, ``ENTRY[debug,*].PARAMETER=VALUE`` or ``ENTRY.debug.PARAMETER=VALUE`` of those that the pattern takes. VALUE is a
YAML scalar or flow list.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from stagegraph.errors import nearest, similar
from stagegraph.registry import get_stage
from stagegraph.spec.item import Item, Problems
from stagegraph.spec.model import Place, fits
from stagegraph.spec.params import declared
from stagegraph.spec.reader import core_scalar, parse
from stagegraph.spec.scope import unknown_variable

SHOWN = 3  # places of a parameter
LONGEST_NAME = 500  # characters of what a setting changes: longer ones are pasted by mistake, and fill the terminal
EXPECTED = "NAME=VALUE, a variable, or ENTRY.PARAMETER=VALUE"
_TARGET = re.compile(r"(?P<entry>[^.\[\]]+)(?P<instances>\[[^\]]*\]|\.[^\[\]]+)?\.(?P<parameter>[^.\[\]]+)")


class Setting(NamedTuple):
    """A parameter that ``--set`` gives to instances of an entry: to those that the pattern ``instances`` fits."""

    entry: str
    instances: str | None
    parameter: str
    item: Item

    def takes(self, values: Sequence[str]) -> bool:
        """Say whether it is meant for the instance with these ``foreach`` values."""
        return self.instances is None or fits(self.instances, values)


class Settings(NamedTuple):
    """Variables as ``--set`` leaves them, and the parameters that it gives."""

    variables: dict[str, Item]
    parameters: tuple[Setting, ...]


def read_settings(
    settings: Sequence[str], variables: Mapping[str, Item], entries: Mapping[str, Item], problems: Problems
) -> Settings:
    """Return what ``settings`` change; what names nothing is noted, with what it may have meant."""
    merged, parameters = dict(variables), []
    for setting in settings:
        target, equals, text = setting.partition("=")
        place = Place(f"--set {target}")
        if len(target) > LONGEST_NAME:
            problems.add(Place("--set"), f"{target[:40]!r}... is too long for a name; expected {EXPECTED}")
            continue
        if not equals or not target or target == "vars.":
            problems.add(Place(f"--set {setting}"), f"has no name and value; expected {EXPECTED}")
            continue
        if target != target.strip():
            problems.add(Place(f"--set '{setting}'"), "has a space before its '='; expected NAME=VALUE without one")
            continue
        name = target.removeprefix("vars.") if target.startswith("vars.") or "." not in target else None
        match = _TARGET.fullmatch(target)
        if name is not None and name not in variables:
            problems.add(place, _unknown(name, variables, entries))
        elif name is None and (match is None or match["entry"] not in entries):
            entry = match["entry"] if match is not None else target
            problems.add(place, f"no entry '{entry}'{nearest(entry, entries)}")
        elif (item := _given(text.strip(), place, problems)) is None:
            continue
        elif name is not None:
            merged[name] = item
        elif match is not None:
            parameters.append(Setting(match["entry"], match["instances"], match["parameter"], item))
    return Settings(merged, tuple(parameters))


def _unknown(name: str, variables: Mapping[str, Item], entries: Mapping[str, Item]) -> str:
    """Say that a variable is not there, with the variable or the parameter that may have been meant."""
    where: dict[str, list[str]] = {}
    for entry, item in entries.items():
        for parameter in parameters(entry, item):
            where.setdefault(parameter, []).append(f"{entry}.{parameter}")
    if name in where:
        return f"{unknown_variable(name, variables)}; a parameter is set as {_listed(where[name])}"
    close = similar(name, [*variables, *where])
    if close and close not in variables:
        return f"unknown variable '{name}'; did you mean {_listed(where[close])}?"
    return unknown_variable(name, variables) + ("" if close else "; `pipeline params` lists parameters")


def _listed(names: Sequence[str]) -> str:
    more = f" or {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return " or ".join(names[:SHOWN]) + more


def parameters(entry: str, item: Item) -> Iterable[str]:
    """Return the parameters of an entry's stage, as far as that is known by its name, and those that it is given."""
    body = item.value if isinstance(item.value, dict) else {}
    given, uses = body.get("with"), body.get("uses")
    found = dict.fromkeys(given.value if given and isinstance(given.value, dict) else ())
    with contextlib.suppress(Exception):  # whatever a module that does not load raises is said where it is used
        found |= dict.fromkeys(declared(get_stage(str(uses.value) if uses else entry)))
    return found


def _given(text: str, place: Place, problems: Problems) -> Item | None:
    """Read a value of the command line: YAML where it is a list or quoted, else as it stands, so that any path is."""
    if text.startswith(("[", "'", '"')):
        return parse(text, lambda _line, _column: place, Path.cwd(), problems)
    return Item(core_scalar(text), place, Path.cwd())
