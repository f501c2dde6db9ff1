"""Artifacts (the stored results of nodes), and the references by which the command line names them.

A reference is ``NODE`` (its result as the pipeline stands; where there is none yet its last one, which is said),
``NODE@RUN`` (the first digits of a run's id, or ``~1`` for the run before the last), a key, or the digest of an output
or a file (the first six digits or more), each with ``:PATH`` for one file or folder in it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stagegraph.errors import PlanError, StoreError, listed, nearest, tell
from stagegraph.files import typed
from stagegraph.query.history import find_run, key_at, past_runs
from stagegraph.store.objects import RottenError
from stagegraph.store.record import Record, record_files, result_digest

if TYPE_CHECKING:
    from stagegraph.project import Project
    from stagegraph.stage import JsonObject
    from stagegraph.store.workspace import Workspace

DIGEST = re.compile(r"[0-9a-f]{6,64}")
REFERENCE = re.compile(r"(?P<node>[^@:\[\]]+(\[[^\]]*\])?)(@(?P<run>[^:]+))?(:(?P<path>.*))?")


@dataclass(frozen=True)
class Artifact:
    """The stored result of one execution, as it is now or as of a run; ``path`` narrows it to a file or folder in it.

    ``label`` is how it was asked for: the node's name, with the run where one was named, or the digits of a digest.
    """

    label: str
    record: Record
    workspace: Workspace
    path: str = ""

    @property
    def key(self) -> str:
        """The key of the execution."""
        return str(self.record["key"])

    @property
    def facts(self) -> JsonObject:
        """The small values its stage recorded."""
        return dict(self.record["facts"])

    @property
    def params(self) -> JsonObject:
        """The parameters by value, autos resolved; sources are under ``record["document"]["sources"]``."""
        return dict(self.record["document"]["params"])

    @property
    def views(self) -> list[str]:
        """The names of the pages its stage rendered."""
        return list(self.record["views"])

    @property
    def files(self) -> dict[str, tuple[str, int]]:
        """Every file at or below ``path``, views included: name -> (digest, size in bytes)."""
        files = record_files(self.record)
        within = f"{self.path.rstrip('/')}/"
        return {n: entry for n, entry in files.items() if not self.path or n == self.path or n.startswith(within)}

    def object(self, name: str) -> Path:
        """Return where the content of a file is, verified; the path is read-only and named by its digest."""
        if name not in self.files:
            raise PlanError(f"{self.label} has no file '{name}'{nearest(name, self.files)}")
        digest = self.files[name][0]
        wrong = self.workspace.store.verify(digest)
        if wrong:
            raise StoreError(f"{self.label}: {name} is {wrong} in the store; `pipeline run` rebuilds it")
        return self.workspace.store.path(digest)

    def read_text(self, name: str) -> str:
        """Return the content of a text file."""
        return self._content(name).decode()

    def read_json(self, name: str) -> Any:
        """Return the content of a JSON file."""
        return json.loads(self._content(name))

    def _content(self, name: str) -> bytes:
        self.object(name)
        try:
            return self.workspace.store.read(self.files[name][0])
        except RottenError:
            raise StoreError(f"{self.label}: {name} is damaged in the store; `pipeline run` rebuilds it") from None

    def view(self, name: str) -> str:
        """Return a page its stage rendered."""
        if name not in self.record["views"]:
            raise PlanError(f"{self.label} has no view '{name}'{nearest(name, self.record['views'])}")
        return self.read_text(f"views/{name}") if not self.path else self.whole.view(name)

    def export(self, target: Path, *, replace: bool = False, beside: Mapping[str, str] | None = None) -> list[str]:
        """Write real files to the directory ``target`` at once or not at all; return their names, views left out.

        A ``path`` that is a folder becomes the directory itself. Every copy is read back and compared with its digest.
        ``beside`` are files of other results that go with them, name in the artifact -> digest.
        """
        from stagegraph.query.export import export

        stored = {
            name: digest for name, (digest, _) in self.files.items() if self.path or not name.startswith("views/")
        }
        taken = sorted(stored.keys() & (beside or {}).keys())
        if taken:
            raise PlanError(f"{self.label}: {taken[0]} is in it and beside it; one of the two stages must name another")
        files = {self._name_exported(name): digest for name, digest in {**stored, **(beside or {})}.items()}

        def fetch(name: str) -> Path:
            digest = files[name]
            wrong = self.workspace.store.verify(digest)
            if wrong:
                raise StoreError(f"{self.label}: {name} is {wrong} in the store; `pipeline run` rebuilds it")
            return self.workspace.store.path(digest)

        return export(files, fetch, target, replace=replace, workspace=self.workspace)

    def _name_exported(self, name: str) -> str:
        path = self.path.rstrip("/")
        return Path(name).name if path in self.files else name.removeprefix(f"{path}/" if path else "")

    @property
    def whole(self) -> Artifact:
        """The artifact without its ``path``."""
        return Artifact(self.label, self.record, self.workspace)


def find_artifacts(project: Project, reference: str) -> list[Artifact]:
    """Return the artifacts that a reference names: the instances of a node, or the one result with a digest."""
    parts = REFERENCE.fullmatch(reference)
    if parts is None:
        raise PlanError(f"'{reference}' names nothing: expected NODE, NODE@RUN or a digest, with :PATH if need be")
    name, run, path = parts["node"], parts["run"], (parts["path"] or "").strip("/")
    known = {node.spec.entry for node in project.dag.nodes}
    if run is None and name.partition("[")[0] not in known and DIGEST.fullmatch(name):
        if project.varied:
            raise PlanError(f"{name} is a digest, whatever --set says; leave one of the two out")
        return [_narrowed(_by_digest(project.workspace, name), path)]
    found, missing = [], []
    for label, key, result in _keys(project, name, run):
        record = project.workspace.record(key, result) if key else None
        if record is None:
            missing.append(missing_text(project, label, key))
        else:
            found.append(_narrowed(Artifact(label, record, project.workspace), path))
    if missing and not found:
        raise PlanError(*missing)
    tell_behind(project, [artifact.label for artifact in found])
    return found


def tell_behind(project: Project, labels: Iterable[str]) -> None:
    """Say of which of these nodes the result is an earlier one, as they have none as the pipeline stands."""
    nodes = [project.dag.by_name[label] for label in labels if label in project.dag.by_name]
    why = {node.name: reason for node in nodes if not project.varied and (reason := project.behind(node))}
    if why:
        first, reason = next(iter(why.items()))
        taken = f"({reason}); the last result is taken; `pipeline explain {typed(first)}` says more"
        tell(f"note: not up to date: {listed(why)} {taken}")


def _keys(project: Project, name: str, run: str | None) -> Iterator[tuple[str, str | None, str]]:
    """Yield the label, key and result of each instance; without a key where it has none."""
    nodes = project.dag.select(name)
    if run is None:
        project.standing(nodes)
        for node in nodes:
            yield node.name, project.key(node), ""
        return
    if project.varied:
        raise PlanError(f"{name}@{run} is a past result, whatever --set says; leave one of the two out")
    runs = past_runs(project.workspace.journal, project.name)
    position = find_run(runs, run)
    for node in nodes:
        yield f"{node.name}@{runs[position].id[:8]}", *(key_at(runs, position, node.name) or (None, ""))


def missing_text(project: Project, label: str, key: str | None = None) -> str:
    """Return the message that a node, or a node as of a run, has no result, and what to do."""
    if project.varied:
        return f"{label} has no result with these settings; `pipeline run --stage {typed(label)}` with them makes it"
    if key:
        return f"{label}: its record is gone (`pipeline gc` removed it)"
    if "@" in label:
        return f"{label} had no result then"
    if "failed" in project.workspace.last(project.name, label):
        return f"{label} has no result, as it failed when it last ran; `pipeline log {typed(label)}` says why"
    return f"{label} has no result yet; `pipeline run --stage {typed(label)}` makes it"


def unbuilt(project: Project, reference: str, found: Sequence[Artifact]) -> list[str]:
    """Return the instances that a reference names and that have no result, those not among ``found``."""
    labels = {artifact.label for artifact in found}
    if not labels <= project.dag.by_name.keys():
        return []
    nodes = project.dag.select(reference.partition(":")[0])
    return [missing_text(project, node.name) for node in nodes if node.name not in labels]


def _narrowed(artifact: Artifact, path: str) -> Artifact:
    narrowed = Artifact(artifact.label, artifact.record, artifact.workspace, path or artifact.path)
    if not narrowed.files:
        raise PlanError(f"{artifact.label} has no file '{path}'{nearest(path, artifact.files)}")
    return narrowed


def _by_digest(workspace: Workspace, digits: str) -> Artifact:
    """Return the result whose key, output or file has a digest that begins with ``digits``; the newest of several."""
    keys = [name.removeprefix("rec:") for name in workspace.index.names(f"rec:{digits}")]
    if len(keys) > 1:
        raise PlanError(
            f"more than one key begins with {digits}: {', '.join(key[:16] for key in keys)}; give more digits"
        )
    record = workspace.record(keys[0]) if keys else None
    if record is not None:
        return Artifact(digits, record, workspace)
    others = [record for _, record in workspace.others()]
    for record in sorted([*workspace.records(), *others], key=lambda r: r["started"], reverse=True):
        if result_digest(record).startswith(digits):
            return Artifact(digits, record, workspace)
        for output in record["outputs"].values():
            if output["digest"].startswith(digits):
                return Artifact(digits, record, workspace, _common_folder(output["files"]))
        for name, (digest, _) in record_files(record).items():
            if digest.startswith(digits):
                return Artifact(digits, record, workspace, name)
    raise PlanError(f"nothing in the store has a key or a digest that begins with {digits}, and no node is named so")


def _common_folder(files: Mapping[str, object]) -> str:
    (*_, name) = files
    return name if len(files) == 1 else str(name.partition("/")[0])
