"""The Python API of a pipeline (plan, run, artifact), on which the command line is built.

    from stagegraph import Pipeline

    with Pipeline("pipeline.yaml", {"size": "small"}) as pipeline:
        print(pipeline.plan().seconds)
        run = pipeline.run(pipeline.select(stage=["count"]))
        report = pipeline.artifact("count[english]").read_json("report.json")

A :class:`Pipeline` sees the files of the moment it first looks at them: open it again after an edit. Mistakes are
raised as :class:`~stagegraph.errors.PipelineError`; nothing is printed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from stagegraph.errors import PlanError
from stagegraph.project import Project, Selection
from stagegraph.store.journal import HIT

if TYPE_CHECKING:
    from pathlib import Path

    from stagegraph.execution.outcome import Run
    from stagegraph.execution.reporter import Reporter
    from stagegraph.query.artifact import Artifact
    from stagegraph.query.contents import Sweep
    from stagegraph.query.diff import Difference
    from stagegraph.query.explain import Explanation
    from stagegraph.query.forecast import Plan
    from stagegraph.query.history import PastRun
    from stagegraph.query.lineage import Lineage
    from stagegraph.query.reproduce import Reproduction


class Pipeline(Project):
    """An opened pipeline (:class:`~stagegraph.project.Project`) that answers questions and runs."""

    def plan(self, selection: Selection | None = None, *, force: bool = False, jobs: int = 0) -> Plan:
        """Return what :meth:`run` would do with this selection, and the time it would take; runs nothing."""
        from stagegraph.query.forecast import forecast

        return forecast(self, selection or self.select(), force=force, jobs=jobs)

    def artifacts(self, reference: str) -> list[Artifact]:
        """Return the artifacts that a reference names (:mod:`stagegraph.query.artifact`), without unbuilt instances."""
        from stagegraph.query.artifact import find_artifacts

        return find_artifacts(self, reference)

    def artifact(self, reference: str) -> Artifact:
        """Return the one artifact that a reference names."""
        found = self.artifacts(reference)
        if len(found) > 1:
            raise PlanError(f"'{reference}' means {', '.join(a.label for a in found)}: name one of them")
        return found[0]

    def export(
        self, reference: str, target: Path, *, replace: bool = False, unverified: bool = False
    ) -> tuple[Artifact, list[str], list[str]]:
        """Write the one artifact that a reference names to a directory, together with its attestations.

        Returns it, the names of the files, and what was said of it. :class:`PlanError` if what must be attested
        (:attr:`stagegraph.stage.Out.attests`) is not, or with a reservation, unless it may be ``unverified``.
        """
        from stagegraph.query.attest import attestations

        artifact = self.artifact(reference)
        found = attestations(self, artifact)
        if found.problems and not unverified:
            raise PlanError(*found.problems, "nothing was exported; --unverified exports it as it is")
        return artifact, artifact.export(target, replace=replace, beside=found.files), found.summaries

    def runs(self) -> list[PastRun]:
        """Return the recorded runs of this pipeline, oldest first; a run that had nothing to do is not recorded."""
        from stagegraph.query.history import past_runs

        return past_runs(self.workspace.journal, self.name)

    def diff(self, a: str, b: str) -> Difference:
        """Return how two artifacts differ."""
        from stagegraph.query.diff import difference

        return difference(self.artifact(a), self.artifact(b))

    def lineage(self, reference: str) -> Lineage:
        """Return where an artifact, or one file of it, comes from."""
        from stagegraph.query.lineage import lineage

        return lineage(self, self.artifact(reference))

    def gc(
        self, *, keep_runs: int = 10, max_size: int | None = None, dry_run: bool = False, agreed: Sweep | None = None
    ) -> Sweep:
        """Remove results older than the last runs, then the oldest until ``max_size`` bytes; never one in use.

        ``agreed``, which an earlier ``dry_run`` returned, limits it to what that would have removed.
        """
        from stagegraph.query.gc import collect
        from stagegraph.query.needs import needs

        return collect(
            self.workspace, needs(self), keep_runs=keep_runs, max_size=max_size, dry_run=dry_run, agreed=agreed
        )

    def explain(self, *patterns: str) -> list[Explanation]:
        """Say why each of these nodes would run, or would not."""
        from stagegraph.query.explain import explain

        return explain(self, [node for pattern in patterns for node in self.dag.select(pattern)])

    def run(
        self,
        selection: Selection | None = None,
        *,
        only: bool = False,
        force: bool = False,
        jobs: int = 0,
        fail_fast: bool = False,
        retries: int = 0,
        fetch_only: bool = False,
        executor: str = "",
        scheduler: str = "",
        reporter: Reporter | None = None,
        command: Sequence[str] = (),
        tag: str = "",
    ) -> Run:
        """Bring a selection up to date and return how each node ended; failures are outcomes, not exceptions.

        ``only`` refuses with :class:`PlanError` if anything but the chosen nodes would have to run; ``force`` runs the
        chosen nodes even if they are hits; ``jobs`` bounds how many run at once (0: one per processor); ``retries``
        is how often a failed node is tried again; ``fetch_only`` runs nothing, and takes what the user's remotes have;
        ``executor`` (``local`` or ``dask``) and ``scheduler`` (its address) say where nodes run, if not as configured;
        ``reporter`` is called as nodes start, progress and end; ``command`` is what the history of runs shows, where
        ``tag`` names this one.
        """
        from stagegraph.execution.executor import Options
        from stagegraph.execution.outcome import Run
        from stagegraph.execution.reporter import Reporter as Silent
        from stagegraph.execution.scheduler import Scheduler

        selection = selection or self.select()
        self.check_name()
        if executor or scheduler:  # what was asked for in so many words is to be right where nothing is left to do, too
            from stagegraph.remote.settings import load_settings

            load_settings(self.dag.pipeline.remotes).cluster(executor, scheduler)
        if only:
            self._refuse_others(selection)
        forced = frozenset(node.name for node in selection.chosen) if force else frozenset()
        options = Options(
            jobs, forced, fail_fast, retries, share=True, fetch_only=fetch_only, executor=executor, scheduler=scheduler
        )
        work = Scheduler(self.planner, self.workspace, reporter or Silent(), options)
        started, began = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), time.monotonic()
        ended = False
        try:
            work.run(selection.nodes)
            self.keep_name()
            ended = True
        finally:
            outcomes = tuple(work.outcomes.values())
            for outcome in outcomes:
                outcome.began = round(outcome.began - began, 3) if outcome.began else 0.0
            run = Run(outcomes, round(time.monotonic() - began, 3))
            if tag or any(outcome.reason for outcome in outcomes):  # else it had nothing to do, and is not recorded
                from stagegraph.query.history import journal_entry

                entry = journal_entry(self.name, run, started, command, interrupted=not ended, tag=tag)
                self.workspace.journal.append(entry)
        return Run(tuple(work.outcomes[node] for node in selection.nodes), run.seconds)

    def reproduce(self, selection: Selection, *, jobs: int = 0, reporter: Reporter | None = None) -> Reproduction:
        """Build results a second time, from scratch in another store, and return which of them differ."""
        from stagegraph.execution.reporter import Reporter as Silent
        from stagegraph.query.reproduce import reproduce

        return reproduce(self, selection.nodes, jobs=jobs, reporter=reporter or Silent())

    def _refuse_others(self, selection: Selection) -> None:
        """Under ``only`` every node that is needed but not chosen must be up to date."""
        stale = [d for d in self.planner.plan(selection.nodes) if d.node not in selection.chosen and d.status != HIT]
        if stale:
            advice = "--only does not run it; drop --only to bring it up to date"
            raise PlanError(*(f"{d.node.name} is {d.status.lower()} ({d.reason}) and {advice}" for d in stale))
