"""The history of runs, read from the journal: what ran when, why, for how long, and with which result.

A run that had nothing to do is not recorded. A run's id is the digest of its journal line, shown as 8 digits.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stagegraph.digest import digest_json
from stagegraph.errors import PlanError
from stagegraph.store.journal import EXECUTED, HIT, NodeEntry, RunEntry
from stagegraph.store.record import record_size, result_digest

if TYPE_CHECKING:
    from stagegraph.execution.outcome import Outcome, Run
    from stagegraph.store.journal import Journal

DATE = re.compile(r"\d{4}-\d\d-\d\d")
SAMPLES = 5  # a node's predicted time is the median of its last ones


@dataclass(frozen=True)
class PastRun:
    """One run of the journal; ``nodes`` leaves out those that were simply up to date."""

    id: str
    pipeline: str
    started: str
    seconds: float
    state: str  # "ok", "failed" or "interrupted"
    command: tuple[str, ...]
    nodes: tuple[NodeEntry, ...]
    tag: str = ""

    def count(self, *outcomes: str) -> int:
        """Return how many nodes ended in one of these ways."""
        return sum(node["outcome"] in outcomes for node in self.nodes)


def journal_entry(
    pipeline: str, run: Run, started: str, command: Sequence[str], *, interrupted: bool, tag: str = ""
) -> RunEntry:
    """Return the journal's line about a run: every node that was not simply up to date."""
    entry: RunEntry = {
        "pipeline": pipeline,
        "started": started,
        "seconds": run.seconds,
        "state": "interrupted" if interrupted else "ok" if run.ok else "failed",
        "command": list(command),
        "nodes": [_node_entry(outcome) for outcome in run.outcomes if outcome.reason],
    }
    if tag:
        entry["tag"] = tag
    return entry


def _node_entry(outcome: Outcome) -> NodeEntry:
    result = result_digest(outcome.record) if outcome.record else ""
    return {
        **outcome_document(outcome),
        "stage": outcome.node.stage.id,
        "result": result,
        "began": outcome.began,
    }


def outcome_document(outcome: Outcome) -> NodeEntry:
    """Return how one node ended, as ``run --json`` and the journal tell it."""
    record = outcome.record
    return {
        "node": outcome.node.name,
        "outcome": outcome.status,
        "reason": outcome.reason,
        "reasons": outcome.reasons,
        "key": outcome.key,
        "seconds": outcome.seconds,
        "bytes": record_size(record) if record else 0,
        "peak_bytes": record["peak_bytes"] if record else 0,
        "summary": record["summary"] if record else "",
        "parts": record["parts"] if record else {},
        "warnings": record["warnings"] if record else [],
        "problems": list(outcome.problems),
        "log": str(outcome.log) if outcome.log else None,
    }


def past_runs(journal: Journal, pipeline: str) -> list[PastRun]:
    """Return the runs of one pipeline, oldest first."""
    return [_past(entry) for entry in journal.entries() if entry["pipeline"] == pipeline]


def _past(entry: RunEntry) -> PastRun:
    return PastRun(
        id=digest_json(entry),
        pipeline=entry["pipeline"],
        started=entry["started"],
        seconds=entry["seconds"],
        state=entry["state"],
        command=tuple(entry["command"]),
        nodes=tuple(entry["nodes"]),
        tag=str(entry.get("tag", "")),
    )


def find_run(runs: Sequence[PastRun], name: str) -> int:
    """Return the position of the run that ``name`` means: the first digits of its id, ``~N``, N before the last, the
    tag of one (of several the last), or a date, for the last run by the end of that day (UTC).

    An ``@`` may stand before it, which keeps shells from reading ``~N`` as a directory.
    """
    name = name.removeprefix("@")
    if name.startswith("~") and name[1:].isdigit():
        if int(name[1:]) < len(runs):
            return len(runs) - 1 - int(name[1:])
        raise PlanError(f"there is no run {name}: the history has {len(runs)}; `pipeline runs` lists them")
    tagged = [i for i, run in enumerate(runs) if name and run.tag == name]
    if DATE.fullmatch(name):
        tagged = [i for i, run in enumerate(runs) if run.started and run.started[: len(name)] <= name]
        if not tagged:
            raise PlanError(f"no run is as old as {name}; `pipeline runs` lists them")
    if tagged:
        return tagged[-1]
    found = [i for i, run in enumerate(runs) if name and run.id.startswith(name)]
    if len(found) != 1:
        problem = "more than one run begins" if found else "no run begins"
        raise PlanError(f"{problem} with '{name}'; `pipeline runs` lists them")
    return found[0]


def key_at(runs: Sequence[PastRun], position: int, node: str) -> tuple[str, str] | None:
    """Return a node's result as of a run, of that run or else of the last one before it that had one.

    It is the key, and the digest of the result, empty in what was written before there was one.
    """
    for run in reversed(runs[: position + 1]):
        for entry in run.nodes:
            if entry["node"] == node and entry["outcome"] in EXECUTED | {HIT}:
                return str(entry["key"]), str(entry.get("result", ""))
    return None


class Durations:
    """How long executions took, by node, by entry, by stage: the median of the last few in the journal."""

    def __init__(self, journal: Journal) -> None:
        self._of_node: dict[tuple[str, str], list[float]] = {}
        self._of_entry: dict[tuple[str, str], list[float]] = {}
        self._of_stage: dict[str, list[float]] = {}
        for entry in journal.entries():
            for node in entry["nodes"]:
                if node["outcome"] in EXECUTED:
                    pipeline, name = entry["pipeline"], node["node"]
                    self._of_node.setdefault((pipeline, name), []).append(node["seconds"])
                    self._of_entry.setdefault((pipeline, name.partition("[")[0]), []).append(node["seconds"])
                    self._of_stage.setdefault(node.get("stage", ""), []).append(node["seconds"])

    def predict(self, pipeline: str, node: str, stage: str) -> float | None:
        """Return the seconds an execution is likely to take; None without a timing history."""
        alike = (pipeline, node.partition("[")[0])
        known = (self._of_node.get((pipeline, node)), self._of_entry.get(alike), self._of_stage.get(stage))
        return next((_recent(seconds) for seconds in known if seconds), None)


def _recent(seconds: Sequence[float]) -> float:
    last = sorted(seconds[-SAMPLES:])
    return (last[len(last) // 2] + last[(len(last) - 1) // 2]) / 2  # the import of statistics takes 5 ms
