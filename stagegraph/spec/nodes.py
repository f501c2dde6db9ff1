"""Entries expanded by their ``foreach`` into nodes: names, typed parameters, resources and timeouts."""

from __future__ import annotations

import math
import re
import sys
from typing import TYPE_CHECKING

from stagegraph.spec import matrix, params
from stagegraph.spec.item import Item, Problems, text_of
from stagegraph.spec.model import NodeSpec, Resources

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from stagegraph.spec.entries import Entry
    from stagegraph.spec.scope import Bindings, Scope

RESOURCE_KEYS = ("memory", "exclusive", "labels")
MEBIBYTES = {"MiB": 1, "GiB": 1 << 10, "TiB": 1 << 20}
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}

_QUANTITY = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([A-Za-z]+)")
_LABEL = re.compile(r"([A-Za-z_][\w.-]*)(?:=([0-9]+(?:\.[0-9]+)?))?")
SHOWN = 10  # instances in a message
_NAME_BYTES_LIMIT = 200  # file systems take 255; the engine adds to it


def expand(entry: Entry, scope: Scope, problems: Problems) -> Iterator[NodeSpec]:
    """Yield the nodes of an entry in the written order of its ``foreach``, as long as no problem is known."""
    declared = params.declared(entry.stage) if entry.stage else {}
    settings = problems.mapping(entry.resources, f"{entry.name}.resources", RESOURCE_KEYS) if entry.resources else {}
    unused, instances = list(entry.settings), []
    for texts, each in matrix.instances(entry, scope, problems):
        given = {}
        values = {}
        instances.append(".".join(texts.values()))
        set_here = [setting for setting in entry.settings if setting.takes(list(texts.values()))]
        unused = [setting for setting in unused if setting not in set_here]
        for name, item in {**entry.given, **{setting.parameter: setting.item for setting in set_here}}.items():
            unresolved = declared[name].references if name in declared else ()
            resolved = scope.parameter(item, each, unresolved)
            if resolved is not None and name in declared:
                given[name] = resolved.place
                values[name] = params.read(declared[name], resolved, problems, f"{entry.name}.{name}")
        resources = _resources(entry, settings or {}, scope, each, problems)
        timeout = _timeout(entry, scope, each, problems)
        name = f"{entry.name}[{','.join(texts.values())}]" if texts else entry.name
        if len(name.encode()) > _NAME_BYTES_LIMIT:
            problems.add(entry.place, f"'{name}' is too long a name; expected at most {_NAME_BYTES_LIMIT} bytes")
        if entry.stage and entry.origin and not problems:
            yield NodeSpec(
                name=name,
                entry=entry.name,
                stage=entry.stage,
                origin=entry.origin,
                each=texts,
                params=entry.stage.Params(**values),
                places=given,
                place=entry.place,
                needs=tuple(entry.needs),
                need_places=entry.needs,
                resources=resources,
                timeout=timeout,
            )
    for setting in unused:
        known = f"; it has {', '.join(instances[:SHOWN])}" if any(instances) else ": it has no 'foreach'"
        problems.add(setting.item.place, f"'{entry.name}' has no such instance{known}")


def _resources(
    entry: Entry, settings: Mapping[str, Item], scope: Scope, each: Bindings | None, problems: Problems
) -> Resources:
    items = {key: resolved for key, item in settings.items() if (resolved := scope.resolve(item, each)) is not None}
    subject, mebibytes, exclusive = f"{entry.name}.resources", 0.0, False
    if "memory" in items:
        expected = "a size such as '2 GiB', or a number of MiB"
        mebibytes = _quantity(items["memory"], MEBIBYTES, expected, problems, f"{subject}.memory")
    if "exclusive" in items:
        exclusive = items["exclusive"].value is True
        if not isinstance(items["exclusive"].value, bool):
            problems.unexpected(items["exclusive"], "true or false", f"{subject}.exclusive")
    labels = _labels(items["labels"], problems, f"{subject}.labels") if "labels" in items else {}
    return Resources(math.ceil(mebibytes), exclusive, labels)


def _labels(item: Item, problems: Problems, subject: str) -> dict[str, float]:
    """Return what a worker must offer: ``[NAME, NAME=AMOUNT]`` as name -> amount."""
    if not isinstance(item.value, list):
        problems.unexpected(item, "a list such as [fast, NAME=2]", subject)
        return {}
    found = {}
    for label in item.value:
        match = _LABEL.fullmatch(text_of(label.value)) if not isinstance(label.value, list | dict) else None
        if match:
            found[match[1]] = float(match[2] or 0)
        else:
            problems.unexpected(label, "a name, or NAME=AMOUNT", subject)
    return found


def _timeout(entry: Entry, scope: Scope, each: Bindings | None, problems: Problems) -> float | None:
    item = scope.resolve(entry.timeout, each) if entry.timeout else None
    if item is None:
        return None
    return _quantity(item, SECONDS, "a time such as '10m', or a number of seconds", problems, f"{entry.name}.timeout")


def _quantity(item: Item, units: Mapping[str, int], expected: str, problems: Problems, subject: str) -> float:
    """Return a positive number in the unit that stands for one, noting a value that is not one."""
    value = item.value
    match = _QUANTITY.fullmatch(value) if isinstance(value, str) else None
    quantity = 0.0
    if match and match[2] in units:
        quantity = float(match[1]) * units[match[2]]
    elif isinstance(value, int | float) and not isinstance(value, bool) and value < sys.float_info.max:
        quantity = float(value)
    if not 0 < quantity < math.inf:
        problems.unexpected(item, expected, subject)
        return 0.0
    return quantity
