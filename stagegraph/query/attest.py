"""Attestations: files in which later stages state whether an artifact may be exported.

A stage declares such a file with :attr:`stagegraph.stage.Out.attests`. It counts for exactly the content that its
execution read, whatever the nodes are called.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

from stagegraph.files import typed
from stagegraph.registry import get_stage, names
from stagegraph.stage import RESERVATION

if TYPE_CHECKING:
    from stagegraph.planning.dag import Node
    from stagegraph.project import Project
    from stagegraph.query.artifact import Artifact
    from stagegraph.stage import Stage
    from stagegraph.store.record import Record


class Attestor(NamedTuple):
    """A stage that attests an output: the port that reads the output, and the port of the file that it writes."""

    stage: str
    reads: str
    writes: str


class Attestations(NamedTuple):
    """Files to export beside an artifact (name -> digest), the nodes that attest it, and objections to its export."""

    files: dict[str, str]
    summaries: list[str]
    problems: list[str]


def attestations(project: Project, artifact: Artifact) -> Attestations:
    """Return the attestations for those outputs that an artifact contains whole."""
    found = Attestations({}, [], [])
    stages = {name: get_stage(name) for name in names("stages")} | {n.stage.id: n.stage for n in project.dag.nodes}
    made_by = artifact.record["stage"]
    for port, output in artifact.record["outputs"].items():
        # A result may be of a stage, or of a form of it, that there is no more.
        out = stages[made_by].outputs.get(port) if made_by in stages else None
        if out is None or not PurePosixPath(out.path).is_relative_to(artifact.path):
            continue
        folder = PurePosixPath(out.path).parent if out.path in output["files"] else PurePosixPath(out.path)
        for attestor in _attestors(stages, made_by, port):
            _ask(project, artifact, output["digest"], folder, attestor, found)
    return found


def _attestors(stages: Mapping[str, Stage], stage: str, port: str) -> Iterator[Attestor]:
    for name, other in stages.items():
        for written, out in other.outputs.items():
            if out.attests and other.inputs[out.attests][:2] == (stage, port):
                yield Attestor(name, out.attests, written)


def _ask(
    project: Project,
    artifact: Artifact,
    digest: str,
    folder: PurePosixPath,
    attestor: Attestor,
    found: Attestations,
) -> None:
    """Add what is attested of the output with this digest, which lies in a folder of the artifact."""
    nodes = [n for n in project.dag.nodes if n.stage.id == attestor.stage and _feeds(artifact.label, n, attestor)]
    records = [(node.name, *_of_node(project, node, attestor, digest)) for node in nodes]
    if not nodes:  # an earlier result, or one of a pipeline that asks nobody
        record = _newest(project, attestor, digest)
        why = "" if record else f"no {attestor.stage} of this content has passed; add one to the pipeline and run it"
        records = [(attestor.stage, record, why)]
    summaries, problems = [], []
    for name, record, missing in records:
        if record is not None:
            summaries.append(f"{name}: {record['summary']}")
            files = record["outputs"][attestor.writes]["files"]
            found.files.update({str(folder / PurePosixPath(path).name): entry[0] for path, entry in files.items()})
        reservation: str = record["facts"].get(RESERVATION, "") if record else missing
        if reservation:
            problems.append(f"{artifact.label}: {name}: {reservation}")
    # A stage that attests by several files says it once.
    found.summaries.extend(text for text in summaries if text not in found.summaries)
    found.problems.extend(text for text in problems if text not in found.problems)


def _feeds(label: str, node: Node, attestor: Attestor) -> bool:
    return any(upstream.name == label for upstream in node.inputs.get(attestor.reads, ()))


def _of_node(project: Project, node: Node, attestor: Attestor, digest: str) -> tuple[Record | None, str]:
    """Return the record by which a node attests a digest, or why there is none."""
    if project.failed(node):
        return None, f"it failed when it ran last: `pipeline log {typed(node.name)}` has why"
    key = project.key(node)
    record = project.workspace.record(key) if key else None
    if record is None or not _reads(record, attestor, digest):
        return None, f"it has not passed yet: `pipeline run --stage {typed(node.name)}`"
    return record, ""


def _newest(project: Project, attestor: Attestor, digest: str) -> Record | None:
    records = [r for r in project.workspace.records() if r["stage"] == attestor.stage and _reads(r, attestor, digest)]
    return max(records, key=lambda record: str(record["started"]), default=None)


def _reads(record: Record, attestor: Attestor, digest: str) -> bool:
    read: Any = record["document"]["inputs"].get(attestor.reads)
    return bool(read == digest) if isinstance(read, str) else any(each == digest for _, each in read or ())
