"""Draws self-contained SVG pictures of a pipeline: the graph in layers, and the timeline of a run."""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from stagegraph.cli.common import seconds_text

if TYPE_CHECKING:
    import networkx as nx

BOX, GAP, HEIGHT = 30, 60, 44  # pixels: height of a box, between columns, from row to row
GAP_UPRIGHT, BEND = 36, 14  # pixels: between rows of boxes, and what an edge takes that passes some
WIDEST = 2000  # pixels: a graph that would be wider from left to right goes downwards
LETTER, SMALL = 7.3, 6.2  # pixels, about, of a letter in monospace fonts of 12 and 10 pixels
SWEEPS = 6  # over the columns, back and forth, to bring each node beside its neighbours
LANE, LINE = 26, 900  # pixels: height of a worker's lane, length of a run
# State of a node -> fill and line.
STATES = {
    "HIT": ("#e2f1e4", "#3d7a4a"), "BUILT": ("#dceaf8", "#35628f"), "UNCHANGED": ("#e2f1e4", "#3d7a4a"),
    "STALE": ("#fbf0d0", "#8f6d1a"), "NEVER": ("#efe6f6", "#6f4a8e"), "UNKNOWN": ("#ededed", "#777777"),
    "FAILED": ("#f9dcd9", "#a8322a"), "SKIPPED": ("#ededed", "#777777"), "RESERVED": ("#fbe3c8", "#9a5a12"),
}  # fmt: skip
# State of a node -> what people call it, where that is not its name.
MEANINGS = {"RESERVED": "with a reservation", "HIT": "up to date", "NEVER": "never built"}
STROKE = 'fill="none" stroke="#888"'  # of an edge
PLAIN = ("#eef3fa", "#445566")


class Box(NamedTuple):
    """The label of a node in the picture: the name of its state, a second line in smaller type, and the id of what it
    links to on the page.
    """

    state: str = ""
    note: str = ""
    link: str = ""


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


Point = tuple[float, float]


class Arrangement(NamedTuple):
    """A layout by another program: the middle of each box, the curve of each edge (Bézier, n times three points and the
    first), and the size of all.
    """

    middles: dict[str, Point]
    curves: dict[tuple[str, str], list[Point]]
    size: Point


Arrange = Callable[["nx.DiGraph[str]", Mapping[str, float], float], Arrangement | None]


class Extent(NamedTuple):
    """Where a box, or a bend of an edge, lies: from ``near`` to ``far`` along the arrows, its middle across them."""

    near: float
    far: float
    middle: float


def draw_graph(graph: nx.DiGraph[str], boxes: Mapping[str, Box], title: str, *, arrange: Arrange | None = None) -> str:
    """Return the graph as SVG, in layers with arrows, coloured by state.

    Arrows go from left to right, or downwards where that would be too wide to look at; or boxes and arrows lie as
    ``arrange`` puts them, which takes the graph, the width of each box and the height of all, if it can.
    """
    labels = {name: boxes.get(name, Box()) for name in graph}
    widths = {name: max(len(name) * LETTER, len(box.note) * SMALL) + 20 for name, box in labels.items()}
    if arrange and (found := arrange(graph, widths, BOX)):
        return _draw_arranged(found, widths, labels, title)
    bent, routes = _bent(graph)
    columns = layers(bent)
    upright = sum(max(widths.get(name, 0) for name in column) + GAP for column in columns) > WIDEST
    places, along, across = _arrange(columns, widths, upright=upright)
    lines = [_open(title, *((across, along) if upright else (along, across)))]
    lines += [_edge([places[name] for name in route], upright=upright) for route in routes]
    for name, box in labels.items():
        near, far, middle = places[name]
        left, width, y = (
            (middle - widths[name] / 2, widths[name], near + BOX / 2) if upright else (near, far - near, middle)
        )
        lines.append(_draw_box(left, y, width, name, box))
    return "\n".join([*lines, "</svg>"])


def _draw_arranged(found: Arrangement, widths: Mapping[str, float], labels: Mapping[str, Box], title: str) -> str:
    lines = [_open(title, *found.size)]
    for (x, y), *rest in found.curves.values():
        end, towards = rest[-1], rest[-2]
        lines.append(f'<path d="M {x:.0f} {y:.0f} C {" ".join(f"{u:.0f} {v:.0f}" for u, v in rest)}" {STROKE}/>')
        lines.append(_head(towards, end))
    for name, box in labels.items():
        x, y = found.middles[name]
        lines.append(_draw_box(x - widths[name] / 2, y, widths[name], name, box))
    return "\n".join([*lines, "</svg>"])


