"""Merges projections of one input into one matrix: q, k and v, or gate and up, whatever their names."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from stages.tracing.graph import GraphPart

if TYPE_CHECKING:
    from stages.documents.files import JsonObject
    from stages.tracing.nodes import Arguments, Node


def merged(
    part: GraphPart, shapes: Mapping[str, tuple[int, ...]], apart: set[str], older: Mapping[str, JsonObject]
) -> tuple[GraphPart, dict[str, list[str]]]:
    """Return the graph with such linear layers merged, and what is merged: name of the new parameter -> names.

    ``shapes`` are those of parameters; those ``apart`` stay as they are, as do any that are also read without the
    others. Those that are one tensor of an ``older`` checkpoint lie in its order.
    """
    groups = _groups(part, apart)
    for numbers in groups:
        numbers.sort(key=lambda number: older.get(part.nodes[number][1]["weight"]["parameter"], {}).get("rows", []))
    first = {min(numbers): numbers for numbers in groups}
    places = {number: (leader, at) for leader, numbers in first.items() for at, number in enumerate(numbers)}
    made: dict[str, list[str]] = {}
    values: dict[int, int] = {number: number for number in range(part.inputs)}
    splits: dict[int, int] = {}
    nodes: list[Node] = []

    def add(name: str, arguments: Arguments) -> int:
        nodes.append((name, arguments))
        return part.inputs + len(nodes) - 1

    for number, (name, arguments) in enumerate(part.nodes):
        if number in first:
            members = [part.nodes[each][1] for each in first[number]]
            together: dict[str, Any] = {"x": renumbered(arguments["x"], values)}
            for leaf in ("weight", "bias"):
                if leaf in arguments:
                    names = [each[leaf]["parameter"] for each in members]
                    made[joined(names)] = names
                    together[leaf] = {"parameter": joined(names)}
            sizes = [shapes[each["weight"]["parameter"]][0] for each in members]
            product = add("linear", together)
            splits[number] = add("split", {"x": {"value": product}, "sizes": sizes, "dim": -1})
        if number in places:
            leader, at = places[number]
            values[part.inputs + number] = add("item", {"x": {"value": splits[leader]}, "index": at})
        else:
            values[part.inputs + number] = add(name, renumbered(arguments, values))
    return replace(part, nodes=nodes, output=values[part.output]), made


def _groups(part: GraphPart, apart: set[str]) -> list[list[int]]:
    """Return the numbers of the linear layers that read one input, several each."""
    uses = Counter(name for _, arguments in part.nodes for name in read(list(arguments.values()), "parameter"))
    readers: dict[tuple[int, bool], list[int]] = defaultdict(list)
    names: dict[int, list[str]] = {}
    for number, (name, arguments) in enumerate(part.nodes):
        if name == "linear" and "value" in arguments["x"]:
            leaves = [arguments[leaf] for leaf in ("weight", "bias") if leaf in arguments]
            names[number] = read(leaves, "parameter")
            computed = len(names[number]) < len(leaves)  # of parameters, or of what was read
            if not computed and not apart.intersection(names[number]):
                readers[arguments["x"]["value"], "bias" in arguments].append(number)
    together = Counter(tuple(names[number][0] for number in numbers) for numbers in readers.values())
    found = []
    for numbers in readers.values():
        times = together[tuple(names[number][0] for number in numbers)]  # layers may be run several times
        alone = [number for number in numbers if all(uses[each] == 1 for each in names[number])]
        whole = all(uses[each] == times for number in numbers for each in names[number])
        found.append(numbers if whole else alone)
    return [numbers for numbers in found if len(numbers) > 1]


def projected(part: GraphPart) -> GraphPart:
    """Return the graph with each weight [n, k] times a value [1, k, tokens] as the linear layer that it is."""
    nodes: list[Node] = []
    values: dict[int, int] = {number: number for number in range(part.inputs)}

    def add(name: str, arguments: Arguments) -> Any:
        nodes.append((name, arguments))
        return {"value": part.inputs + len(nodes) - 1}

    for number, (name, arguments) in enumerate(part.nodes, start=part.inputs):
        given = renumbered(arguments, values)
        if name == "matmul" and "parameter" in given["x"] and "value" in given.get("other", {}):
            rows = add("transpose", {"x": given["other"], "dim0": 1, "dim1": 2})
            product = add("linear", {"x": rows, "weight": given["x"]})
            made = add("transpose", {"x": product, "dim0": 1, "dim1": 2})
        else:
            made = add(name, given)
        values[number] = made["value"]
    return replace(part, nodes=nodes, output=values[part.output])


def joined(names: Sequence[str]) -> str:
    """Return the name of several parameters in one: ``a.q.weight`` and ``a.k.weight`` are ``a.q+k.weight``."""
    parts = [name.split(".") for name in names]
    before = _alike(parts)
    after = _alike([part[before:][::-1] for part in parts])
    middle = "+".join(".".join(part[before : len(part) - after]) for part in parts)
    return ".".join([*parts[0][:before], middle, *parts[0][len(parts[0]) - after :]])


def _alike(parts: Sequence[Sequence[str]]) -> int:
    """Return how many words all begin with."""
    return next((at for at, words in enumerate(zip(*parts, strict=False)) if len(set(words)) > 1), min(map(len, parts)))


def renumbered(value: Any, values: Mapping[int, int]) -> Any:
    """Return arguments with the values that they name under other numbers."""
    if isinstance(value, list):
        return [renumbered(each, values) for each in value]
    if isinstance(value, Mapping):
        if value.keys() == {"value"} and isinstance(value["value"], int):
            return {"value": values[value["value"]]}
        return {key: renumbered(each, values) for key, each in value.items()}
    return value


def read(value: Any, kind: str) -> list[Any]:
    """Return what of a ``kind`` (value, parameter) arguments name."""
    if isinstance(value, list):
        return [found for each in value for found in read(each, kind)]
    return [value[kind]] if isinstance(value, Mapping) and kind in value else []
