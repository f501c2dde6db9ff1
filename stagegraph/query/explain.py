"""Why a node runs, or does not: the planner's decision with every difference followed to where it began.

Everything is read from the two key documents of the decision and from stored records, so that it cannot say anything
but what is done.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stagegraph.files import typed
from stagegraph.planning.changes import Change, changes, instances
from stagegraph.planning.planner import UNKNOWN, Decision
from stagegraph.registry import find, load_object
from stagegraph.store.journal import HIT
from stagegraph.store.memo import PartCode
from stagegraph.store.record import Record, result_digest

if TYPE_CHECKING:
    from stagegraph.planning.dag import Node
    from stagegraph.project import Project
    from stagegraph.stage import JsonObject


DEEP = 20  # nodes; beyond, only where a change began is told, not every node by whose way it came


@dataclass
class Cause:
    """One difference in full: what changed, where to look, and for an input what changed before it."""

    kind: str
    text: str
    place: str = ""
    old: Any = None
    new: Any = None
    because: list[Cause] = field(default_factory=list)
    diff: list[str] = field(default_factory=list)  # of a module whose earlier text is known

    def document(self) -> JsonObject:
        """Return the cause as ``--json`` prints it."""
        found = {"kind": self.kind, "text": self.text, "place": self.place, "old": self.old, "new": self.new}
        return found | {"because": [cause.document() for cause in self.because], "diff": self.diff}


@dataclass
class Explanation:
    """A node's decision, what it was compared with, and why; ``cut_off`` are nodes that early cutoff skipped."""

    decision: Decision
    causes: list[Cause]
    notes: list[str]
    cut_off: dict[str, float]  # node -> seconds of its last execution

    def document(self) -> JsonObject:
        """Return the explanation as ``--json`` prints it."""
        d = self.decision
        previous = d.previous
        return {
            "node": d.node.name,
            "status": d.status,
            "reasons": d.reasons,
            "key": d.key,
            "compared_with": {"key": previous["key"], "built": previous["started"]} if previous else None,
            "causes": [cause.document() for cause in self.causes],
            "notes": self.notes,
            "cut_off": self.cut_off,
        }


def explain(project: Project, nodes: Iterable[Node]) -> list[Explanation]:
    """Explain nodes as they are now."""
    nodes = list(nodes)
    needed = project.dag.above(nodes) | project.dag.below(nodes)
    needed = project.dag.above(needed)
    decisions = project.planner.plan([node for node in project.dag.nodes if node in needed])
    explainer = _Explainer(project, {d.node: d for d in decisions})
    return [explainer.explanation(node) for node in nodes]


