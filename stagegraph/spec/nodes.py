"""Entries expanded by their ``foreach`` into nodes: names, typed parameters, resources and timeouts."""

from __future__ import annotations

import itertools
import math
import re
import sys
from typing import TYPE_CHECKING

from stagegraph.spec import params
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
_VALUE_NAME = re.compile(r"[\w.+-]+")  # becomes part of a directory's name and of patterns on the command line
_LABEL = re.compile(r"([A-Za-z_][\w.-]*)(?:=([0-9]+(?:\.[0-9]+)?))?")
SHOWN = 10  # instances in a message
_INSTANCES_LIMIT = 10_000
_NAME_BYTES_LIMIT = 200  # file systems take 255; the engine adds to it


def expand(entry: Entry, scope: Scope, problems: Problems) -> Iterator[NodeSpec]:
    """Yield the nodes of an entry in the written order of its ``foreach``, as long as no problem is known."""
    declared = params.declared(entry.stage) if entry.stage else {}
    settings = problems.mapping(entry.resources, f"{entry.name}.resources", RESOURCE_KEYS) if entry.resources else {}
    unused, instances = list(entry.settings), []
    for each in _instances(entry, scope, problems):
        given = {}
        values = {}
        texts = {key: text_of(item.value) for key, item in each.items() if item} if each else {}
        instances.append(".".join(texts.values()))
        set_here = [setting for setting in entry.settings if setting.takes(list(texts.values()))]
        unused = [setting for setting in unused if setting not in set_here]
        for name, item in {**entry.given, **{setting.parameter: setting.item for setting in set_here}}.items():
            kept = declared[name].references if name in declared else ()
            resolved = scope.parameter(item, each, kept)
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


def _instances(entry: Entry, scope: Scope, problems: Problems) -> Iterator[Bindings | None]:
    """Yield the ``each`` values of every instance: ``None`` without ``foreach``, poisoned ones where it is unsound."""
    subject = f"{entry.name}.foreach"
    if entry.foreach is None:
        yield None
        return
    keys = problems.mapping(entry.foreach, subject)
    if not keys:
        if keys is not None:
            problems.unexpected(entry.foreach, "a mapping of names to lists", subject)
        return
    lists = {key: _values(item, scope, problems, f"{subject}.{key}") for key, item in keys.items()}
    sound = [values for values in lists.values() if values]
    count = math.prod(map(len, sound))
    if count > _INSTANCES_LIMIT:
        problems.add(entry.foreach.place, f"makes {count:,} nodes; expected at most {_INSTANCES_LIMIT:,}", subject)
    elif len(sound) < len(lists):
        yield {key: values[0] if values else None for key, values in lists.items()}
    else:
        for values in itertools.product(*sound):
            yield dict(zip(lists, values, strict=True))


def _values(item: Item, scope: Scope, problems: Problems, subject: str) -> list[Item]:
    """Return values that tell nodes apart by name; none, with problems noted, if they cannot."""
    resolved = scope.resolve(item)
    if resolved is None:
        return []
    if not isinstance(resolved.value, list) or not resolved.value:
        problems.unexpected(resolved, "a list of at least one scalar", subject)
        return []
    seen: set[str] = set()
    for value in resolved.value:
        text = text_of(value.value)
        if isinstance(value.value, list | dict):
            problems.unexpected(value, "a scalar", subject)
        elif not _VALUE_NAME.fullmatch(text):
            expected = "expected letters, digits, '.', '_', '+' and '-'"
            problems.add(value.place, f"'{text}' cannot be part of a node's name; {expected}", subject)
        elif text in seen:
            problems.add(value.place, f"'{text}' is written twice; expected distinct values", subject)
        else:
            seen.add(text)
    return resolved.value if len(seen) == len(resolved.value) else []


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
