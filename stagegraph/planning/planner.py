"""Decides which nodes must run and why: computes their keys and looks the results up.

``Planner.prepare`` resolves what can be known before anything runs (autos, sources, tools) and reports every
problem at once. ``Planner.decide`` then settles one node whose inputs are settled; ``run``, ``--dry-run`` and
``status`` all go through it, so an explanation cannot drift from what is done.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from stagegraph.digest import digest_json
from stagegraph.errors import PipelineError, PlanError, StageError, listed, nearest
from stagegraph.local import failure, plain
from stagegraph.planning.code import CodeDigests
from stagegraph.planning.key import key_document, names_of, secrets_of
from stagegraph.planning.sources import MARK, Sources, SourceState
from stagegraph.registry import OWN, find, names
from stagegraph.stage import Source
from stagegraph.store.journal import HIT
from stagegraph.store.record import Document, Record, key_of

if TYPE_CHECKING:
    from stagegraph.planning.dag import Dag, Node
    from stagegraph.spec.model import Place
    from stagegraph.stage import Json, Stage
    from stagegraph.store.memo import PartCode
    from stagegraph.store.workspace import Workspace

T = TypeVar("T")
Rows = Mapping[str, str | Sequence[str]]  # table -> the rows of it that a node uses
FEW = 4  # nodes of which what is known is asked one by one
STALE, NEVER, UNKNOWN = "STALE", "NEVER", "UNKNOWN"


@dataclass
class Prepared:
    """The facts about a node that are fixed before anything runs."""

    params: Any
    sources: dict[str, SourceState]
    tools: dict[str, str]
    secrets: tuple[str, ...] = ()


@dataclass
class Decision:
    """A settled node: its key and, on a HIT, its record; otherwise the reasons why it must run.

    ``previous`` is the result to compare with: that of the same key, else the last one of the node. ``shown`` says that
    the node's directory shows the result already.
    """

    node: Node
    status: str
    reasons: list[str]
    key: str = ""
    document: Document | None = None
    record: Record | None = None
    previous: Record | None = None
    rows: Rows = field(default_factory=dict)
    shown: bool = False

    @property
    def reason(self) -> str:
        """The first reason, and how many more there are."""
        more = f" (+{len(self.reasons) - 1} more)" if len(self.reasons) > 1 else ""
        return f"{self.reasons[0]}{more}" if self.reasons else ""


class _SourceError(Exception):
    """Missing sources of a node: for each the place in the file, the problem and the parameter."""

    def __init__(self, found: Sequence[tuple[Place, str, str]]) -> None:
        super().__init__()
        self.found = found


class Planner:
    """Settles nodes of one pipeline against one workspace."""

    def __init__(self, dag: Dag, workspace: Workspace) -> None:
        self.dag = dag
        self.workspace = workspace
        self.sources = Sources(workspace.index)
        self._code = CodeDigests(workspace.index, dag.pipeline.root)
        self._prepared: dict[Node, Prepared] = {}
        self._codes: dict[tuple[str, str, str], dict[str, str]] = {}
        self._imported: dict[tuple[str, str, str], dict[str, str]] = {}
        self._stored_codes: set[str] = set()

    def prepare(self, nodes: Iterable[Node], *, fetch: bool = False) -> None:
        """Resolve autos, digest sources and collect tool versions of ``nodes``; all problems in one PlanError.

        Only if ``fetch``, a source that is named by a URL and not here is fetched.
        """
        problems: list[str] = []
        missing: dict[tuple[Place, str], list[str]] = {}
        nodes = [node for node in nodes if node not in self._prepared]
        if len(nodes) > FEW:
            self.workspace.read_ahead(self.dag.pipeline.name)
        for node in nodes:
            if node not in self._prepared:
                try:
                    self._prepared[node] = self._prepare(node, fetch=fetch)
                except _SourceError as error:
                    for place, text, subject in error.found:
                        missing.setdefault((place, text), []).append(subject)
                except (PlanError, StageError) as error:
                    problems += error.problems
        for (place, text), subjects in missing.items():
            problems.append(f"{place}: {listed(subjects)}: {text}")
        if problems:
            raise PlanError(*dict.fromkeys(problems))

    def _prepare(self, node: Node, *, fetch: bool) -> Prepared:
        spec = node.spec
        given = spec.params
        secrets = secrets_of(given)
        if any(MARK in path for path in _source_paths(given)):
            from stagegraph.planning.urls import with_local_sources  # few pipelines have one

            given = with_local_sources(spec, self.workspace.index, fetch=fetch)
        try:
            params = _asked(node, lambda: node.stage.resolve(given))
            tools = dict(_asked(node, lambda: node.stage.tools(params)))
        except StageError as error:
            located = [f"{spec.place}: {spec.entry}: {problem}" for problem in error.problems]
            raise PlanError(*_masked(secrets, located)) from None
        if secrets:
            from stagegraph.planning.secrets import spread

            params, tools = spread(params, secrets), _masked(secrets, tools)
            secrets = secrets_of(params)
        sources = {}
        problems: list[tuple[Place, str, str]] = []
        for f in dataclasses.fields(params):
            path = getattr(params, f.name)
            if "include" not in f.metadata and "Source" in str(f.type):
                raise PlanError(
                    f"stage '{node.stage.id}': declare '{f.name}' with source(), or its content is not seen"
                )
            if "include" in f.metadata and path:
                try:
                    sources[f.name] = self.sources.state(path, f.metadata["include"], f.metadata["alone"])
                except OSError as error:
                    gone = isinstance(error, FileNotFoundError)
                    text = (
                        f"there is no file or directory {path}{_offer(path)}"
                        if gone
                        else f"{error.filename or path}: {error.strerror}"
                    )
                    problems.append((spec.places.get(f.name, spec.place), text, f"{spec.entry}.{f.name}"))
        if problems:
            raise _SourceError(problems)
        return Prepared(params, sources, tools, tuple(secrets))

    def prepared(self, node: Node) -> Prepared:
        """Return what :meth:`prepare` found for a node."""
        return self._prepared[node]

    def decide(self, node: Node, records: Callable[[Node], Record]) -> Decision:
        """Settle a node whose upstream nodes all have records."""
        prepared = self._prepared[node]
        inputs: dict[str, list[Any]] = {}
        facts: dict[str, Json] = {}
        for port, upstream in node.inputs.items():
            for u in upstream:
                record = records(u)
                inputs.setdefault(port, []).append(
                    (u.spec.each, record["outputs"][node.stage.inputs[port].port]["digest"])
                )
                facts |= record["facts"]
        rows_by_table = _asked(node, lambda: node.stage.rows(prepared.params, facts))
        rows = {plain(table): chosen for table, chosen in rows_by_table.items()}
        code_id = node.spec.origin.module, node.stage.id, repr(sorted(rows.items())) if rows else ""
        code = self._code_of(node, rows, code_id)
        if code_id not in self._imported:
            self._imported[code_id] = libraries_of(self._code, code_id[0], node.stage, rows)
        document = key_document(
            node.stage,
            self._hashed(prepared),
            prepared.sources,
            inputs,
            code,
            prepared.tools,
            self._imported[code_id],
        )
        decision = self._look_up(node, key_of(document))
        decision.document, decision.rows = document, rows
        if decision.status != HIT and not decision.reasons:
            decision.reasons = self._why(decision)
        return decision

    def _hashed(self, prepared: Prepared) -> Any:
        """Return the parameters as they enter the key: secrets by a digest that only this store can make."""
        if not prepared.secrets:
            return prepared.params
        from stagegraph.planning.secrets import sealed
        from stagegraph.store.secret_key import mac

        key = self.workspace.secret_key()
        return sealed(prepared.params, lambda secret: mac(key, secret))

    def _code_of(self, node: Node, rows: Rows, code_id: tuple[str, str, str]) -> dict[str, str]:
        """Return all the code that a node runs: what its stage reaches, and what prepares its worker."""
        if code_id in self._codes:
            return self._codes[code_id]
        code = code_of(self._code, node.spec.origin.module, node.stage, rows)
        for kind, module in _parts(node.stage).items():
            if module not in code:
                raise PlanError(
                    f"stage '{node.stage.id}': {module} makes its parts '{kind}', but it uses no such module"
                )
        self._codes[code_id] = code
        return code

    def _look_up(self, node: Node, key: str) -> Decision:
        workspace = self.workspace
        pipeline = self.dag.pipeline.name
        shown = workspace.shown_record(pipeline, node.name, key)
        if shown is not None:
            return Decision(node, HIT, [], key, record=shown, previous=shown, shown=True)
        record = workspace.record(key)
        if record is None:
            previous = workspace.last_record(pipeline, node.name)
            damaged = ["its record was damaged"] if workspace.is_damaged(key) else []
            return Decision(node, STALE if previous or damaged else NEVER, damaged, key, previous=previous)
        lost = workspace.lost_files(pipeline, node.name, record)
        if lost:
            return Decision(node, STALE, lost, key, previous=record)
        return Decision(node, HIT, [], key, record=record, previous=record)

    def _why(self, decision: Decision) -> list[str]:
        if decision.previous is None:
            return ["never built"]
        from stagegraph.planning.changes import changes

        assert decision.document is not None
        found = changes(decision.previous["document"], decision.document)
        return [change.text for change in found] or ["its record is gone"]

    def part_codes(self, decision: Decision) -> dict[str, PartCode]:
        """Return the code that makes the memoised parts of a settled node, by kind of part."""
        return part_codes(self._code, decision.node.stage, decision.rows)

    def changed(self, decision: Decision) -> list[str]:
        """Return the source files and modules that have changed since the key was computed."""
        assert decision.document is not None
        sources = self._prepared[decision.node].sources.values()
        files = [str(state.root / name) for state in sources for name in state.changed()]
        modules = (decision.node.spec.origin.module, *worker_module(decision.node.stage))
        libraries = self._code.changed_libraries(modules, decision.rows)
        return files + self._code.changed(decision.document["code"]) + libraries

    def keep_code(self, decision: Decision) -> None:
        """Store the source texts behind a result, so that a later explanation can name the functions that changed."""
        from stagegraph.planning.definitions import keep

        assert decision.document is not None
        code = {name: d for name, d in decision.document["code"].items() if d not in self._stored_codes}
        self._stored_codes.update(code.values())
        keep(self.workspace.index, code, self._code.files(code))

    def own_files(self, decision: Decision) -> dict[str, Path]:
        """Return the files of the pipeline's folder that a settled node reaches, by their path in it."""
        assert decision.document is not None
        paths = self._code.own_files(decision.document["code"])
        return {path.relative_to(self.dag.pipeline.root).as_posix(): path for path in paths}

    def code_files(self, decision: Decision) -> dict[str, Path]:
        """Return the files of the modules that a settled node reaches."""
        return self._code.files(decision.document["code"]) if decision.document else {}

    def plan(self, nodes: Iterable[Node]) -> list[Decision]:
        """Settle ``nodes`` (with all they need, in order) as far as that is possible without running anything."""
        nodes = list(nodes)
        self.prepare(nodes)
        found = self._settled(nodes)
        if any(decision.status != HIT for decision in found) and self.sweep():
            found = self._settled(nodes)
        self.save()
        return found

    def sweep(self) -> bool:
        """Look for libraries that were edited in place, before anything runs; say whether that moves keys."""
        moved = self._code.sweep_libraries()
        if moved:
            self._imported.clear()
        return moved

    def _settled(self, nodes: Iterable[Node]) -> list[Decision]:
        settled: dict[Node, Decision] = {}

        def recorded(node: Node) -> Record:
            record = settled[node].record
            assert record is not None, "a HIT has a record"
            return record

        for node in nodes:
            below = [settled[u] for u in node.upstream if settled[u].status != HIT]
            if below:
                settled[node] = Decision(node, UNKNOWN, [f"after {below[0].node.name}"])
            else:
                settled[node] = self.decide(node, recorded)
        return list(settled.values())

    def save(self) -> None:
        """Write the code summaries back to the index, also when nothing runs."""
        self._code.save()


