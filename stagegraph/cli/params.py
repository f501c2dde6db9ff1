"""``pipeline params``: lists every variable and parameter with its value and where that value is set."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from stagegraph.api import Pipeline
from stagegraph.cli.common import add_file, add_json, print_json
from stagegraph.cli.layout import Brief, table
from stagegraph.cli.pager import page
from stagegraph.errors import PipelineError
from stagegraph.files import dotted
from stagegraph.planning.changes import show
from stagegraph.spec.load import load
from stagegraph.spec.params import declared
from stagegraph.stage import Secret

if TYPE_CHECKING:
    from stagegraph.planning.dag import Node

EXAMPLE = "pipeline params --stage compile"
NO_PLACE = "default"


class Row(NamedTuple):
    """A variable or a parameter, as ``--set`` names it."""

    name: str
    value: Any
    origin: str
    meaning: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_file(parser)
    parser.add_argument(
        "--stage", action="append", default=[], metavar="NAME", help="list the parameters of these nodes only"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Run the verb."""
    with Pipeline(args.file, args.overrides) as pipeline:
        variables = load(Path(args.file), args.overrides).variables  # which are not kept with a pipeline
        named = {item.place: name for name, item in variables.items()}
        rows = [Row(name, _plain(item), str(item.place), "a variable") for name, item in variables.items()]
        rows = [] if args.stage else rows
        chosen = [node for pattern in args.stage for node in pipeline.dag.select(pattern)] or pipeline.dag.nodes
        entries: dict[str, list[Node]] = {}
        for node in pipeline.dag.pipeline.nodes:  # as they are written
            if (found := pipeline.dag.by_name[node.name]) in chosen:
                entries.setdefault(node.entry, []).append(found)
        rows += [row for nodes in entries.values() for row in _of_entry(nodes, named)]
    if args.json:
        print_json({"pipeline": pipeline.name, "parameters": [row._asdict() for row in rows]})
    else:
        cells = [(row.name, _text(row.value), row.origin, Brief(row.meaning)) for row in rows]
        page(table(("--set NAME=", "value", "from", "meaning"), cells, flexible=3))
    return 0


def _text(value: Any) -> str:
    """Return a value as it would be written in the file."""
    if isinstance(value, bool):
        return str(value).lower()
    return '""' if value == "" else "null" if value is None else show(value)


def _plain(item: Any) -> Any:
    return [part.value for part in item.value] if isinstance(item.value, list) else _shown(item.value)


def _shown(value: Any) -> Any:
    return "***" if isinstance(value, Secret) else value


def _of_entry(nodes: list[Node], named: dict[Any, str]) -> Iterator[Row]:
    """Yield each parameter of an entry, once if it is the same in all its instances."""
    resolved = {node: _resolved(node) for node in nodes}
    for name, param in declared(nodes[0].stage).items():
        found = {node: (_value(resolved[node], name), _origin(node, name, named)) for node in nodes}
        if key := _each(nodes, name):
            yield Row(
                f"{nodes[0].spec.entry}.{name}", list(dict.fromkeys(v for v, _ in found.values())), key, param.doc
            )
        elif all(each == found[nodes[0]] for each in found.values()):
            yield Row(f"{nodes[0].spec.entry}.{name}", *found[nodes[0]], param.doc)
        else:
            yield from (Row(f"{dotted(node.name)}.{name}", *each, param.doc) for node, each in found.items())


def _each(nodes: list[Node], name: str) -> str:
    """Return which ``foreach`` value of every instance a parameter is; empty if it is none."""
    for key in nodes[0].spec.each:
        if all(str(getattr(node.spec.params, name)) == node.spec.each[key] for node in nodes):
            return f"foreach {key}"
    return ""


def _resolved(node: Node) -> Any:
    """Return the effective parameters, with automatic values resolved where possible."""
    try:
        return node.stage.resolve(node.spec.params)
    except (PipelineError, OSError):
        return node.spec.params  # a run says why


def _value(params: Any, name: str) -> Any:
    value = getattr(params, name)
    return list(map(_shown, value)) if isinstance(value, tuple) else _shown(value)


def _origin(node: Node, name: str, named: dict[Any, str]) -> str:
    """Return where a value was written, and through which variable; of what is decided automatically, as what."""
    place = node.spec.places.get(name)
    written = getattr(node.spec.params, name)
    if place is None:
        fields = {field.name: field.default for field in dataclasses.fields(node.spec.params)}
        automatic = fields[name] if fields[name] == written != getattr(_resolved(node), name) else None
        return NO_PLACE if automatic is None else f"{NO_PLACE}: {_text(automatic)}"
    variable = named.get(place)
    return f"{variable}, {place}" if variable and not str(place).startswith("--set") else str(place)
