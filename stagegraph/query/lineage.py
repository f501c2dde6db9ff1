"""Where an artifact comes from: the records walked back to the sources, parameters, code and tools that made it.

Records name the keys of what they were made from, so this tells what really happened, not what the pipeline says today.
"""

from __future__ import annotations

import graphlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from stagegraph.digest import digest_json
from stagegraph.store.record import Record, record_files

if TYPE_CHECKING:
    from stagegraph.planning.dag import Node
    from stagegraph.project import Project
    from stagegraph.query.artifact import Artifact
    from stagegraph.stage import Json, JsonObject


@dataclass
class Ancestor:
    """One execution that an artifact comes from, and the origins it read; ``record`` is None where it is gone."""

    label: str
    key: str
    record: Record | None
    before: list[Ancestor] = field(default_factory=list)

    def document(self) -> JsonObject:
        """Return the execution as ``--json`` prints it."""
        found: dict[str, Json] = {"label": self.label, "key": self.key, "from": [origin.key for origin in self.before]}
        if self.record is None:
            return found | {"gone": True}
        key = self.record["document"]
        code = {"digest": digest_json(key["code"]), "modules": key["code"]}
        outputs = {port: output["digest"] for port, output in self.record["outputs"].items()}
        made = {name: self.record[name] for name in ("stage", "started", "seconds", "host")}
        same = {name: key[name] for name in ("version", "params", "sources", "tools")}
        same["libraries"] = key.get("libraries", {})
        return found | made | same | {"code": code, "outputs": outputs}


@dataclass
class Lineage:
    """An artifact's files and the executions behind them, nearest first."""

    artifact: Artifact
    origins: list[Ancestor]
    copied: dict[str, str]  # file of the artifact -> ``label:file`` of the execution that made the same bytes

    def document(self) -> JsonObject:
        """Return the lineage as ``--json`` prints it."""
        return {
            "label": self.artifact.label,
            "path": self.artifact.path,
            "files": {name: digest for name, (digest, _) in self.artifact.files.items()},
            "copied": self.copied,
            "executions": [origin.document() for origin in self.origins],
        }


def lineage(project: Project, artifact: Artifact) -> Lineage:
    """Walk back from an artifact; from a single file that another execution made, only along that one."""
    walker = _Walker(project)
    label = artifact.label.partition("@")[0]
    node = project.dag.by_name.get(label)
    last = walker.origin(artifact.key, label if node else artifact.record["stage"], node)
    made = walker.makers(last, artifact)
    if artifact.path in made and len(artifact.files) == 1:
        origin, name = made[artifact.path]
        return Lineage(artifact, list(_nearest_first([origin])), {artifact.path: f"{origin.label}:{name}"})
    copied = {file: f"{origin.label}:{name}" for file, (origin, name) in made.items()}
    return Lineage(artifact, list(_nearest_first([last])), copied)


class _Walker:
    def __init__(self, project: Project) -> None:
        self._workspace = project.workspace
        self._seen: dict[str, Ancestor] = {}

    def origin(self, key: str, label: str, node: Node | None) -> Ancestor:
        """Return the execution of a key with all before it; ``node`` names those that the pipeline still has."""
        last = self._seen[key] = Ancestor(label, key, self._workspace.record(key))
        queue = [(last, node)]
        while queue:
            origin, node = queue.pop()
            before: dict[str, Ancestor] = {}
            for other, each in _made_from(origin.record, node):
                if other not in self._seen:
                    self._seen[other] = self._named(other, each)
                    queue.append((self._seen[other], each))
                before[other] = self._seen[other]
            origin.before = list(before.values())
        return last

    def _named(self, key: str, node: Node | None) -> Ancestor:
        """Return an execution by the name of the node that it was of, if the pipeline has that, else of its stage."""
        record = self._workspace.record(key)
        label = node.name if node else f"{record['stage']} {key[:8]}" if record else key[:8]
        return Ancestor(label, key, record)

    def makers(self, last: Ancestor, artifact: Artifact) -> dict[str, tuple[Ancestor, str]]:
        """Return, for each file that an execution before the last made with the same bytes, the first one that did."""
        made: dict[str, tuple[Ancestor, str]] = {}
        for origin in _nearest_first(last.before):  # the farthest comes last and wins: the others copied it
            for name, (digest, _) in record_files(origin.record).items() if origin.record else ():
                made[digest] = (origin, name)
        return {n: made[digest] for n, (digest, _) in artifact.files.items() if digest in made}


def _made_from(record: Record | None, node: Node | None) -> Iterator[tuple[str, Node | None]]:
    """Yield the keys of what an execution read, each with the node that it was of, where the pipeline tells."""
    for port, keys in record.get("made_from", {}).items() if record else ():
        upstream = node.inputs.get(port, []) if node else []
        yield from zip(keys, upstream if len(upstream) == len(keys) else [None] * len(keys), strict=True)


def _nearest_first(origins: list[Ancestor]) -> Iterator[Ancestor]:
    """Yield each execution once, after all that read it."""
    found = {origin.key: origin for origin in origins}
    queue = list(origins)
    while queue:
        for before in queue.pop().before:
            if before.key not in found:
                found[before.key] = before
                queue.append(before)
    order = graphlib.TopologicalSorter({key: [b.key for b in origin.before] for key, origin in found.items()})
    yield from reversed([found[key] for key in order.static_order()])


def sources(found: Lineage) -> Mapping[str, str]:
    """Return every source file behind it: ``parameter: file`` -> digest."""
    return {
        f"{parameter}: {name}": digest
        for origin in found.origins
        if origin.record
        for parameter, files in origin.record["document"]["sources"].items()
        for name, digest in files.items()
    }
