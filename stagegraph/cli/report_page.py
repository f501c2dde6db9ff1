"""The page of ``pipeline report``: verdicts first, then the graph, the last run, comparisons, each node, past runs."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from stagegraph.cli.common import date_text, seconds_text, size_text
from stagegraph.cli.drawing import MEANINGS, STATES, Bar, draw_graph, draw_timeline
from stagegraph.cli.graph import MOST_BOXES, box_of, entries_of, folded_boxes, reduced_graph
from stagegraph.cli.report_tables import markdown, table
from stagegraph.cli.streams import visible
from stagegraph.errors import listed
from stagegraph.files import dotted, typed
from stagegraph.planning.changes import show
from stagegraph.registry import find
from stagegraph.store.journal import EXECUTED, FAILED
from stagegraph.store.record import parts_text, record_size

if TYPE_CHECKING:
    from stagegraph.api import Pipeline
    from stagegraph.query.history import PastRun
    from stagegraph.query.overview import NodeOverview, Overview
    from stagegraph.registry import Section
    from stagegraph.store.record import Record

STYLE = Path(__file__).with_name("report.css")
RUNS = 20
ROWS = 15  # of a table in a section
FOLDED = 3  # nodes of an entry that are shown one by one


def page(pipeline: Pipeline, found: Overview) -> str:
    """Return the page."""
    parts = [
        f"<h1>{escape(found.name)}</h1>",
        f'<p class="lead">{_lead(pipeline, found)}</p>',
        _verdicts(found.entries),
        "<h2>The pipeline</h2>",
        _graphs(pipeline, found),
        _legend(entry.status for entry in found.entries),
    ]
    if found.run:
        parts += [_run_title(found.run), _timeline(found, found.run), _beside_earlier(found.runs, found.run)]
    for stage, text in found.compared.items():
        parts += [f"<h2>{escape(stage)}: side by side</h2>", markdown(text)]
    if sections := list(_sections(found.entries)):
        parts += ["<h2>What came out</h2>", *sections]
    parts += ["<h2>Nodes</h2>", *_nodes(found.entries)]
    if found.runs:
        parts += ["<h2>Runs</h2>", _runs(found.runs)]
    style = STYLE.read_text(encoding="utf-8")
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(found.name)}</title>'
    )
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{style}</style></head><body>\n'
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _lead(pipeline: Pipeline, found: Overview) -> str:
    file, now = pipeline.dag.pipeline.file.name, time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    counts = {status: found.count(status) for status in dict.fromkeys(entry.status for entry in found.entries)}
    summary = ", ".join(f"{n} {MEANINGS.get(status, status.lower())}" for status, n in counts.items())
    return escape(f"{file}, {len(found.entries)} nodes: {summary}. As of {now}.")


def _verdicts(entries: Sequence[NodeOverview]) -> str:
    """Return the verdicts of attesting nodes and the failures, which a reader looks for first."""
    lines = []
    for entry in entries:
        attests = any(out.attests for out in entry.node.stage.outputs.values())
        if not attests and entry.status != FAILED:
            continue
        summary = entry.record["summary"] if entry.record else ""
        known = entry.status in {"HIT", "RESERVED"}
        text = (
            "; ".join(entry.reasons) or summary if known else f"not known as things stand ({'; '.join(entry.reasons)})"
        )
        text = "it failed when it ran last" if entry.status == FAILED else text
        state = entry.status if entry.status in {"HIT", "RESERVED", FAILED} else ""
        lines.append(f'<li class="{state}"><code>{escape(entry.node.name)}</code> {escape(visible(text))}</li>')
    return f'<ul class="verdicts">{"".join(lines)}</ul>' if lines else ""


def _graphs(pipeline: Pipeline, found: Overview) -> str:
    """Return the graph of every node, above it that of entries if they are fewer; one of the two is folded away."""
    title = f"the graph of {found.name}"
    dag, states = pipeline.dag, {entry.node.name: entry.status for entry in found.entries}
    nodes = {e.node.name: box_of(e.status, e.record, dotted(e.node.name)) for e in found.entries}
    every = draw_graph(reduced_graph(dag), nodes, title)
    folded = [entry for entry, instances in entries_of(dag).items() if len(instances) > 1]
    if not folded:
        return f'<div class="wide">{every}</div>'
    few = draw_graph(reduced_graph(dag, folded), nodes | folded_boxes(dag, folded, states), title)
    many = len(nodes) > MOST_BOXES
    count = len(entries_of(dag))
    return _picture(f"{count} entries", few, opened=many) + _picture(f"{len(nodes)} nodes", every, opened=not many)


def _picture(title: str, drawn: str, *, opened: bool) -> str:
    return f'<details{" open" * opened}><summary>{title}</summary><div class="wide">{drawn}</div></details>'


def _legend(statuses: Iterable[str]) -> str:
    return f'<p class="legend">{" ".join(_state(status) for status in dict.fromkeys(statuses))}</p>'


def _state(status: str) -> str:
    fill, line = STATES.get(status, ("#ededed", "#777"))
    text = escape(MEANINGS.get(status, status.lower()))
    return f'<span class="state" style="background:{fill};color:{line}">{text}</span>'


def _run_title(run: PastRun) -> str:
    ran = f"{run.count(*EXECUTED)} nodes ran in {seconds_text(run.seconds)}"
    return f"<h2>Run {run.id[:8]}, {escape(date_text(run.started))} UTC: {run.state}; {ran}</h2>"


def _timeline(found: Overview, run: PastRun) -> str:
    bars = [
        Bar(n["node"], n["began"], n["seconds"], n["outcome"], n["node"] in found.critical)
        for n in run.nodes
        if n["outcome"] in EXECUTED | {FAILED} and "began" in n  # earlier versions did not keep it
    ]
    if not bars:
        return ""
    drawn = draw_timeline(bars, f"run {run.id[:8]} on a line of time")
    legend = "outlined: the critical path, the node that ended last and each time the last of those that it needed"
    return f'<div class="wide">{drawn}</div><p class="legend">{legend}</p>'


def _beside_earlier(runs: Sequence[PastRun], run: PastRun) -> str:
    """Return how durations changed since the earlier run, for nodes that ran in both; the largest change first."""
    before: dict[str, float] = {}
    for past in runs[: runs.index(run)]:
        before |= {n["node"]: n["seconds"] for n in past.nodes if n["outcome"] in EXECUTED}
    both = [(n["node"], before[n["node"]], n["seconds"]) for n in run.nodes if n["node"] in before]
    changed = sorted((row for row in both if row[1] != row[2] and row[2]), key=lambda row: -abs(row[2] - row[1]))
    if not changed:
        return ""
    rows = [
        (name, seconds_text(old), seconds_text(new), f"{new / old:.2f} x" if old else "-")
        for name, old, new in changed[:RUNS]
    ]
    return "<h4>Beside the run before</h4>" + table(("node", "before", "now", ""), rows, frozenset({1, 2, 3}))


def _sections(entries: Sequence[NodeOverview]) -> Iterator[str]:
    """Yield what stages want seen first of their results, the last of the pipeline first: pictures, some views."""
    for stage in dict.fromkeys(entry.node.stage.id for entry in reversed(entries)):
        sections = find("sections", stage) or ()
        shown = [
            e for e in entries if e.node.stage.id == stage and (e.charts or any(s.view in e.views for s in sections))
        ]
        for entry in shown:
            parts = [entry.charts, *(_section(s, entry.views[s.view]) for s in sections if entry.views.get(s.view))]
            name = f'<span class="name">{escape(entry.node.name)}</span>'
            opened = " open" if len(shown) <= FOLDED else ""
            yield f'<details class="section"{opened}><summary>{name}</summary><div>{"".join(parts)}</div></details>'


def _section(section: Section, text: str) -> str:
    note = f'<p class="more">{escape(section.note)}</p>' if section.note else ""
    return f"<h4>{escape(section.title)}</h4>{note}{markdown(text, ROWS)}"


def _nodes(entries: Sequence[NodeOverview]) -> Iterator[str]:
    """Yield the nodes in the order of the pipeline, a matrix of several under one line to fold away."""
    of: dict[str, list[NodeOverview]] = {}
    for entry in entries:
        of.setdefault(entry.node.spec.entry, []).append(entry)
    for name, instances in of.items():
        if len(instances) <= FOLDED:
            yield from map(_node, instances)
            continue
        states = " ".join(
            f"{sum(e.status == status for e in instances)} {_state(status)}"
            for status in dict.fromkeys(e.status for e in instances)
        )
        opened = " open" if any(e.status == FAILED for e in instances) else ""
        head = f'<summary><span class="name">{escape(name)}</span><span class="what">{states}</span></summary>'
        inside = f'<div id="{escape(name)}">{"".join(map(_node, instances))}</div>'
        yield f'<details class="node"{opened}>{head}{inside}</details>'


def _node(entry: NodeOverview) -> str:
    record = entry.record
    what = record["summary"] if record and entry.status in {"HIT", "RESERVED"} else listed(entry.reasons)
    cost = f"{seconds_text(record['seconds'])}, {size_text(record_size(record))}" if record else "-"
    head = (
        f'{_state(entry.status)}<span class="name">{escape(entry.node.name)}</span>'
        f'<span class="what">{escape(visible(what))}</span><span class="cost">{cost}</span>'
    )
    body = "".join(_body(entry, record)) if record else "<p>It has no result yet.</p>"
    opened = " open" if entry.status == FAILED else ""
    log = f"<h4>Log</h4><pre>{escape(visible(entry.log))}</pre>" if entry.log.strip() else ""
    inside = f'<div id="{escape(dotted(entry.node.name))}">{body}{log}</div>'  # a link to what is inside unfolds it
    return f'<details class="node"{opened}><summary>{head}</summary>{inside}</details>'


def _body(entry: NodeOverview, record: Record) -> Iterator[str]:
    document, name = record["document"], typed(entry.node.name)
    cost = f"{seconds_text(record['cpu_seconds'])} CPU, {size_text(record['peak_bytes'])} peak"
    made = f"{record['started']} on {record['host']}: {cost}"
    rows = [("key", record["key"]), ("built", made)]
    rows += [(f"parameter {key}", show(value)) for key, value in document["params"].items()]
    rows += [(f"reads {port}", ", ".join(n.name for n in nodes)) for port, nodes in entry.node.inputs.items()]
    rows += [("source " + key, f"{len(value)} files") for key, value in document.get("sources", {}).items()]
    rows += [("tool " + key, str(value)) for key, value in document["tools"].items()]
    rows += [("library " + key, str(value)) for key, value in document.get("libraries", {}).items()]
    rows += [("memoised", parts_text(record))] if record["parts"] else []
    yield table(("", ""), rows)
    yield "".join(f"<p>warning: {escape(visible(warning))}</p>" for warning in record["warnings"])
    files = [
        (n, size_text(size), digest[:16])
        for out in record["outputs"].values()
        for n, (digest, size) in out["files"].items()
    ]
    yield "<h4>Outputs</h4>" + table(("file", "size", "digest"), files[:RUNS])
    yield f"<p>and {len(files) - RUNS} more files</p>" if len(files) > RUNS else ""
    for view, text in entry.views.items():
        if not view.endswith(".json"):
            yield f"<h4>{escape(view)}</h4>"
            yield markdown(text) if text else f"<p><code>pipeline show {escape(name)} --view {escape(view)}</code></p>"


def _runs(runs: Sequence[PastRun]) -> str:
    rows = [
        (
            run.id[:8],
            date_text(run.started),
            run.state,
            str(run.count(*EXECUTED)),
            seconds_text(run.seconds),
            " ".join(run.command),
        )
        for run in reversed(runs[-RUNS:])
    ]
    return table(("run", "started", "state", "ran", "time", "command"), rows)
