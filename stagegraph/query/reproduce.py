"""Builds nodes a second time, in a separate store and directories, and compares the results."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from stagegraph.execution.executor import Options
from stagegraph.execution.outcome import Outcome
from stagegraph.execution.reporter import Reporter
from stagegraph.execution.scheduler import Scheduler
from stagegraph.planning.planner import Planner
from stagegraph.query.artifact import Artifact
from stagegraph.query.diff import Difference, difference
from stagegraph.store.workspace import Workspace

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stagegraph.planning.dag import Node
    from stagegraph.project import Project
    from stagegraph.stage import JsonObject


@dataclass
class Reproduction:
    """The result of a second build: how many nodes are the same byte for byte, and how the others differ or failed.

    ``measured`` are those of stages that measure, which were run again and not compared.
    """

    same: int = 0
    measured: int = 0
    differing: list[Difference] = field(default_factory=list)
    failed: list[Outcome] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether all results are identical."""
        return not self.differing and not self.failed

    def document(self) -> JsonObject:
        """Return it as ``--json`` prints it."""
        failed = [{"node": outcome.node.name, "problems": list(outcome.problems)} for outcome in self.failed]
        return {
            "same": self.same,
            "measured": self.measured,
            "differing": [asdict(each) for each in self.differing],
            "failed": failed,
        }


def reproduce(project: Project, nodes: Sequence[Node], *, jobs: int = 0, reporter: Reporter) -> Reproduction:
    """Make ``nodes``, which include all they need and are up to date, again, and compare; what was made is removed.

    Nothing is reused, not even what is memoised or known of sources; what differs above a node is among what it read.
    """
    workspace, found = project.workspace, Reproduction()
    with workspace.scratch("reproduce") as folder:
        again = Workspace(folder / "artifacts")
        if any(project.planner.prepared(node).secrets for node in nodes):
            again.secret_key(like=workspace)
        try:
            scheduler = Scheduler(Planner(project.dag, again), again, reporter, Options(jobs=jobs))
            scheduler.run(nodes)
            for node in nodes:
                outcome = scheduler.outcomes[node]
                if outcome.record is None:
                    found.failed.append(outcome)
                    continue
                if node.stage.measures:
                    found.measured += 1
                    continue
                record = workspace.last_record(project.name, node.name)
                assert record is not None
                seen = difference(Artifact(node.name, record, workspace), Artifact("again", outcome.record, again))
                seen.rows = [row for row in seen.rows if row.kind != "cost"]
                found.same += seen.same
                found.differing += [] if seen.same else [seen]
        finally:
            again.close()
    return found
