"""``pipeline graph``: the DAG as text, Mermaid, Graphviz dot or SVG; implied edges are left out."""

from __future__ import annotations

import argparse
import html
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING

from stagegraph.cli.common import add_file, add_json, print_json
from stagegraph.project import Project

if TYPE_CHECKING:
    import networkx as nx

    from stagegraph.planning.dag import Dag

EXAMPLE = "pipeline graph --entries --format svg > dag.svg"
BOX, GAP, HEIGHT = 30, 60, 44  # pixels of the SVG: height of a box, between columns, from row to row
LETTER = 7.3  # pixels, about, of one in a 12 pixel monospace font


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_file(parser)
    parser.add_argument("--format", choices=tuple(FORMATS), default="ascii", help="default: ascii")
    parser.add_argument("--entries", action="store_true", help="one box per entry instead of one per instance")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Run the verb."""
    with Project(args.file, args.overrides) as project:
        dag = project.dag
    if args.json:
        nodes = [{"node": n.name, "stage": n.stage.id, "reads": [u.name for u in n.upstream]} for n in dag.nodes]
        print_json({"pipeline": dag.pipeline.name, "nodes": nodes})
        return 0
    reduced = _reduced(dag, by_entry=args.entries)
    print(FORMATS[args.format](reduced))
    return 0


def _reduced(dag: Dag, *, by_entry: bool) -> nx.DiGraph[str]:
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
    """Return the direct predecessors, instances of one entry folded together."""
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


def _svg(graph: nx.DiGraph[str]) -> str:
    """Lay the nodes out in columns by depth, each node beside what it follows."""
    import networkx as nx

    columns = [sorted(layer) for layer in nx.topological_generations(graph)]
    at: dict[str, tuple[float, float, float]] = {}  # node -> left, middle, width
    left = 10.0
    for column in columns:
        row = {name: [at[u][1] for u in graph.predecessors(name)] for name in column}
        column.sort(key=lambda name: (sum(row[name]) / len(row[name]) if row[name] else 0.0, name))
        width = max(len(name) for name in column) * LETTER + 20
        for i, name in enumerate(column):
            at[name] = left, 10 + HEIGHT * i + BOX / 2, width
        left += width + GAP
    size = f'width="{left - GAP + 10:.0f}" height="{HEIGHT * max(map(len, columns)) + 10}"'
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="monospace" font-size="12">']
    for a, b in graph.edges:
        x, y, end = at[a][0] + at[a][2], at[a][1], at[b][0]
        bend = f"C {x + GAP / 2:.0f} {y:.0f}, {end - GAP / 2:.0f} {at[b][1]:.0f}, {end:.0f} {at[b][1]:.0f}"
        lines.append(f'<path d="M {x:.0f} {y:.0f} {bend}" fill="none" stroke="#888"/>')
    for name, (x, y, width) in at.items():
        box = f'x="{x:.0f}" y="{y - BOX / 2:.0f}" width="{width:.0f}" height="{BOX}"'
        lines.append(f'<rect {box} rx="5" fill="#eef3fa" stroke="#456"/>')
        lines.append(f'<text x="{x + 10:.0f}" y="{y + 4:.0f}">{html.escape(name)}</text>')
    return "\n".join([*lines, "</svg>"])


FORMATS = {"ascii": _ascii, "mermaid": _mermaid, "dot": _dot, "svg": _svg}
