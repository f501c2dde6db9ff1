"""Collects the documents that ``compare`` shows of a result: its own, and those of stages that read it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from stagegraph.errors import PlanError
from stagegraph.files import dotted
from stagegraph.query.artifact import Artifact
from stagegraph.registry import find, names

if TYPE_CHECKING:
    from stagegraph.planning.dag import Node
    from stagegraph.project import Project
    from stagegraph.registry import Comparison
    from stagegraph.stage import JsonObject
    from stagegraph.store.record import Record


def comparison(artifacts: Mapping[str, Artifact]) -> Comparison:
    """Return how results, by label, are compared; :class:`PlanError` unless all are of one kind with a comparison."""
    stages = {label: artifact.record["stage"] for label, artifact in artifacts.items()}
    found: Comparison | None = find("comparisons", next(iter(stages.values())))
    if found is None or len(set(stages.values())) > 1:
        mixture = ", ".join(f"{label} of {stage}" for label, stage in stages.items())
        raise PlanError(
            f"only results of one stage can be compared, of {' or '.join(names('comparisons'))}; found {mixture}"
        )
    return found


def documents(project: Project, artifact: Artifact, how: Comparison) -> JsonObject:
    """Return the documents of a result by name, those of later stages where there are any."""
    found = {}
    for stage, files in how.files.items():
        if stage == artifact.record["stage"]:
            found.update({name: artifact.whole.read_json(name) for name in files})
        elif (record := _reader(project, artifact, stage)) is not None:
            reader = Artifact(stage, record, project.workspace)
            found.update({name: reader.read_json(name) for name in files})
        else:
            found.update(_of_failure(project, artifact, stage, files))
    return found


def _reader(project: Project, artifact: Artifact, stage: str) -> Record | None:
    """Return the result of a stage that read exactly this: the last of a node that reads it, else the newest."""
    for node in _readers(project, artifact, stage):
        key = project.key(node)
        record = project.workspace.record(key) if key else None
        if record is not None and _has_read(record["document"], artifact):
            return record
    found = [r for r in project.workspace.records() if r["stage"] == stage and _has_read(r["document"], artifact)]
    return max(found, key=lambda record: str(record["started"]), default=None)


def _of_failure(project: Project, artifact: Artifact, stage: str, files: Sequence[str]) -> JsonObject:
    """Return what a stage wrote before it failed on exactly this: a refusal has its figures too."""
    workspace = project.workspace
    for node in _readers(project, artifact, stage):
        failed = workspace.last(project.name, node.name).get("failed")
        if not failed:
            continue
        needed = project.dag.above([node])
        decision = project.planner.plan([each for each in project.dag.nodes if each in needed])[-1]
        if decision.key == failed and decision.document and _has_read(decision.document, artifact):
            folder = workspace.failed / project.name / dotted(node.name) / "out"
            return {name: json.loads((folder / name).read_bytes()) for name in files if (folder / name).is_file()}
    return {}


def _readers(project: Project, artifact: Artifact, stage: str) -> Iterator[Node]:
    """Yield the nodes of a stage that read this result as the pipeline stands."""
    node = project.dag.by_name.get(artifact.label)
    for other in project.dag.nodes if node else ():
        if other.stage.id == stage and any(node in upstream for upstream in other.inputs.values()):
            yield other


def _has_read(document: JsonObject, artifact: Artifact) -> bool:
    """Say whether an execution whose key ``document`` is of read an output of this result."""
    made = {output["digest"] for output in artifact.record["outputs"].values()}
    for read in document["inputs"].values():
        if not made.isdisjoint([read] if isinstance(read, str) else [digest for _, digest in read or ()]):
            return True
    return False
