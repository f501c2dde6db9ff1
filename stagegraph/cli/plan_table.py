"""Formats a plan as a table with totals, for ``status`` and ``run --dry-run``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stagegraph.cli.common import age_text, seconds_text, size_text
from stagegraph.cli.layout import Brief, table
from stagegraph.errors import listed
from stagegraph.files import typed
from stagegraph.planning.planner import NEVER, STALE, UNKNOWN
from stagegraph.store.journal import FAILED, HIT
from stagegraph.store.record import record_size

if TYPE_CHECKING:
    from stagegraph.query.forecast import Plan, Step


def plan_lines(plan: Plan, *, costs: bool) -> list[str]:
    """Return the table, a blank line and the totals; ``costs``: of the last results, else what is predicted."""
    header: tuple[str, ...] = ("node", "status", "reason", "predicted", "restore")
    if costs:
        header = ("node", "status", "reason", "time", "size", "memory", "built")
    rows = [_costs(step) if costs else _predicted(step) for step in plan.steps]
    return [table(header, rows, flexible=2), "", *_totals(plan, costs=costs)]


def _costs(step: Step) -> tuple[str, ...]:
    d, r, note = step.decision, step.record, _note(step)
    if r is None:
        return d.node.name, _status(step), note, "-", "-", "-", "-"
    seconds, size, memory = seconds_text(r["seconds"]), size_text(record_size(r)), size_text(r["peak_bytes"])
    return d.node.name, _status(step), note, seconds, size, memory, age_text(r["started"])


def _status(step: Step) -> str:
    return f"{step.decision.status}, {FAILED}" if step.failed else step.decision.status


def _predicted(step: Step) -> tuple[str, ...]:
    d = step.decision
    seconds = "?" if step.seconds is None else seconds_text(step.seconds)
    return d.node.name, _status(step), _note(step), "-" if d.status == HIT else seconds, _bytes(step.restore)


def _note(step: Step) -> str:
    """Return why a node would run, never shortened; for others what they made or wait for, which may be shortened."""
    d = step.decision
    summary = step.record["summary"] if step.record else ""
    return d.reason if d.reason and d.status != UNKNOWN else Brief(d.reason or summary)


def _bytes(count: int) -> str:
    return size_text(count) if count else "-"


def _totals(plan: Plan, *, costs: bool) -> list[str]:
    """Return how much there is to do and, if something is to run, how long it takes."""
    sure, maybe = plan.count(STALE, NEVER), plan.count(UNKNOWN)
    if plan.idle:
        return [f"all {len(plan.steps)} nodes are up to date"]
    totals = [f"would run {sure} of {len(plan.steps)} nodes" + (f", and up to {maybe} below them" if maybe else "")]
    totals += [f"would restore {size_text(plan.restore)}"] if plan.restore else []
    lines = ["; ".join(totals if costs else [*totals, "nothing was run"])]
    if sure:
        lines.append(_time(plan, sure + maybe))
    failed = [typed(step.node.name) for step in plan.steps if step.failed]
    if failed:
        lines.append(f"failed when last run: {listed(failed)}; `pipeline log {failed[0]}` says why")
    return lines


def _time(plan: Plan, count: int) -> str:
    unknown = len(plan.unpredicted)
    if unknown == count:
        return "predicted time: unknown, no timing history"
    most = f" to {seconds_text(plan.most)}" if plan.most > plan.seconds else ""
    without = f", without {unknown} that have no timing history" if unknown else ""
    return f"predicted time: {seconds_text(plan.seconds)}{most}{without}"