def _asked(node: Node, question: Callable[[], T]) -> T:
    """Return a stage's answer during planning; an exception of a stage in the pipeline's folder becomes a problem."""
    try:
        return question()
    except Exception as error:
        if not node.spec.origin.folder or isinstance(error, PipelineError):
            raise
        wrong = failure(error, node.spec.origin.folder)
        place = ":".join(map(str, wrong.place)) if wrong.place else str(node.spec.place)
        raise PlanError(f"{place}: {node.spec.entry}: stage '{node.stage.id}' cannot be planned: {wrong}") from None


def _source_paths(params: Any) -> list[str]:
    values = [getattr(params, name) for name in names_of(params.__class__)]
    return [value for value in values if isinstance(value, Source)]


def _offer(path: str) -> str:
    """Return how a path that looks like a repository's name is written if it is one, where somebody brings those."""
    name = "/".join(path.split("/")[-2:])
    schemes = [scheme for scheme in names("sources") if find("sources", scheme) not in OWN.sources.values()]
    if Path(path).parent.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return ""
    return "".join(f"; if it is the repository {name}, write {scheme}{MARK}{name}@COMMIT" for scheme in schemes)


def _masked(secrets: Sequence[str], value: Any) -> Any:
    """Return a stage's message during planning with its secrets masked."""
    if not secrets:
        return value
    from stagegraph.planning.secrets import Mask

    return Mask(secrets).value(value)


