"""The graph of nodes: which instance feeds which input port, topological order, and selection by name."""

from __future__ import annotations

import graphlib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from stagegraph.errors import PlanError, SpecError, listed, nearest
from stagegraph.files import dotted, typed
from stagegraph.registry import load_object
from stagegraph.spec.model import fits

if TYPE_CHECKING:
    from stagegraph.spec.model import NodeSpec, PipelineSpec
    from stagegraph.stage import In, Stage


@dataclass(eq=False)
class Node:
    """A node with its stage and, per input port, the upstream nodes it reads."""

    spec: NodeSpec
    # Not in the text of a node, as each names all around it: that of one in a small pipeline had a billion characters.
    inputs: dict[str, list[Node]] = field(default_factory=dict, repr=False)
    consumers: list[Node] = field(default_factory=list, repr=False)

    @property
    def name(self) -> str:
        """The entry with the instance in brackets: ``build[x86,debug]``."""
        return self.spec.name

    @property
    def stage(self) -> Stage:
        """The stage it runs."""
        return self.spec.stage

    @cached_property
    def upstream(self) -> list[Node]:
        """The nodes it reads, each once, in port order; asked for when all are connected."""
        return list(dict.fromkeys(node for nodes in self.inputs.values() for node in nodes))


class Dag:
    """All nodes of a pipeline in topological order; among equals, in the order of the file."""

    def __init__(self, pipeline: PipelineSpec) -> None:
        self.pipeline = pipeline
        self.by_name: dict[str, Node] = {}
        by_entry: dict[str, list[Node]] = {}
        for spec in pipeline.nodes:
            node = Node(spec)
            self.by_name[spec.name] = node
            by_entry.setdefault(spec.entry, []).append(node)
        problems = list(dict.fromkeys(p for node in self.by_name.values() for p in _connect(node, by_entry)))
        if problems:
            raise SpecError(*problems)
        order = graphlib.TopologicalSorter({name: [u.name for u in n.upstream] for name, n in self.by_name.items()})
        self.nodes = [self.by_name[name] for name in order.static_order()]
        for node in self.nodes:
            for upstream in node.upstream:
                upstream.consumers.append(node)

    def select(self, pattern: str) -> list[Node]:
        """Return the nodes that a command-line name selects: a bare name all instances; brackets may hold wildcards.

        ``build.x86.debug`` is ``build[x86,debug]``, ``build[*]`` all instances however many values tell them apart.
        """
        chosen = [node for node in self.nodes if _matches(pattern, node.spec)]
        if not chosen:
            raise PlanError(f"no node is named '{pattern}'{self._nearest(pattern)}")
        return chosen

    def _nearest(self, pattern: str) -> str:
        """Advise on an unknown name: the instances of its entry, or the nearest name, or all entries."""
        if os.sep in pattern:
            shown = {dotted(node.name): node.name for node in self.nodes}
            here = next((shown[part] for part in Path(pattern).parts if part in shown), "")
            named = f"; what it shows is named {typed(here)}" if here else ", NODE@RUN or a digest"
            return f"; that is a path, and a result is named by its node{named}"
        entry = re.split(r"[\[.]", pattern)[0]
        name = dotted if "[" not in pattern else str
        instances = {name(node.name) for node in self.nodes if node.spec.entry == entry}
        return nearest(pattern, instances or {node.spec.entry for node in self.nodes})

    def above(self, nodes: Iterable[Node]) -> set[Node]:
        """Return the nodes and everything they need, directly or not."""
        return _reach(nodes, lambda node: node.upstream)

    def below(self, nodes: Iterable[Node]) -> set[Node]:
        """Return the nodes and everything that reads them, directly or not."""
        return _reach(nodes, lambda node: node.consumers)


def _reach(nodes: Iterable[Node], step: Callable[[Node], list[Node]]) -> set[Node]:
    found: set[Node] = set()
    queue = list(nodes)
    while queue:
        node = queue.pop()
        if node not in found:
            found.add(node)
            queue += step(node)
    return found


