"""Commits the end of a node: its record, its files under ``artifacts/``, its last key."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Container, Sequence
from typing import TYPE_CHECKING

from stagegraph.execution.outcome import Outcome, problem_of
from stagegraph.planning.planner import Decision, Planner
from stagegraph.store.journal import BUILT, FAILED, HIT, UNCHANGED
from stagegraph.store.record import Record, new_record, record_files, same_outputs
from stagegraph.store.workspace import Workspace

if TYPE_CHECKING:
    from stagegraph.execution.executor import Running
    from stagegraph.execution.messages import Succeeded

NOT_DETERMINISTIC = "made again from the same key, the result differs: the stage is not deterministic"


class Results:
    """Turns hits, finished executions and failures of a run into outcomes; ``give`` is called with each new record."""

    def __init__(self, planner: Planner, workspace: Workspace, give: Callable[[Record], None]) -> None:
        self._planner = planner
        self._workspace = workspace
        self._pipeline = planner.dag.pipeline.name
        self._give = give

    def hit(self, decision: Decision, reason: str = "", verified: Container[str] = ()) -> Outcome:
        """Show the result that a key has; :class:`~stagegraph.store.objects.RottenError` if an object is damaged.

        ``verified``: digests of objects that were read just now.
        """
        name = decision.node.name
        earlier = self._workspace.last(self._pipeline, name).get("key")
        outcome = Outcome(decision.node, HIT, reason, decision.key, decision.record)
        if decision.shown:
            self._workspace.set_last(self._pipeline, name, key=decision.key)
            restored = []
        else:
            restored = self._show(outcome, verified)
        if restored:
            more = f" and {len(restored) - 1} more" if len(restored) > 1 else ""
            outcome.reason = f"restored {restored[0]}{more}"
        elif earlier != decision.key and not reason:
            outcome.reason = "back to an earlier result" if earlier else "already in the store"
        return outcome

    def commit(self, running: Running, event: Succeeded) -> Outcome:
        """Adopt what a node made, write its record, and show it."""
        decision, workspace = running.decision, self._workspace
        workspace.store.damaged += event["damaged"]
        seconds = time.monotonic() - running.began
        made = (running.made_from, event, running.started_at, seconds)
        record = new_record(decision.node.stage.id, decision.key, decision.document or {}, *made)
        previous = decision.previous
        same = previous is not None and same_outputs(previous, record)
        if previous is not None and previous["key"] == decision.key and not same and not decision.node.stage.measures:
            record["warnings"].append(f"{NOT_DETERMINISTIC}; `pipeline show` names the earlier one, which is kept")
        for name, (digest, _) in record_files(record).items():
            workspace.store.adopt(f"{running.sandbox.out}/{name}", digest)
        if previous is not None and previous["key"] == decision.key and not same:
            workspace.keep_other(decision.key)
        workspace.index.set(f"rec:{decision.key}", record)
        self._planner.keep_code(decision)
        if not self._planner.prepared(decision.node).secrets:
            self._give(record)
        running.sandbox.remove(workspace)
        os.close(running.lock)
        reason = decision.reason
        if reason == "forced" and previous is not None:
            reason = "forced; the result is identical" if same else "forced; the result differs"
        kind = UNCHANGED if same else BUILT
        outcome = Outcome(decision.node, kind, reason, decision.key, record, record["seconds"], running.began)
        outcome.log, outcome.reasons = running.log.path, decision.reasons
        self._show(outcome, {digest for digest, _ in record_files(record).values()})
        return outcome

    def fail(self, running: Running, problems: Sequence[str], *, bug: bool) -> Outcome:
        """Move the outputs of a failed node aside, so that they can be inspected."""
        decision = running.decision
        failed_folder = running.sandbox.keep(self._workspace, self._pipeline, decision.node.name)
        os.close(running.lock)
        self._workspace.set_last(self._pipeline, decision.node.name, failed=decision.key)
        outcome = Outcome(decision.node, FAILED, decision.reason, decision.key, problems=tuple(problems))
        outcome.seconds, outcome.began = round(time.monotonic() - running.began, 3), running.began
        outcome.log, outcome.failed_outputs, outcome.bug, outcome.reasons = (
            running.log.path,
            failed_folder,
            bug,
            decision.reasons,
        )
        return outcome

    def _show(self, outcome: Outcome, verified: Container[str]) -> list[str]:
        """Materialise a result and remember it as the node's last; a full disk there fails the node, not the run."""
        assert outcome.record is not None
        name = outcome.node.name
        try:
            restored = self._workspace.materialise(self._pipeline, name, outcome.key, outcome.record, verified)
            self._workspace.set_last(self._pipeline, name, key=outcome.key)
        except (OSError, sqlite3.OperationalError) as error:
            outcome.status, outcome.record, outcome.problems = FAILED, None, (problem_of(error),)
            return []
        return restored
