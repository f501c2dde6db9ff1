"""Lays graphs out with Graphviz's ``dot``, where that is installed."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Mapping
from typing import TYPE_CHECKING

from stagegraph.cli.drawing import WIDEST, Arrangement

if TYPE_CHECKING:
    import networkx as nx

INCH = 72.0  # pixels: dot counts in inches
MARGIN = 10.0


def arrange(graph: nx.DiGraph[str], widths: Mapping[str, float], height: float) -> Arrangement | None:
    """Return where ``dot`` puts boxes of these sizes and the edges between them; None without it, or if it fails.

    Arrows go from left to right, or downwards where that would be wider than is looked at.
    """
    program = shutil.which("dot")
    if program is None:
        return None
    for direction in ("LR", "TB"):
        question = "\n".join(_question(graph, widths, height, direction))
        done = subprocess.run([program, "-Tplain"], input=question, capture_output=True, text=True, check=False)
        if done.returncode:
            return None
        found = _read(done.stdout, list(graph))
        if found.size[0] <= WIDEST:
            break
    return found


def _question(graph: nx.DiGraph[str], widths: Mapping[str, float], height: float, direction: str) -> list[str]:
    """Return the graph in dot's language, its nodes by number."""
    numbers = {name: i for i, name in enumerate(graph)}
    boxes = [f"{i} [width={widths[name] / INCH:.3f}];" for name, i in numbers.items()]
    edges = [f"{numbers[a]} -> {numbers[b]};" for a, b in graph.edges]
    common = f'node [shape=box, fixedsize=true, label="", height={height / INCH:.3f}]; edge [arrowhead=none];'
    return ["digraph {", f"rankdir={direction};", common, *boxes, *edges, "}"]


def _read(plain: str, names: list[str]) -> Arrangement:
    """Read dot's plain format: a line for the graph, each node and each edge; y grows upwards."""
    middles, curves = {}, {}
    width = height = 0.0
    for kind, *words in map(shlex.split, filter(str.strip, plain.splitlines())):
        if kind == "graph":
            width, height = (INCH * float(word) for word in words[1:3])
        elif kind == "node":
            x, y = (INCH * float(word) for word in words[1:3])
            middles[names[int(words[0])]] = (x + MARGIN, height - y + MARGIN)
        elif kind == "edge":
            numbers = [INCH * float(word) for word in words[3 : 3 + 2 * int(words[2])]]
            points = [(x + MARGIN, height - y + MARGIN) for x, y in zip(numbers[::2], numbers[1::2], strict=True)]
            curves[names[int(words[0])], names[int(words[1])]] = points
    return Arrangement(middles, curves, (width + 2 * MARGIN, height + 2 * MARGIN))