def _matches(pattern: str, spec: NodeSpec) -> bool:
    if not pattern.startswith(spec.entry):
        return False
    rest = pattern[len(spec.entry) :]
    return not rest or (rest[0] in "[." and fits(rest, list(spec.each.values())))


def _connect(node: Node, by_entry: Mapping[str, list[Node]]) -> Iterable[str]:
    """Fill ``node.inputs`` from its ``needs``; yield what does not fit."""
    spec = node.spec
    for port, declared in node.stage.inputs.items():
        entries = [entry for entry in spec.needs if _reads(declared, entry, by_entry[entry][0])]
        if len(entries) > 1:
            names = ", ".join(entries)
            yield f"{spec.place}: {spec.entry} needs several entries that use '{declared.stage}': {names}; name one"
        elif entries:
            found = [u for u in by_entry[entries[0]] if _pairs(spec.each, u.spec.each)]
            yield from _check_count(node, port, declared, found)
            yield from _check_every(node, port, declared, found)
            node.inputs[port] = found
        elif not declared.optional:
            providers = sorted(name for name, nodes in by_entry.items() if nodes[0].stage.id == declared.stage)
            advice = f"add '{providers[0]}' to its needs" if providers else f"add an entry that uses '{declared.stage}'"
            yield f"{spec.place}: {spec.entry} reads {declared.stage}.{declared.port} on port '{port}': {advice}"
    for entry in spec.needs:
        if not any(_reads(declared, entry, by_entry[entry][0]) for declared in node.stage.inputs.values()):
            place = spec.need_places.get(entry, spec.place)
            known = ", ".join(sorted({declared.stage for declared in node.stage.inputs.values()})) or "nothing"
            yield f"{place}: {spec.entry} needs '{entry}' but stage '{node.stage.id}' reads only: {known}"


def _reads(declared: In, entry: str, node: Node) -> bool:
    return entry == declared.entry if declared.entry else node.stage.id == declared.stage


def _check_count(node: Node, port: str, declared: In, found: list[Node]) -> Iterable[str]:
    if len(found) == 1 and declared.port in found[0].stage.outputs:
        return
    where = f"{node.spec.place}: {node.name}: port '{port}'"
    if found and declared.port not in found[0].stage.outputs:
        hint = nearest(declared.port, found[0].stage.outputs)
        yield f"{where} reads {declared.stage}.{declared.port}, but that stage has no such output{hint}"
    elif not found:
        yield f"{where} finds no instance of '{declared.stage}' with the same foreach values"
    elif len(found) > 1 and not declared.many:
        names = listed(n.name for n in found)
        yield f"{where} reads one instance but {names} match; add their foreach key here"


def _check_every(node: Node, port: str, declared: In, found: list[Node]) -> Iterable[str]:
    """Yield which choices of a parameter of the stage that a port reads no instance has, where it wants each."""
    if not (declared.every and found):
        return
    (choices,) = (f.metadata["choices"] for f in fields(found[0].stage.Params) if f.name == declared.every)
    wanted = load_object(choices) if isinstance(choices, str) else choices
    missing = [name for name in wanted if name not in {getattr(u.spec.params, declared.every) for u in found}]
    if missing:
        entry, names = found[0].spec.entry, ", ".join(missing)
        advice = f"add {names} to its 'foreach'" if found[0].spec.each else f"give {entry} a 'foreach' of all of them"
        yield (
            f"{found[0].spec.place}: {entry} has no instance with {declared.every} {names}, and {node.spec.entry} "
            f"reads all on port '{port}': {advice}"
        )


def _pairs(consumer: Mapping[str, str], producer: Mapping[str, str]) -> bool:
    """Two instances belong together if every ``foreach`` key they share has equal values."""
    return all(consumer[key] == value for key, value in producer.items() if key in consumer)
