"""``pipeline graph``: the DAG as text, Mermaid, Graphviz dot or SVG; implied edges are left out."""

from __future__ import annotations

import argparse
import sys
from collections import deque
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from stagegraph.cli import graphviz
from stagegraph.cli.common import add_file, add_json, print_json, seconds_text, write_text
from stagegraph.cli.drawing import MEANINGS, STATES, Box, draw_graph
from stagegraph.errors import PlanError
from stagegraph.project import Project
from stagegraph.store.journal import FAILED

if TYPE_CHECKING:
    import networkx as nx

    from stagegraph.planning.dag import Dag, Node
    from stagegraph.store.record import Record

EXAMPLE = "pipeline graph -o dag.svg --states --expand compile"
MOST_BOXES = 60  # nodes that a picture shows one by one unless asked; of more it shows entries


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_file(parser)
    kinds = ", ".join(SUFFIXES)
    parser.add_argument("--format", choices=(*FORMATS, "svg"), help="default: ascii, or what FILE is named as")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help=f"write it to FILE, named as {kinds}")
    boxes = parser.add_mutually_exclusive_group()
    boxes.add_argument("--entries", action="store_true", help="one box per entry instead of one per instance")
    boxes.add_argument(
        "--expand",
        action="append",
        default=[],
        metavar="NAME",
        help=f"of this entry a box per instance, of others one; an svg of over {MOST_BOXES} nodes has one of each",
    )
    boxes.add_argument("--instances", action="store_true", help="one box per instance, however many there are")
    parser.add_argument("--states", action="store_true", help="svg: colour nodes by state, and show how long each took")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Run the verb."""
    args.format = args.format or _format_of(args.output)
    with Project(args.file, args.overrides) as project:
        dag = project.dag
        folded = _folded(args, dag)
        boxes = _boxes(project, folded) if args.states else folded_boxes(dag, folded, {})
    if args.json:
        nodes = [{"node": n.name, "stage": n.stage.id, "reads": [u.name for u in n.upstream]} for n in dag.nodes]
        print_json({"pipeline": dag.pipeline.name, "nodes": nodes})
        return 0
    reduced = reduced_graph(dag, folded)
    if args.format == "svg":
        text = draw_graph(reduced, boxes, f"the graph of {dag.pipeline.name}", arrange=graphviz.arrange)
    else:
        text = FORMATS[args.format](reduced)
    if args.output is None:
        print(text)
    else:
        write_text(args.output, f"{text}\n")
    return 0


def _format_of(output: Path | None) -> str:
    """Return the format that the name of a file says."""
    if output is None:
        return "ascii"
    if output.suffix not in SUFFIXES:
        raise PlanError(
            f"{output}: {output.suffix or 'no suffix'} is no format of a graph; known: {', '.join(SUFFIXES)}"
        )
    return SUFFIXES[output.suffix]


def _folded(args: argparse.Namespace, dag: Dag) -> frozenset[str]:
    """Return the entries whose instances are one box; that some are although nobody asked for it is said."""
    expanded = {node.spec.entry for name in args.expand for node in dag.select(name)}
    several = frozenset(
        entry for entry, instances in entries_of(dag).items() if entry not in expanded and len(instances) > 1
    )
    if args.entries or args.expand:
        return several
    if args.format != "svg" or args.instances or args.json or len(dag.nodes) <= MOST_BOXES:
        return frozenset()
    print(
        f"note: {len(dag.nodes)} nodes: drawn is a box for each entry; --expand NAME draws the instances of one, "
        "--instances all",
        file=sys.stderr,
    )
    return several


def _boxes(project: Project, folded: Collection[str]) -> dict[str, Box]:
    """Return the state and the last duration of each node, and the boxes of entries that are ``folded``."""
    from stagegraph.query.forecast import forecast

    steps = forecast(project, project.select(), force=False, jobs=0).steps
    boxes = {s.node.name: box_of(FAILED if s.failed else s.decision.status, s.record) for s in steps}
    return boxes | folded_boxes(project.dag, folded, {name: box.state for name, box in boxes.items()})


def entries_of(dag: Dag) -> dict[str, list[Node]]:
    """Return the instances of each entry."""
    found: dict[str, list[Node]] = {}
    for node in dag.nodes:
        found.setdefault(node.spec.entry, []).append(node)
    return found


def folded_boxes(dag: Dag, folded: Collection[str], states: Mapping[str, str]) -> dict[str, Box]:
    """Return the labels of entries whose instances are one box: how many there are, and the most urgent of the
    ``states`` of nodes, with how many are in it.
    """
    boxes, instances = {}, entries_of(dag)
    for entry in folded:
        nodes = instances[entry]
        worst = max((states[node.name] for node in nodes), key=[*STATES].index) if states else ""
        count = sum(states.get(node.name) == worst for node in nodes)
        status = f", {count if count < len(nodes) else 'all'} {MEANINGS.get(worst, worst.lower())}" if worst else ""
        boxes[entry] = Box(worst, f"{len(nodes)} nodes{status}")
    return boxes


def box_of(state: str, record: Record | None, link: str = "") -> Box:
    """Return the label of a node in a picture: its state, and how long its result took to make."""
    time = f", {seconds_text(record['seconds'])}" if record else ""
    return Box(state, MEANINGS.get(state, state.lower()) + time, link)


def reduced_graph(dag: Dag, folded: Collection[str] = ()) -> nx.DiGraph[str]:
    """Return the graph of nodes, of each ``folded`` entry as one, without the edges that others imply."""
    import networkx as nx

    def box(node: Node) -> str:
        return node.spec.entry if node.spec.entry in folded else node.name

    graph: nx.DiGraph[str] = nx.DiGraph()
    for node in dag.nodes:
        graph.add_node(box(node))
        graph.add_edges_from((box(u), box(node)) for u in node.upstream)
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


SUFFIXES = {".svg": "svg", ".dot": "dot", ".mmd": "mermaid", ".txt": "ascii"}
FORMATS = {"ascii": _ascii, "mermaid": _mermaid, "dot": _dot}