class _Explainer:
    def __init__(self, project: Project, decisions: Mapping[Node, Decision]) -> None:
        self._project = project
        self._workspace = project.workspace
        self._decisions = decisions
        self._explained: set[str] = set()
        self._depth = 0

    def explanation(self, node: Node) -> Explanation:
        decision = self._decisions[node]
        self._explained = set()
        notes = []
        if self._has_failed(decision):
            notes.append(f"its last execution failed: pipeline log {typed(node.name)}")
        if decision.status == HIT:
            assert decision.record is not None
            for _, other in self._workspace.others(decision.key):
                digest = result_digest(other)[:16]
                what = "measured before" if node.stage.measures else "not deterministic"
                notes.append(f"{what}: its key gave {digest} on {other['started']} (pipeline show {digest})")
            if not self._workspace.is_shown(self._project.name, node.name, decision.key, decision.record):
                notes.append("its files under artifacts/ are not all there or were edited: a run restores them")
            return Explanation(decision, [], notes, self._cut_off(decision))
        if decision.status == UNKNOWN:
            return Explanation(decision, list(self._stale_above(node)), notes, {})
        return Explanation(decision, self._causes_of(decision), notes, {})

    def _stale_above(self, node: Node) -> Iterator[Cause]:
        """Yield a cause for each node above that is sure to run; only then is it known whether this one does."""
        above = self._project.dag.above([node])
        for d in self._decisions.values():
            if d.node in above and d.status not in {HIT, UNKNOWN}:
                log = f" and failed when it last ran: pipeline log {typed(d.node.name)}" if self._has_failed(d) else ""
                yield Cause("node", f"{d.node.name} is {d.status}{log}", because=self._causes_of(d))

    def _has_failed(self, decision: Decision) -> bool:
        """Say whether this is what the last execution failed at."""
        last = self._workspace.last(self._project.name, decision.node.name)
        return bool(decision.key) and last.get("failed") == decision.key

    def _causes_of(self, decision: Decision) -> list[Cause]:
        previous = decision.previous
        if previous is None or decision.document is None or previous["key"] == decision.key:
            return [Cause("record", reason) for reason in decision.reasons]
        found = changes(previous["document"], decision.document)
        return [self._cause(change, decision, previous) for change in found] or [
            Cause("record", reason) for reason in decision.reasons
        ]

    def _cause(self, change: Change, decision: Decision, previous: Record) -> Cause:
        cause = Cause(change.kind, change.text, old=change.old, new=change.new)
        spec = decision.node.spec
        if change.kind == "param":
            cause.place = _line(spec.places.get(change.name, spec.place))
        elif change.kind == "source":
            cause.place = _line(spec.places.get(change.name, spec.place))
            cause.text = f"{change.item} {change.fate}{self._inside(change, decision)} (source {change.name})"
        elif change.kind == "code":
            self._tell_code(cause, change, self._project.planner.code_files(decision))
        elif change.kind == "input":
            cause.text = f"input {change.name} {change.fate}"
            cause.because = list(self._inputs(change, decision.node, previous))
        return cause

    def _inside(self, change: Change, decision: Decision) -> str:
        """Say which parts of a changed source file changed, where its kind of file has parts and both are known."""
        file_diff = find("file_diffs", Path(change.item).suffix)
        source = self._project.planner.prepared(decision.node).sources.get(change.name)
        if file_diff is None or source is None or change.old is None or change.item not in source.files:
            return ""
        from stagegraph.store.memo import Memo

        memo = Memo(self._workspace.store, self._part_codes())
        found = load_object(file_diff)(memo.recall, change.old, source.files[change.item])
        return f": {found}" if found else ""

    def _part_codes(self) -> dict[str, PartCode]:
        """Return what made the parts that the last results of this pipeline's nodes memoised, by their kind."""
        nodes = (self._workspace.last_record(self._project.name, node.name) for node in self._project.dag.nodes)
        found = (record.get("parts", {}) for record in nodes if record)
        return {kind: PartCode(part["code"], {}) for parts in found for kind, part in parts.items() if "code" in part}

    # -- code --------------------------------------------------------------------------------------------------------

    def _tell_code(self, cause: Cause, change: Change, files: Mapping[str, Path]) -> None:
        """Name the file and what changed in it; a row of a table and a data file are named by the document itself."""
        from stagegraph.planning.definitions import changed_definitions, kept

        module, colon, row = change.name.partition(":")
        module, slash, data = module.partition("/")
        path = files.get(module) or Path(*module.split(".")).with_suffix(".py")
        depth = module.count(".") + 1 + (path.name == "__init__.py")
        shown = Path(*path.parts[-depth:])
        name = str(shown.with_name(data) if slash else shown)
        cause.text = f"{name}: {row} {change.fate}" if colon else f"{name} {change.fate}"
        if colon or slash or change.old is None or change.new is None:
            return
        index = self._workspace.index
        old, new = kept(index, change.old), path.read_text("utf-8", "replace") if path.is_file() else None
        if old is None or new is None:
            return
        found = changed_definitions(old, new)
        cause.text += f" ({'; '.join(found)})" if found else ""
        import difflib

        cause.diff = list(
            difflib.unified_diff(old.splitlines(), new.splitlines(), f"{name} (before)", name, lineterm="")
        )

    # -- inputs ------------------------------------------------------------------------------------------------------

    def _inputs(self, change: Change, node: Node, previous: Record) -> Iterator[Cause]:
        """Follow a changed input to the nodes that made it, and why their output changed."""
        for upstream, before in self._changed_inputs(change, node):
            yield self._made_otherwise(upstream, before, change.name, node, previous)
        here = {self._instance(upstream, change.name, node) for upstream in node.inputs.get(change.name, ())}
        for each in dict(instances(change.old)).keys() - here:
            yield Cause("input", f"{', '.join(value for _, value in each) or change.name} is no longer read")

    def _changed_inputs(self, change: Change, node: Node) -> Iterator[tuple[Node, str | None]]:
        """Yield the nodes that a changed input port reads and whose output is another now, and its digest before."""
        old = dict(instances(change.old))
        port = node.stage.inputs[change.name].port
        for upstream in node.inputs.get(change.name, ()):
            before = old.get(self._instance(upstream, change.name, node))
            record = self._decisions[upstream].record
            if record is not None and record["outputs"][port]["digest"] != before:
                yield upstream, before

    @staticmethod
    def _instance(upstream: Node, name: str, node: Node) -> tuple[tuple[str, str], ...]:
        """Return how a key document tells what one port reads of several instances apart."""
        return tuple(sorted(upstream.spec.each.items())) if node.stage.inputs[name].many else ()

    def _made_otherwise(self, upstream: Node, before: str | None, name: str, node: Node, previous: Record) -> Cause:
        """Say why the output of ``upstream`` is not ``before``, what ``node`` last read on port ``name``."""
        if upstream.name in self._explained:
            return Cause("node", f"{upstream.name}: as above")
        self._explained.add(upstream.name)
        if before is None:
            return Cause("node", f"{upstream.name} was not read before")
        earlier = self._maker(upstream, before, name, node, previous)
        if earlier is None:
            return Cause("node", f"{upstream.name}: output changed; the previous record was collected")
        decision = self._decisions[upstream]
        assert decision.document is not None
        if self._depth == DEEP:
            began = list(self._beginnings(decision, earlier))
            return Cause(
                "node", f"{upstream.name}: output changed, and of all before it these by themselves", because=began
            )
        self._depth += 1
        causes = [self._cause(change, decision, earlier) for change in changes(earlier["document"], decision.document)]
        self._depth -= 1
        if not causes:
            why = "it was measured again" if upstream.stage.measures else "it is not deterministic"
            return Cause("node", f"{upstream.name}: output changed with the same key: {why}")
        return Cause("node", f"{upstream.name}: output changed", because=causes)

    def _beginnings(self, decision: Decision, earlier: Record) -> Iterator[Cause]:
        """Yield what changed at a node and all above it but for inputs, without what lies between."""
        queue = [(decision, earlier)]
        while queue:
            decision, earlier = queue.pop()
            assert decision.document is not None
            found = changes(earlier["document"], decision.document)
            own = [self._cause(change, decision, earlier) for change in found if change.kind != "input"]
            if own:
                yield Cause("node", f"{decision.node.name}: output changed", because=own)
            for change in found:
                for upstream, before in self._changed_inputs(change, decision.node) if change.kind == "input" else ():
                    if before is None or upstream.name in self._explained:
                        continue
                    self._explained.add(upstream.name)
                    maker = self._maker(upstream, before, change.name, decision.node, earlier)
                    if maker is not None:
                        queue.append((self._decisions[upstream], maker))

    def _maker(self, node: Node, digest: str, name: str, consumer: Node, previous: Record) -> Record | None:
        """Return the record of the execution of ``node`` that made what a consumer read on a port: of those that
        its record names, else the last that did.
        """
        port = consumer.stage.inputs[name].port
        keys = previous.get("made_from", {}).get(name, ())
        records = [record for key in keys if (record := self._workspace.record(key))]
        made = [r for r in records if r["stage"] == node.stage.id and _digest(r, port) == digest]
        if not made:
            found = (r for r in self._workspace.records() if r["stage"] == node.stage.id and _digest(r, port) == digest)
            made = sorted(found, key=lambda record: record["started"])
        return made[-1] if made else None

    # -- early cutoff ------------------------------------------------------------------------------------------------

    def _cut_off(self, decision: Decision) -> dict[str, float]:
        """Return the nodes at and below this one that an identical result above them left alone."""
        cut_off = (d.node for d in self._decisions.values() if d.status == HIT and self._is_cut_off(d, decision.node))
        below = self._project.dag.below(cut_off) & self._decisions.keys()
        hits = [self._decisions[node] for node in self._project.dag.nodes if node in below]
        return {d.node.name: d.record["seconds"] for d in hits if d.status == HIT and d.record}

    def _is_cut_off(self, d: Decision, node: Node) -> bool:
        """Say whether ``d`` was made from an earlier execution of what it reads, ``node`` being one or the other."""
        made_from = d.record.get("made_from", {}) if d.record else {}
        return any(
            self._decisions[u].key not in made_from[port]
            for port, upstream in d.node.inputs.items()
            for u in upstream
            if port in made_from and node in {u, d.node}
        )


def _digest(record: Record, port: str) -> str | None:
    output = record["outputs"].get(port)
    return output["digest"] if output else None


def _line(place: Any) -> str:
    """Return ``pipeline.yaml:14``; the column is for errors."""
    return f"{place.file}:{place.line}" if place.line else str(place)
