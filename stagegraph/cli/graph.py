"""``pipeline graph``: the DAG as text, Mermaid or Graphviz dot; implied edges are left out."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from stagegraph.cli.common import add_file
from stagegraph.dag import Dag
from stagegraph.spec import load

if TYPE_CHECKING:
    import networkx as nx


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_file(parser)
    parser.add_argument("--format", choices=("ascii", "mermaid", "dot"), default="ascii", help="default: ascii")
    parser.add_argument("--entries", action="store_true", help="one box per entry instead of one per instance")


def run(args: argparse.Namespace) -> int:
    """Run the verb."""
    reduced = _reduced(Dag(load(Path(args.file), args.overrides)), by_entry=args.entries)
    print({"ascii": _ascii, "mermaid": _mermaid, "dot": _dot}[args.format](reduced))
    return 0


def _reduced(dag: Dag, *, by_entry: bool) -> nx.DiGraph[str]:
    import networkx as nx

    graph: nx.DiGraph[str] = nx.DiGraph()
    for node in dag.nodes:
        name = node.spec.entry if by_entry else node.name
        graph.add_node(name)
        graph.add_edges_from((u.spec.entry if by_entry else u.name, name) for u in node.upstream)
    reduced: nx.DiGraph[str] = nx.transitive_reduction(graph)
    return reduced


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
