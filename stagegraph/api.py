"""A pipeline from Python, with the nouns of the command line, which is built on it: select, plan, run.

    from stagegraph import Pipeline

    with Pipeline("pipeline.yaml", {"scheme": "q0f32"}) as pipeline:
        print(pipeline.plan().seconds)
        run = pipeline.run(stage=["quantize"])

A :class:`Pipeline` sees the files of the moment it first looks at them: open it again after an edit. Mistakes are
raised as :class:`~stagegraph.errors.PipelineError`; nothing is printed.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from stagegraph.dag import Dag, Node
from stagegraph.errors import PlanError
from stagegraph.plan import HIT, Planner
from stagegraph.spec import load
from stagegraph.workspace import Workspace

if TYPE_CHECKING:
    from stagegraph.forecast import Plan
    from stagegraph.scheduler import Outcome, Reporter


@dataclass(frozen=True)
class Selection:
    """Nodes that were asked for by name, and those together with all they need, in topological order."""

    chosen: frozenset[Node]
    nodes: tuple[Node, ...]


@dataclass(frozen=True)
class Run:
    """A finished run: how each node ended, in topological order, and the wall time in seconds."""

    outcomes: tuple[Outcome, ...]
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether every node has a result."""
        return all(outcome.record is not None for outcome in self.outcomes)


class Pipeline:
    """A pipeline file with the ``artifacts/`` beside it.

    ``overrides`` are variables for this object only: a mapping of names to values, or ``vars.NAME=VALUE`` texts.
    """

    def __init__(self, file: str | Path = "pipeline.yaml", overrides: Mapping[str, Any] | Sequence[str] = ()) -> None:
        spec = load(Path(file), _settings(overrides) if isinstance(overrides, Mapping) else overrides)
        self.dag = Dag(spec)
        self.workspace = Workspace(spec.root / "artifacts")
        self.planner = Planner(self.dag, self.workspace)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the store; a Pipeline used in ``with`` does so itself."""
        self.workspace.close()

    @property
    def name(self) -> str:
        """The pipeline's name, under which ``artifacts/`` shows its outputs."""
        return self.dag.pipeline.name

    @property
    def nodes(self) -> list[str]:
        """The names of all nodes in topological order."""
        return [node.name for node in self.dag.nodes]

    def select(self, *, stage: Sequence[str] = (), start: Sequence[str] = (), until: Sequence[str] = ()) -> Selection:
        """Select nodes by name or pattern (``graph-build[*,decode]``; a bare name means all instances).

        ``stage`` takes the nodes themselves, ``start`` them and everything below, ``until`` keeps of all that only
        what lies at or above its nodes. Without any, everything is selected.
        """
        problems: list[str] = []

        def found(patterns: Sequence[str]) -> list[Node]:
            nodes: list[Node] = []
            for pattern in patterns:
                try:
                    nodes += self.dag.select(pattern)
                except PlanError as error:
                    problems.extend(error.problems)
            return nodes

        chosen = set(found(stage)) | self.dag.below(found(start)) if stage or start else set(self.dag.nodes)
        if until:
            chosen &= self.dag.above(found(until))
        if problems:
            raise PlanError(*dict.fromkeys(problems))
        if not chosen:
            raise PlanError("nothing is selected: no node of the one selection lies above the other (--until)")
        needed = self.dag.above(chosen)
        return Selection(frozenset(chosen), tuple(node for node in self.dag.nodes if node in needed))

    def plan(self, selection: Selection | None = None, *, force: bool = False, jobs: int = 0) -> Plan:
        """Say what :meth:`run` would do with this selection, and what that takes; runs nothing."""
        from stagegraph.forecast import forecast

        return forecast(self, selection or self.select(), force=force, jobs=jobs)

    def run(
        self,
        selection: Selection | None = None,
        *,
        only: bool = False,
        force: bool = False,
        jobs: int = 0,
        fail_fast: bool = False,
        retries: int = 0,
        reporter: Reporter | None = None,
        command: Sequence[str] = (),
    ) -> Run:
        """Bring a selection up to date and return how each node ended; failures are outcomes, not exceptions.

        ``only`` refuses with :class:`PlanError` if anything but the chosen nodes would have to run; ``force`` runs the
        chosen nodes even if they are hits; ``jobs`` bounds how many run at once (0: one per processor); ``retries``
        is how often a failed node is tried again; ``reporter`` is called as nodes start, progress and end; ``command``
        is what the history of runs shows.
        """
        from stagegraph.scheduler import Options, Scheduler
        from stagegraph.scheduler import Reporter as Silent

        selection = selection or self.select()
        if only:
            self._refuse_others(selection)
        forced = frozenset(node.name for node in selection.chosen) if force else frozenset()
        options = Options(jobs=jobs, force=forced, fail_fast=fail_fast, retries=retries)
        scheduler = Scheduler(self.planner, self.workspace, reporter or Silent(), options)
        started, began = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), time.monotonic()
        ended = False
        try:
            scheduler.run(selection.nodes)
            ended = True
        finally:
            outcomes = tuple(scheduler.outcomes.values())
            run = Run(outcomes, round(time.monotonic() - began, 3))
            if any(outcome.reason for outcome in outcomes):  # a run that found everything in place leaves no trace
                from stagegraph.history import journal_entry

                entry = journal_entry(self.name, run, started, command, interrupted=not ended)
                self.workspace.journal.append(entry)
        return Run(tuple(scheduler.outcomes[node] for node in selection.nodes), run.seconds)

    def _refuse_others(self, selection: Selection) -> None:
        """Under ``only`` every node that is needed but not chosen must be up to date."""
        stale = [d for d in self.planner.plan(selection.nodes) if d.node not in selection.chosen and d.status != HIT]
        if stale:
            advice = "--only does not run it; drop --only to bring it up to date"
            raise PlanError(*(f"{d.node.name} is {d.status.lower()} ({d.reason}) and {advice}" for d in stale))


def _settings(overrides: Mapping[str, Any]) -> list[str]:
    import json

    return [f"vars.{name}={json.dumps(value)}" for name, value in overrides.items()]
