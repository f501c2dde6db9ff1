"""Executes a plan: brings a selection of nodes up to date with worker processes.

Life of one node, in the order of the code below:
1. wait until every upstream node has a record; if one failed, skip
2. decide: key -> record; a HIT is materialised and done, without a worker
3. take the key's lock (another run may hold it: wait), then look up again: that run may have done the work
4. run in a private work directory, in a worker of the stage's profile, within ``-j`` and the node's resources, here or
   in a cluster
5. check that no source changed meanwhile; adopt the outputs into the store; write the record: that is the commit
6. materialise; a failure keeps its work directory and log and is never served from the cache
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stagegraph.errors import PlanError
from stagegraph.execution.executor import Options
from stagegraph.execution.fetching import Fetching
from stagegraph.execution.outcome import Outcome, problem_of
from stagegraph.execution.places import Places
from stagegraph.execution.reporter import Reporter
from stagegraph.execution.results import Results
from stagegraph.execution.waiting import Waiting
from stagegraph.planning.planner import Decision, Planner
from stagegraph.store.journal import FAILED, HIT, SKIPPED
from stagegraph.store.objects import RottenError
from stagegraph.store.record import Record, record_files
from stagegraph.store.workspace import Workspace

if TYPE_CHECKING:
    from selectors import BaseSelector

    from stagegraph.execution.executor import Running, Slot
    from stagegraph.execution.messages import Failure, Succeeded
    from stagegraph.planning.dag import Node
    from stagegraph.remote.shared import Fetched
    from stagegraph.store.pins import Pin

LOCK_POLL_SECONDS = 0.1


@dataclass
class _Ready:
    decision: Decision
    waited_for: str = ""


class Scheduler:
    """Runs one selection of nodes once."""

    def __init__(self, planner: Planner, workspace: Workspace, reporter: Reporter, options: Options) -> None:
        self._planner = planner
        self._workspace = workspace
        self._reporter = reporter
        self._options = options
        self._places = Places(planner, workspace, options, reporter.waiting)
        self.outcomes: dict[Node, Outcome] = {}
        self._waiting = Waiting(planner.dag.nodes)
        self._fetching: Fetching[Decision] = Fetching(workspace, planner.dag.pipeline.remotes, enabled=options.share)
        self._results = Results(planner, workspace, self._fetching.give)
        self._ready: list[_Ready] = []  # as the nodes came out of what waits
        self._failed = False
        self._running: dict[Slot, Running] = {}
        self._attempts: dict[Node, int] = {}
        self._repeats: dict[Node, int] = {}  # of nodes whose worker was lost
        self._selector: BaseSelector | None = None
        self._pin: Pin | None = None
        self._remade: set[tuple[Node, str]] = set()
        self._late = False

    def run(self, nodes: Sequence[Node]) -> None:
        """Bring ``nodes`` (which include all they need, in topological order) up to date."""
        self._workspace.create()
        self._planner.prepare(nodes, fetch=True)
        for node in nodes:
            self._waiting.add(node)
        try:
            self._settle()
            self._late = bool(self._fetching)  # what a remote may have needs no memory here, until it turns out not to
            wait = () if self._late else self._waiting
            self._places.refuse([*(ready.decision.node for ready in self._ready), *wait])
            self._start_ready()
            while self._ready or self._running or self._waiting or self._fetching:
                fetched = self._await_events()
                with self._workspace.index.together():  # one commit for all that ended or began meanwhile
                    self._take_fetched(fetched)
                    self._take_events()
                    self._settle()
                    self._start_ready()
            self._fetching.finish(wait=True)
        except BaseException:
            self._abandon()
            raise
        finally:
            self._planner.save()
            if self._pin is not None:
                self._pin.release()
            self._places.stop()

    # -- 1, 2: settle whatever has its inputs ------------------------------------------------------------------------

    def _settle(self) -> None:
        with self._workspace.sharing(), self._workspace.index.together():
            self._settle_all()
            if (self._ready or self._fetching) and self._pin is None:
                self._claim()

    def _claim(self) -> None:
        """Claim the keys of this run, so that gc leaves them; only one that executes or fetches needs it."""
        from stagegraph.store.pins import Pin

        self._workspace.check_folders()
        self._pin = Pin(self._workspace.root)
        self._pin.add(outcome.key for outcome in self.outcomes.values() if outcome.record)

    def _settle_all(self) -> None:
        while (node := self._waiting.pop()) is not None:
            self._settle_node(node)

    def _settle_node(self, node: Node) -> None:
        broken = [u for u in node.upstream if self.outcomes[u].record is None]
        if broken:
            self._finish(Outcome(node, SKIPPED, f"{broken[0].name} {self.outcomes[broken[0]].status.lower()}"))
            return
        if self._stops(node):
            return
        decision = self._planner.decide(node, self._record_of)
        forced = node.name in self._options.force
        if (decision.status != HIT or forced) and self._planner.sweep():
            self._settle_again(node)
            return
        if decision.status == HIT and not forced:
            try:
                self._finish_hit(decision)
                return
            except RottenError:
                decision = self._planner.decide(node, self._record_of)
        if decision.status == HIT:
            decision.reasons = ["forced"]
        asks = not forced and not self._planner.prepared(node).secrets
        if not asks or not self._fetching.begin(decision.key, decision):
            self._enter(decision)

    def _settle_again(self, node: Node) -> None:
        """Let all that was settled, of which nothing has run, and ``node`` wait again: their keys have moved."""
        for settled in list(self.outcomes):
            del self.outcomes[settled]
            self._waiting.undo(settled)
        self._waiting.add(node)

    def _enter(self, decision: Decision) -> None:
        """Start a node when there is room for it."""
        if self._options.fetch_only:
            self._finish(Outcome(decision.node, SKIPPED, "no remote has its result", decision.key))
        elif not self._stops(decision.node):
            try:
                self._places.refuse([decision.node] if self._late else [])
            except PlanError as error:
                self._finish(_not_started(decision, *error.problems))
            else:
                self._make_ready(decision)

    def _stops(self, node: Node) -> bool:
        """Skip a node if an earlier one failed and no more are to start; return whether it was skipped."""
        stops = self._options.fail_fast and self._failed
        if stops:
            self._finish(Outcome(node, SKIPPED, "an earlier failure (--fail-fast)"))
        return stops

    def _make_ready(self, decision: Decision) -> None:
        insort(self._ready, _Ready(decision), key=lambda ready: self._waiting.place[ready.decision.node])

    def _take_fetched(self, ended: Sequence[tuple[Sequence[Decision], Fetched | None]]) -> None:
        for waiting, fetched in ended:
            with self._workspace.sharing():
                for decision in waiting:
                    if any(u not in self.outcomes for u in decision.node.upstream):  # its input is made again
                        self._waiting.add(decision.node)
                    elif fetched is None or not self._take(decision, fetched):
                        self._enter(decision)

    def _take(self, decision: Decision, fetched: Fetched) -> bool:
        """End a node with the result that another machine made; False where that cannot be."""
        with contextlib.suppress(OSError, RottenError):
            self._fetching.take(fetched)
            again = self._planner.decide(decision.node, self._record_of)
            if again.status == HIT:
                self._finish(self._results.hit(again, f"from remote '{fetched.remote}'", fetched.objects))
                return True
        return False

    def _finish_hit(self, decision: Decision, reason: str = "") -> None:
        self._finish(self._results.hit(decision, reason))

    def _record_of(self, node: Node) -> Record:
        record = self.outcomes[node].record
        assert record is not None
        return record

    # -- 3, 4: start what may run ------------------------------------------------------------------------------------

    def _start_ready(self) -> None:
        at = 0  # counted, as thousands may be ready of which an event lets one begin
        while at < len(self._ready) and not self._places.full(self._running.values()):
            ready = self._ready[at]
            decision = ready.decision
            if any(u not in self.outcomes for u in decision.node.upstream):  # its input is made again
                del self._ready[at]
                self._waiting.add(decision.node)
                continue
            try:
                lock = self._lock(ready) if self._places.has(decision.node, self._running.values()) else None
            except OSError as error:
                del self._ready[at]
                self._finish(_not_started(decision, problem_of(error)))
                continue
            if lock is None:
                at += 1
                continue
            del self._ready[at]
            if "forced" not in decision.reasons and (ready.waited_for or self._workspace.record(decision.key)):
                again = self._planner.decide(decision.node, self._record_of)
                if again.status == HIT:
                    os.close(lock)
                    try:
                        with self._workspace.sharing():
                            self._finish_hit(again, f"built by {ready.waited_for or 'another run'} meanwhile")
                    except RottenError:
                        self._waiting.add(decision.node)
                    continue
            self._start(decision, lock)

    def _lock(self, ready: _Ready) -> int | None:
        """Take the key's lock, or note its holder: another node of this run with the same key, or another run."""
        decision = ready.decision
        twins = [r.decision.node.name for r in self._running.values() if r.decision.key == decision.key]
        lock = None if twins else self._workspace.try_lock(decision.key)
        if lock is None and not ready.waited_for:
            ready.waited_for = twins[0] if twins else "another run"
            self._reporter.waiting(decision.node, f"{ready.waited_for}, which builds the same thing")
        return lock

    def _start(self, decision: Decision, lock: int) -> None:
        from selectors import EVENT_READ, DefaultSelector

        from stagegraph.execution.executor import Running, Task
        from stagegraph.execution.sandbox import Sandbox, layout_of

        workspace, node = self._workspace, decision.node
        if self._selector is None:  # the first execution of this run
            self._selector = DefaultSelector()
            workspace.sweep()
        sandbox, log, prepared, place = None, None, self._planner.prepared(node), self._places.of(node)
        fresh, parts = node.name in self._options.force, self._planner.part_codes(decision)
        try:
            sandbox = Sandbox.create(workspace, decision.key)
            log = sandbox.open_log(workspace.log_path(decision.key), prepared.secrets)
            layout = layout_of(node, {u: self._record_of(u) for u in node.upstream})
            slot = place.start(Task(decision, prepared, layout, sandbox, log, parts, fresh))
        except BaseException as error:
            if log is not None:
                log.close()
            if sandbox is not None:
                sandbox.remove(workspace)
            os.close(lock)
            if not isinstance(error, OSError | RottenError):
                raise
            if not (isinstance(error, RottenError) and self._remake(node, error.digest)):
                self._finish(_not_started(decision, problem_of(error)))
            return
        made_from = {port: [self.outcomes[u].key for u in nodes] for port, nodes in node.inputs.items()}
        running = self._running[slot] = Running(decision, place, slot, sandbox, made_from, lock, log)
        running.begin()
        self._selector.register(slot, EVENT_READ)
        workspace.set_last(self._planner.dag.pipeline.name, node.name, running=decision.key)
        self._reporter.started(node, decision.reason)

    def _remake(self, node: Node, digest: str) -> bool:
        """Settle a node again, and before it those above whose result has a damaged object; once for each object."""
        if (node, digest) in self._remade:
            return False
        self._remade.add((node, digest))
        broken = [u for u in node.upstream if digest in {d for d, _ in record_files(self._record_of(u)).values()}]
        for upstream in broken:
            del self.outcomes[upstream]
            self._waiting.undo(upstream)
        self._waiting.add(node)
        return True

    # -- 5, 6: events and ends ---------------------------------------------------------------------------------------

    def _await_events(self) -> Sequence[tuple[Sequence[Decision], Fetched | None]]:
        """Wait until something may have happened; return which results were fetched."""
        if fetched := list(self._fetching.ended(0.0 if self._running or self._ready else LOCK_POLL_SECONDS)):
            return fetched
        if self._running:
            assert self._selector is not None
            self._selector.select(LOCK_POLL_SECONDS)
        elif self._ready:
            time.sleep(LOCK_POLL_SECONDS)  # everything that is ready waits for another run's lock
        return []

    def _take_events(self) -> None:
        for slot, running in list(self._running.items()):  # all: a dead worker whose child keeps the pipe is silent
            for event in map(running.log.masked, slot.receive()):
                if event["event"] == "progress":
                    amount = event["done"], event["total"], event["unit"], event["note"]
                    self._reporter.progress(running.decision.node, *amount)
                elif event["event"] == "began":
                    self._begun(running, event["where"])
                elif event["event"] == "end":
                    self._release(running, keep_worker=not self._planner.prepared(running.decision.node).secrets)
                    self._end(running, event)
                    break
                else:
                    self._stop(running, event["meaning"])
        now = time.monotonic()
        for running in [r for r in self._running.values() if r.deadline and now > r.deadline]:
            self._stop(running, f"took longer than its timeout of {running.decision.node.spec.timeout:g} s")
        for slot, meaning in self._places.over(self._running.values()):
            self._stop(self._running[slot], meaning)

    def _begun(self, running: Running, where: str) -> None:
        """Note that a node begins on another machine, or begins again because that machine was lost."""
        node, lost = running.decision.node, running.where
        if lost:
            again = self._repeats[node] = self._repeats.get(node, 0) + 1
            self._reporter.retrying(node, f"worker {lost} was lost", again)
        running.begin(where)

    def _stop(self, running: Running, why: str) -> None:
        self._release(running, keep_worker=False)
        self._fail(running, [*self._changed(running), why], bug=False)

    def _release(self, running: Running, *, keep_worker: bool) -> None:
        assert self._selector is not None
        self._selector.unregister(running.slot)
        del self._running[running.slot]
        running.executor.release(running.slot, keep=keep_worker)
        running.log.close()

    def _end(self, running: Running, event: Succeeded | Failure) -> None:
        problems, bug = ([], False) if event["ok"] else (event["problems"], event["bug"])
        changed = self._changed(running) if event["ok"] or bug else []  # by which a stage may have been surprised
        if event["ok"] is False or changed:
            self._fail(running, [*changed, *problems], bug=bug and not changed)
            return
        try:
            with self._workspace.sharing():
                self._finish(self._results.commit(running, event))
        except (OSError, RottenError, sqlite3.OperationalError) as error:
            self._fail(running, [problem_of(error)], bug=False)

    def _changed(self, running: Running) -> list[str]:
        changed = self._planner.changed(running.decision)
        return [f"{name}: changed while it was being read; run again" for name in changed]

    def _fail(self, running: Running, problems: Sequence[str], *, bug: bool) -> None:
        decision = running.decision
        outcome = self._results.fail(running, problems, bug=bug)
        attempt = self._attempts[decision.node] = self._attempts.get(decision.node, 0) + 1
        if attempt <= self._options.retries:
            self._reporter.retrying(decision.node, problems[0], attempt)
            self._make_ready(decision)
            return
        self._finish(outcome)
        if self._options.fail_fast:
            for ready in self._ready:
                self._finish(Outcome(ready.decision.node, SKIPPED, f"{decision.node.name} failed (--fail-fast)"))
            self._ready.clear()

    def _finish(self, outcome: Outcome) -> None:
        self.outcomes[outcome.node] = outcome
        self._failed |= outcome.status == FAILED
        self._waiting.done(outcome.node)
        if self._pin is not None and outcome.record:
            self._pin.add([outcome.key])
        self._reporter.finished(outcome)

    def _abandon(self) -> None:
        """End everything at once; what is unfinished leaves nothing behind that a next run would trip over."""
        self._fetching.finish(wait=False)
        for running in list(self._running.values()):
            running.slot.kill()
            running.log.close()
            running.sandbox.remove(self._workspace)
            os.close(running.lock)
        self._running.clear()


def _not_started(decision: Decision, *problems: str) -> Outcome:
    return Outcome(decision.node, FAILED, decision.reason, decision.key, problems=problems)