def code_of(codes: CodeDigests, module: str, stage: Stage, rows: Rows) -> dict[str, str]:
    """Return the code digests of a stage whose class is in ``module``, with the module that prepares its worker."""
    code: dict[str, str] = {}
    for start in (module, *worker_module(stage)):
        code |= codes.closure(start, rows)
    if prepare := _prepares(stage):
        code[prepare] = digest_json(prepare)  # which function of its module it is, a provider says
    return code


def libraries_of(codes: CodeDigests, module: str, stage: Stage, rows: Rows) -> dict[str, str]:
    """Return the third-party libraries that the code of a stage imports: distribution -> version and build."""
    return codes.libraries((module, *worker_module(stage)), rows)


def part_codes(codes: CodeDigests, stage: Stage, rows: Rows) -> dict[str, PartCode]:
    """Return the code that makes the memoised parts of a stage, by kind of part."""
    return {kind: codes.part_code((module, *worker_module(stage)), rows) for kind, module in _parts(stage).items()}


def _parts(stage: Stage) -> dict[str, str]:
    """Return the module that makes each kind of part, as it is called in keys."""
    return {kind: plain(module) for kind, module in stage.parts.items()}


def worker_module(stage: Stage) -> list[str]:
    """Return the module, if any, that prepares the worker in which a stage runs."""
    prepare = _prepares(stage)
    return [_module(prepare)] if prepare else []


def _prepares(stage: Stage) -> str:
    """Return the function that prepares the worker in which a stage runs, as ``"module:NAME"``; empty for none."""
    prepare: str | None = find("profiles", stage.profile)
    if prepare is None:
        raise PlanError(f"stage '{stage.id}': no profile '{stage.profile}'{nearest(stage.profile, names('profiles'))}")
    return prepare


def _module(reference: str) -> str:
    return reference.partition(":")[0]
