"""What a run would do and take: the planner's decisions with times from the history and bytes to restore."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stagegraph.planning.planner import STALE, UNKNOWN, Decision
from stagegraph.store.journal import HIT
from stagegraph.store.record import Record, record_size

if TYPE_CHECKING:
    from stagegraph.planning.dag import Node
    from stagegraph.project import Project, Selection
    from stagegraph.stage import JsonObject


@dataclass
class Step:
    """One node of a plan: the decision, the predicted seconds of an execution, and the last result if any.

    ``failed`` says that it would run, and failed when it last did.
    """

    decision: Decision
    seconds: float | None
    restore: int  # bytes that a run would put back under artifacts/
    record: Record | None
    failed: bool = False

    @property
    def node(self) -> Node:
        """The node."""
        return self.decision.node

    @property
    def runs(self) -> bool:
        """Whether a run executes it for certain."""
        return self.decision.status not in {HIT, UNKNOWN}

    def document(self) -> JsonObject:
        """Return the step as ``--json`` prints it."""
        record = self.record
        return {
            "node": self.node.name,
            "status": self.decision.status,
            "failed": self.failed,
            "reasons": self.decision.reasons,
            "key": self.decision.key,
            "predicted_seconds": self.seconds if self.decision.status != HIT else 0,
            "restore_bytes": self.restore,
            "built": record["started"] if record else None,
            "seconds": record["seconds"] if record else None,
            "bytes": record_size(record) if record else None,
            "peak_bytes": record["peak_bytes"] if record else None,
        }


@dataclass
class Plan:
    """The steps in the order of a run; ``seconds`` is predicted for what is sure to run, ``most`` for all that may.

    Steps of which no time is known count nothing and are named in ``unpredicted``.
    """

    steps: list[Step]
    seconds: float
    most: float

    @property
    def unpredicted(self) -> list[str]:
        """The nodes that may run and whose like has never run."""
        return [s.node.name for s in self.steps if s.seconds is None and s.decision.status != HIT]

    @property
    def restore(self) -> int:
        """Bytes that a run would put back under ``artifacts/``."""
        return sum(step.restore for step in self.steps)

    @property
    def idle(self) -> bool:
        """Whether a run would find nothing to do."""
        return all(step.decision.status == HIT and not step.decision.reasons for step in self.steps)

    def count(self, *statuses: str) -> int:
        """Return how many steps have one of these statuses."""
        return sum(step.decision.status in statuses for step in self.steps)

    def document(self) -> JsonObject:
        """Return the plan as ``--json`` prints it."""
        return {
            "predicted_seconds": round(self.seconds, 3),
            "predicted_seconds_at_most": round(self.most, 3),
            "unpredicted": self.unpredicted,
            "restore_bytes": self.restore,
            "nodes": [step.document() for step in self.steps],
        }


def forecast(project: Project, selection: Selection, *, force: bool, jobs: int) -> Plan:
    """Settle a selection as far as that is possible without running anything, and say what it takes."""
    decisions = project.planner.plan(selection.nodes)
    for decision in decisions:
        if force and decision.status == HIT and decision.node in selection.chosen:
            decision.status, decision.reasons = STALE, ["forced"]
    predict = _predictor(project) if any(d.status != HIT for d in decisions) else lambda _: None
    steps = [_step(project, decision, predict) for decision in decisions]
    sure = makespan(steps, lambda step: step.runs, jobs)
    return Plan(steps, sure, makespan(steps, lambda step: step.decision.status != HIT, jobs))


def _predictor(project: Project) -> Callable[[Decision], float | None]:
    from stagegraph.query.history import Durations

    known = Durations(project.workspace.journal)
    return lambda d: known.predict(project.name, d.node.name, d.node.stage.id)


def _step(project: Project, decision: Decision, predict: Callable[[Decision], float | None]) -> Step:
    workspace, name = project.workspace, decision.node.name
    restore = 0
    if decision.record and not workspace.is_shown(project.name, name, decision.key, decision.record):
        sizes = workspace.unshown(project.name, name, decision.record)
        restore = sum(sizes.values())
        decision.reasons = [
            f"restores {len(sizes)} file{'s' * (len(sizes) != 1)}" if sizes else "removes stray files from artifacts/"
        ]
    record = decision.record or decision.previous or workspace.last_record(project.name, name)
    failed = decision.status != HIT and "failed" in workspace.last(project.name, name)
    return Step(decision, predict(decision), restore, record, failed)


def makespan(steps: Iterable[Step], counts: Callable[[Step], bool], jobs: int) -> float:
    """Return the seconds until the last of the steps that count is done, on ``jobs`` processors (0: all there are)."""
    steps = list(steps)
    free = [0.0] * max(1, min(jobs or os.cpu_count() or 1, len(steps)))
    ends: dict[Node, float] = {}
    for step in steps:
        ready = max((ends[u] for u in step.node.upstream if u in ends), default=0.0)
        if not counts(step):
            ends[step.node] = ready
            continue
        exclusive = step.node.spec.resources.exclusive
        ends[step.node] = end = max(ready, _slot(free, exclusive=exclusive)) + (step.seconds or 0.0)
        free = [end] * len(free) if exclusive else sorted([*sorted(free)[1:], end])
    return max(ends.values(), default=0.0)


def _slot(free: Sequence[float], *, exclusive: bool) -> float:
    return max(free) if exclusive else min(free)
