"""Collects everything about a pipeline for one page: its nodes, their results, and the timeline of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

from stagegraph.query.forecast import forecast
from stagegraph.query.history import PastRun, find_run, past_runs
from stagegraph.registry import find, load_object
from stagegraph.stage import RESERVATION
from stagegraph.store.journal import EXECUTED, FAILED, HIT

if TYPE_CHECKING:
    from stagegraph.planning.dag import Node
    from stagegraph.project import Project
    from stagegraph.store.record import Record

LOG_BYTES = 20_000  # of the end of a log
VIEW_BYTES = 60_000  # a longer view is named, not shown


@dataclass(frozen=True)
class NodeOverview:
    """One node: how it stands, why, its result if there is one, what its stage rendered and what it printed last."""

    node: Node
    status: str  # HIT, STALE, NEVER, UNKNOWN or FAILED; RESERVED for a HIT with a reservation
    reasons: Sequence[str]
    record: Record | None
    views: Mapping[str, str]  # name -> text; empty of one that is too long
    charts: str  # SVG of the stage's provider
    log: str


@dataclass(frozen=True)
class Overview:
    """A pipeline: its nodes in topological order, its runs, the one that is shown, and the nodes that it waited for."""

    name: str
    entries: list[NodeOverview]
    runs: list[PastRun]
    run: PastRun | None
    critical: frozenset[str] = frozenset()
    compared: Mapping[str, str] = field(default_factory=dict)  # stage -> a table in Markdown of its results

    def count(self, *statuses: str) -> int:
        """Return how many nodes have this status."""
        return sum(entry.status in statuses for entry in self.entries)


def overview(project: Project, run: str | None = None) -> Overview:
    """Collect everything; ``run`` names a run of the history, by default the last that executed something."""
    steps = forecast(project, project.select(), force=False, jobs=0).steps
    project.standing(project.dag.nodes)
    entries = [_entry(project, step.node, step.decision.status, step.decision.reasons, step.record) for step in steps]
    runs = past_runs(project.workspace.journal, project.name)
    executing = [past for past in runs if past.count(*EXECUTED, FAILED)]
    shown = runs[find_run(runs, run)] if run else executing[-1] if executing else None
    critical = critical_path(project.dag.nodes, shown) if shown else frozenset()
    return Overview(project.name, entries, runs, shown, critical, _compared(project, entries))


def _entry(project: Project, node: Node, status: str, reasons: Sequence[str], record: Record | None) -> NodeOverview:
    workspace = project.workspace
    last = workspace.last(project.name, node.name)
    if project.failed(node):
        status = FAILED
    elif status == HIT and record and record["facts"].get(RESERVATION):
        status, reasons = "RESERVED", [record["facts"][RESERVATION]]
    log = workspace.log_path(last.get("failed") or (record["key"] if record else ""))
    text = log.read_bytes()[-LOG_BYTES:].decode(errors="replace") if (last or record) and log.is_file() else ""
    views, charts = {}, ""
    if record:
        outputs = {
            name: digest for output in record["outputs"].values() for name, (digest, _) in output["files"].items()
        }
        views = {name: _view(project, digest, size) for name, (digest, size) in record["views"].items()}
        chart = find("charts", node.stage.id)
        if chart and chart.file in outputs and not workspace.store.verify(outputs[chart.file]):
            charts = load_object(chart.function)(_json(project, outputs[chart.file]))
    return NodeOverview(node, status, reasons, record, views, charts, text)


def _view(project: Project, digest: str, size: int) -> str:
    if size > VIEW_BYTES or project.workspace.store.verify(digest):
        return ""
    return project.workspace.store.read(digest).decode(errors="replace")


def _json(project: Project, digest: str) -> Any:
    import json

    return json.loads(project.workspace.store.read(digest))


def critical_path(nodes: Sequence[Node], run: PastRun) -> frozenset[str]:
    """Return the nodes that a run waited for: from the one that ended last back, each time to the last it needed."""
    ends = {n["node"]: n.get("began", 0.0) + n["seconds"] for n in run.nodes if n["outcome"] in EXECUTED | {FAILED}}
    by_name = {node.name: node for node in nodes}
    path: list[str] = []
    at = max(ends, key=ends.__getitem__, default=None)
    while at is not None:
        path.append(at)
        above = [u.name for u in by_name[at].upstream if u.name in ends] if at in by_name else []
        at = max(above, key=ends.__getitem__, default=None)
    return frozenset(path)


def _compared(project: Project, entries: Sequence[NodeOverview]) -> dict[str, str]:
    """Return for each stage that results can be compared of what is said of those that there are."""
    from stagegraph.query.artifact import Artifact
    from stagegraph.query.compare import documents

    tables: dict[str, str] = {}
    for stage in dict.fromkeys(entry.node.stage.id for entry in entries):
        how = find("comparisons", stage)
        found = {e.node.name: e.record for e in entries if e.node.stage.id == stage and e.record}
        if how and found:
            module = import_module(how.module)
            artifacts = {name: Artifact(name, record, project.workspace) for name, record in found.items()}
            rows = {name: module.row(documents(project, artifact, how)) for name, artifact in artifacts.items()}
            tables[stage] = module.page(rows)
    return tables
