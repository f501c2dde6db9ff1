"""``pipeline graph``: the DAG as text, Mermaid, Graphviz dot or SVG; implied edges are left out."""

from __future__ import annotations

import argparse
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING

from stagegraph.cli.common import add_file, add_json, print_json, seconds_text
from stagegraph.cli.drawing import MEANINGS, STATES, Box, draw_graph
from stagegraph.project import Project
from stagegraph.store.journal import FAILED

if TYPE_CHECKING:
    import networkx as nx

    from stagegraph.planning.dag import Dag
    from stagegraph.store.record import Record

EXAMPLE = "pipeline graph --entries --format svg > dag.svg"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_file(parser)
    parser.add_argument("--format", choices=(*FORMATS, "svg"), default="ascii", help="default: ascii")
    parser.add_argument("--entries", action="store_true", help="one box per entry instead of one per instance")
    parser.add_argument("--states", action="store_true", help="svg: colour nodes by state, and show how long each took")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Run the verb."""
    with Project(args.file, args.overrides) as project:
        dag, boxes = project.dag, _boxes(project) if args.states else {}
    if args.json:
        nodes = [{"node": n.name, "stage": n.stage.id, "reads": [u.name for u in n.upstream]} for n in dag.nodes]
        print_json({"pipeline": dag.pipeline.name, "nodes": nodes})
        return 0
    reduced = reduced_graph(dag, by_entry=args.entries)
    if args.format == "svg":
        print(draw_graph(reduced, boxes, f"the graph of {dag.pipeline.name}"))
    else:
        print(FORMATS[args.format](reduced))
    return 0


def _boxes(project: Project) -> dict[str, Box]:
    """Return the state and the last duration of each node; an entry has the most urgent state of its instances."""
    from stagegraph.query.forecast import forecast

    steps = forecast(project, project.select(), force=False, jobs=0).steps
    boxes = {s.node.name: box_of(FAILED if s.failed else s.decision.status, s.record) for s in steps}
    for entry in dict.fromkeys(step.node.spec.entry for step in steps):
        worst = max((boxes[s.node.name].state for s in steps if s.node.spec.entry == entry), key=[*STATES].index)
        boxes.setdefault(entry, Box(worst))
    return boxes


def box_of(state: str, record: Record | None, link: str = "") -> Box:
    """Return the label of a node in a picture: its state, and how long its result took to make."""
    time = f", {seconds_text(record['seconds'])}" if record else ""
    return Box(state, MEANINGS.get(state, state.lower()) + time, link)


def reduced_graph(dag: Dag, *, by_entry: bool) -> nx.DiGraph[str]:
    """Return the graph of nodes, or of entries, without the edges that others imply."""
    import networkx as nx

    graph: nx.DiGraph[str] = nx.DiGraph()
    for node in dag.nodes:
        name = node.spec.entry if by_entry else node.name
        graph.add_node(name)
        graph.add_edges_from((u.spec.entry if by_entry else u.name, name) for u in node.upstream)
    depths = {name: depth for depth, layer in enumerate(nx.topological_generations(graph)) for name in layer}
    graph.remove_edges_from([(u, name) for name in graph for u in _implied(graph, depths, name)])
    return graph


def _implied(graph: nx.DiGraph[str], depths: Mapping[str, int], name: str) -> set[str]:
    """Return the nodes that ``name`` follows, and that another node which it follows comes after.

    Only what is as deep as the shallowest of them is looked at: networkx's own reduction takes the square of a chain.
    """
    follows = graph.pred[name]
    deepest = max(map(depths.__getitem__, follows), default=0)
    sought = {u for u in follows if depths[u] < deepest}
    floor = min(map(depths.__getitem__, sought), default=0)
    found: set[str] = set()
    queue, seen = deque(follows), set(follows)
    while queue and sought - found:
        for before in graph.pred[queue.popleft()]:
            if before in sought:
                found.add(before)
            if before not in seen and depths[before] > floor:
                seen.add(before)
                queue.append(before)
    return found


def _ascii(graph: nx.DiGraph[str]) -> str:
    """List the nodes by depth, each with the nodes it directly follows."""
    import networkx as nx

    width = max(len(name) for name in graph)
    lines = []
    for depth, layer in enumerate(nx.topological_generations(graph)):
        lines += ([""] if depth else []) + [
            f"{name:<{width}}  <- {_list(graph, name)}" if depth else name for name in sorted(layer)
        ]
    return "\n".join(lines)


def _list(graph: nx.DiGraph[str], name: str) -> str:
    """Return the direct predecessors; several instances of one entry are written as one."""
    folded: dict[str, list[str]] = {}
    for u in sorted(graph.predecessors(name)):
        entry, bracket, instance = u.partition("[")
        folded.setdefault(entry, []).append(bracket + instance)
    return ", ".join(entry + (found[0] if len(found) == 1 else f" x{len(found)}") for entry, found in folded.items())


def _mermaid(graph: nx.DiGraph[str]) -> str:
    ids = {name: f"n{i}" for i, name in enumerate(graph)}
    boxes = [f'  {ids[name]}["{name}"]' for name in graph]
    return "\n".join(["flowchart LR", *boxes, *(f"  {ids[a]} --> {ids[b]}" for a, b in graph.edges)])


def _dot(graph: nx.DiGraph[str]) -> str:
    boxes = [f'  "{name}";' for name in graph]
    return "\n".join(
        [
            "digraph pipeline {",
            "  rankdir=LR; node [shape=box];",
            *boxes,
            *(f'  "{a}" -> "{b}";' for a, b in graph.edges),
            "}",
        ]
    )


FORMATS = {"ascii": _ascii, "mermaid": _mermaid, "dot": _dot}
