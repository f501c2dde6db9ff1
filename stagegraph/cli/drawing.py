"""Draws self-contained SVG pictures of a pipeline: the graph in layers, and the timeline of a run."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from stagegraph.cli.common import seconds_text

if TYPE_CHECKING:
    import networkx as nx

BOX, GAP, HEIGHT = 30, 60, 44  # pixels: height of a box, between columns, from row to row
LETTER, SMALL = 7.3, 6.2  # pixels, about, of a letter in monospace fonts of 12 and 10 pixels
SWEEPS = 6  # over the columns, back and forth, to bring each node beside its neighbours
LANE, LINE = 26, 900  # pixels: height of a worker's lane, length of a run
# State of a node -> fill and line.
STATES = {
    "HIT": ("#e2f1e4", "#3d7a4a"), "BUILT": ("#dceaf8", "#35628f"), "UNCHANGED": ("#e2f1e4", "#3d7a4a"),
    "STALE": ("#fbf0d0", "#8f6d1a"), "NEVER": ("#efe6f6", "#6f4a8e"), "UNKNOWN": ("#ededed", "#777777"),
    "FAILED": ("#f9dcd9", "#a8322a"), "SKIPPED": ("#ededed", "#777777"), "RESERVED": ("#fbe3c8", "#9a5a12"),
}  # fmt: skip
PLAIN = ("#eef3fa", "#445566")


class Box(NamedTuple):
    """The label of a node in the picture: the name of its state, and a second line in smaller type."""

    state: str = ""
    note: str = ""


class Bar(NamedTuple):
    """One node of a run: when it began and how long it took, in seconds, and whether the run waited for it."""

    name: str
    began: float
    seconds: float
    state: str
    critical: bool


def layers(graph: nx.DiGraph[str]) -> list[list[str]]:
    """Return the nodes in columns by depth, each near the mean position of its neighbours, so that few edges cross."""
    import networkx as nx

    columns = [sorted(layer) for layer in nx.topological_generations(graph)]
    for sweep in range(SWEEPS):
        forwards = sweep % 2 == 0
        rows = {name: i - len(column) / 2 for column in columns for i, name in enumerate(column)}
        for column in columns if forwards else reversed(columns):
            near = {name: [rows[u] for u in (graph.pred if forwards else graph.succ)[name]] for name in column}
            means = {name: sum(found) / len(found) if found else rows[name] for name, found in near.items()}
            column.sort(key=lambda name: (means[name], name))
            rows.update({name: i - len(column) / 2 for i, name in enumerate(column)})
    return columns


def draw_graph(graph: nx.DiGraph[str], boxes: Mapping[str, Box], title: str) -> str:
    """Return the graph as SVG, in columns from left to right with arrows, coloured by state."""
    columns = layers(graph)
    tall = max(map(len, columns))
    at: dict[str, tuple[float, float, float]] = {}  # node -> left, middle, width
    left = 10.0
    for column in columns:
        width = max(_width(name, boxes.get(name, Box())) for name in column) + 20
        top = 10 + HEIGHT * (tall - len(column)) / 2
        at |= {name: (left, top + HEIGHT * i + BOX / 2, width) for i, name in enumerate(column)}
        left += width + GAP
    size = (left - GAP + 10, HEIGHT * tall + 10)
    lines = [_open(title, *size)]
    for a, b in graph.edges:
        x, y, end = at[a][0] + at[a][2], at[a][1], at[b][0] - 7
        bend = f"C {x + GAP / 2:.0f} {y:.0f}, {end - GAP / 2:.0f} {at[b][1]:.0f}, {end:.0f} {at[b][1]:.0f}"
        lines.append(f'<path d="M {x:.0f} {y:.0f} {bend}" fill="none" stroke="#888" marker-end="url(#arrow)"/>')
    for name, (x, y, width) in at.items():
        box = boxes.get(name, Box())
        fill, line = STATES.get(box.state, PLAIN)
        shape = f'x="{x:.0f}" y="{y - BOX / 2:.0f}" width="{width:.0f}" height="{BOX}"'
        tip = " ".join(filter(None, [name, box.state, box.note]))
        lines.append(f'<g><title>{html.escape(tip)}</title><rect {shape} rx="5" fill="{fill}" stroke="{line}"/>')
        lines.append(_text(x + 10, y + (4 if not box.note else -1), name, "#222"))
        lines.append((_text(x + 10, y + 11, box.note, line, 10) if box.note else "") + "</g>")
    return "\n".join([*lines, "</svg>"])


def _width(name: str, box: Box) -> float:
    return max(len(name) * LETTER, len(box.note) * SMALL)


def draw_timeline(bars: Sequence[Bar], title: str) -> str:
    """Return a run as SVG: one bar per node, in as many lanes as ran at once; the critical path is outlined."""
    whole = max((bar.began + bar.seconds for bar in bars), default=0) or 1.0
    lanes = place(bars)
    count = max(lanes.values(), default=0) + 1
    lines = [_open(title, LINE + 20, LANE * count + 34)]
    for part in (0.0, 0.25, 0.5, 0.75, 1.0):
        x = 10 + LINE * part
        lines.append(f'<path d="M{x:.0f} 4V{LANE * count + 12}" stroke="#888" opacity=".35"/>')
        anchor = "start" if part == 0 else "end" if part == 1 else "middle"
        lines.append(_text(x, LANE * count + 28, seconds_text(whole * part), "currentColor", 10, anchor))
    for bar in bars:
        x, width = 10 + LINE * bar.began / whole, max(LINE * bar.seconds / whole, 1.5)
        y, (fill, line) = 8 + LANE * lanes[bar.name], STATES.get(bar.state, PLAIN)
        edge = 'stroke="#c2410c" stroke-width="2"' if bar.critical else f'stroke="{line}" stroke-width=".7"'
        tip = f"{bar.name} {bar.state}: {seconds_text(bar.seconds)} from {seconds_text(bar.began)}"
        lines.append(f"<g><title>{html.escape(tip)}</title>")
        lines.append(f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{LANE - 6}" rx="2" fill="{fill}" {edge}/>')
        fitting = int((width - 8) / SMALL)
        shown = bar.name if len(bar.name) <= fitting else bar.name[: fitting - 1] + "…" if fitting > 4 else ""
        lines.append((_text(x + 4, y + 14, shown, "#222", 10) if shown else "") + "</g>")
    return "\n".join([*lines, "</svg>"])


def place(bars: Iterable[Bar]) -> dict[str, int]:
    """Return a lane for each bar: the first that is free when it begins."""
    free: list[float] = []
    lanes: dict[str, int] = {}
    for bar in sorted(bars, key=lambda each: (each.began, each.name)):
        lane = next((i for i, end in enumerate(free) if end <= bar.began + 0.001), len(free))
        free[lane : lane + 1] = [bar.began + bar.seconds]
        lanes[bar.name] = lane
    return lanes


def _open(title: str, width: float, height: float) -> str:
    text = html.escape(title)
    marker = (
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="1" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<polygon points="0,0 8,4 0,8" fill="#888"/></marker></defs>'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'height="{height:.0f}" font-family="monospace" font-size="12" role="img"><title>{text}</title>{marker}'
    )


def _text(x: float, y: float, text: str, fill: str, size: int = 12, anchor: str = "start") -> str:
    shape = f'x="{x:.0f}" y="{y:.0f}" font-size="{size}" text-anchor="{anchor}" fill="{fill}"'
    return f"<text {shape}>{html.escape(text)}</text>"