def _bent(graph: nx.DiGraph[str]) -> tuple[nx.DiGraph[str], list[list[str]]]:
    """Return the graph with a bend, a node more, in each layer that an edge passes, so that it goes round the boxes
    there; and the nodes that each edge became.
    """
    import networkx as nx

    depths = {name: depth for depth, layer in enumerate(nx.topological_generations(graph)) for name in layer}
    bent: nx.DiGraph[str] = nx.DiGraph()
    bent.add_nodes_from(graph)
    routes = [
        [a, *(f"{a}\n{b}\n{depth}" for depth in range(depths[a] + 1, depths[b])), b]  # no name of a node has lines
        for a, b in graph.edges
    ]
    for route in routes:
        nx.add_path(bent, route)
    return bent, routes


def _arrange(
    columns: Sequence[Sequence[str]], widths: Mapping[str, float], *, upright: bool
) -> tuple[dict[str, Extent], float, float]:
    """Return where everything lies, and how far all of it reaches along the arrows and across them."""
    rooms = {
        name: BEND if name not in widths else widths[name] + 20 if upright else HEIGHT
        for name in itertools.chain(*columns)
    }
    tall = max(sum(map(rooms.__getitem__, column)) for column in columns)
    places: dict[str, Extent] = {}
    near = 10.0
    for column in columns:
        far = near + (BOX if upright else max(widths.get(name, 0) for name in column))
        edge = 10 + (tall - sum(map(rooms.__getitem__, column))) / 2
        for name in column:
            places[name] = Extent(near, far, edge + rooms[name] / 2)
            edge += rooms[name]
        near = far + (GAP_UPRIGHT if upright else GAP)
    return places, max(place.far for place in places.values()) + 10, tall + 20


def _edge(route: Sequence[Extent], *, upright: bool) -> str:
    """Return a curve from the first place to the last, straight where it passes those between."""

    def point(along: float, across: float) -> str:
        return f"{across:.0f} {along:.0f}" if upright else f"{along:.0f} {across:.0f}"

    path = f"M {point(route[0].far, route[0].middle)}"
    for a, b in itertools.pairwise(route):
        end = b.near - (7 if b is route[-1] else 0)  # the arrow's
        half = (a.far + end) / 2
        path += f" C {point(half, a.middle)}, {point(half, b.middle)}, {point(end, b.middle)}"
        path += f" L {point(b.far, b.middle)}" if b is not route[-1] else ""
    tip, before = (b.near, b.middle), (end, b.middle)
    head = _head(before[::-1], tip[::-1]) if upright else _head(before, tip)
    return f'<path d="{path}" {STROKE}/>{head}'


def _head(towards: Point, tip: Point) -> str:
    """Return an arrow's head, along the line between two points.

    Not a marker: of a page with several pictures, all would take that of the first, which may be folded away.
    """
    x, y = tip[0] - towards[0], tip[1] - towards[1]
    length = math.hypot(x, y) or 1.0
    x, y = 7 * x / length, 7 * y / length
    sides = [(tip[0] - x - y * 4 / 7, tip[1] - y + x * 4 / 7), tip, (tip[0] - x + y * 4 / 7, tip[1] - y - x * 4 / 7)]
    return f'<path d="M {" L ".join(f"{u:.0f} {v:.0f}" for u, v in sides)} Z" fill="#888"/>'


def _draw_box(left: float, middle: float, width: float, name: str, box: Box) -> str:
    fill, line = STATES.get(box.state, PLAIN)
    shape = f'x="{left:.0f}" y="{middle - BOX / 2:.0f}" width="{width:.0f}" height="{BOX}"'
    tip = html.escape(" ".join(filter(None, [name, box.state, box.note])))
    label = _text(left + 10, middle + (4 if not box.note else -1), name, "#222")
    note = _text(left + 10, middle + 11, box.note, line, 10) if box.note else ""
    drawn = f'<g><title>{tip}</title><rect {shape} rx="5" fill="{fill}" stroke="{line}"/>{label}{note}</g>'
    return f'<a href="#{html.escape(box.link)}">{drawn}</a>' if box.link else drawn


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
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'height="{height:.0f}" font-family="monospace" font-size="12" role="img"><title>{text}</title>'
    )


def _text(x: float, y: float, text: str, fill: str, size: int = 12, anchor: str = "start") -> str:
    shape = f'x="{x:.0f}" y="{y:.0f}" font-size="{size}" text-anchor="{anchor}" fill="{fill}"'
    return f"<text {shape}>{html.escape(text)}</text>"
