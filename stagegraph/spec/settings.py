"""What ``--set`` changes for one command: variables, and parameters of entries or of some of their instances.

``NAME=VALUE`` or ``vars.NAME=VALUE`` is a variable, ``ENTRY.PARAMETER=VALUE`` a parameter of every instance of an
entry, ``ENTRY[debug,*].PARAMETER=VALUE`` or ``ENTRY.debug.PARAMETER=VALUE`` of those that the pattern takes. VALUE is a
YAML scalar or flow list.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from stagegraph.errors import nearest
from stagegraph.spec.item import Item, Problems
from stagegraph.spec.model import Place
from stagegraph.spec.reader import core_scalar, parse
from stagegraph.spec.scope import unknown_variable

EXPECTED = "NAME=VALUE, a variable, or ENTRY.PARAMETER=VALUE"
_TARGET = re.compile(
    r"(?P<entry>[^.\[\]]+)(?:\[(?P<instances>[^\]]*)\]|\.(?P<instance>[^.\[\]]+))?\.(?P<parameter>[^.\[\]]+)"
)


class Setting(NamedTuple):
    """A parameter that ``--set`` gives to instances of an entry; ``instances`` are patterns of ``foreach`` values."""

    entry: str
    instances: tuple[str, ...] | None
    parameter: str
    item: Item

    def takes(self, values: Sequence[str]) -> bool:
        """Say whether it is meant for the instance with these ``foreach`` values."""
        if self.instances is None:
            return True
        pairs = zip(values, self.instances, strict=False)
        return len(values) == len(self.instances) and all(fnmatchcase(value, want) for value, want in pairs)


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
        if not equals or not target or target == "vars.":
            problems.add(Place(f"--set {setting}"), f"has no name and value; expected {EXPECTED}")
            continue
        name = target.removeprefix("vars.") if target.startswith("vars.") or "." not in target else None
        match = _TARGET.fullmatch(target)
        if name is not None and name not in variables:
            problems.add(place, unknown_variable(name, variables) + _parameters_named(name, entries))
        elif name is None and (match is None or match["entry"] not in entries):
            entry = match["entry"] if match is not None else target
            problems.add(place, f"no entry '{entry}'{nearest(entry, entries)}")
        elif (item := _given(text.strip(), place, problems)) is None:
            continue
        elif name is not None:
            merged[name] = item
        elif match is not None:
            patterns = match["instances"] if match["instances"] is not None else match["instance"]
            instances = tuple(part.strip() for part in patterns.split(",")) if patterns is not None else None
            parameters.append(Setting(match["entry"], instances, match["parameter"], item))
    return Settings(merged, tuple(parameters))


def _parameters_named(name: str, entries: Mapping[str, Item]) -> str:
    """Return where a parameter of this name is given, should one have been meant."""
    given = [
        f"{entry}.{name}"
        for entry, item in entries.items()
        if isinstance(item.value, dict)
        and (body := item.value.get("with")) is not None
        and isinstance(body.value, dict)
        and name in body.value
    ]
    return f"; a parameter is set as {' or '.join(given)}" if given else ""


def _given(text: str, place: Place, problems: Problems) -> Item | None:
    """Read a value of the command line: YAML where it is a list or quoted, else as it stands, so that any path is."""
    if text.startswith(("[", "'", '"')):
        return parse(text, lambda _line, _column: place, Path.cwd(), problems)
    return Item(core_scalar(text), place, Path.cwd())
