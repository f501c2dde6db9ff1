"""What differs between two results, and between two sets of them: runs or pipelines.

Parameters, sources, code, inputs and tools come from the key documents, facts and costs from the records, files by
digest. What is inside is compared by the stage's own function (``comparers`` of its
:class:`~stagegraph.registry.Provider`), else, for JSON, by value.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stagegraph.planning.changes import Change, changes, instances, show
from stagegraph.planning.key import SHOWN as MASKED
from stagegraph.registry import find, load_object
from stagegraph.store.record import Record, record_size, same_outputs

if TYPE_CHECKING:
    from stagegraph.project import Project
    from stagegraph.query.artifact import Artifact
    from stagegraph.stage import JsonObject

# Given the files of two results, name -> where the content is: rows of what differs, its value in each as text.
Comparer = Callable[[Mapping[str, Path], Mapping[str, Path]], list[tuple[str, str, str]]]
JSON_LIMIT = 16 << 20  # bytes; a larger file is compared as a whole
DIGITS = 12  # of a digest
KINDS = ("stage", "param", "source", "input", "code", "tool", "fact", "file", "inside", "cost")
SHOWN = 20  # values of one JSON file


@dataclass
class DifferenceRow:
    """One difference: what it is about, and its value on both sides (empty where it is not there)."""

    kind: str  # one of KINDS
    what: str
    a: str
    b: str


@dataclass
class Difference:
    """How two results differ; ``same`` if their outputs are byte for byte the same."""

    a: str
    b: str
    same: bool
    rows: list[DifferenceRow] = field(default_factory=list)

    def document(self) -> JsonObject:
        """Return the difference as ``--json`` prints it."""
        return asdict(self)


def difference(a: Artifact, b: Artifact) -> Difference:
    """Compare two results."""
    old, new = a.record, b.record
    outputs = [{port: output["digest"] for port, output in record["outputs"].items()} for record in (old, new)]
    found = Difference(a.label, b.label, outputs[0] == outputs[1])
    for change in changes(old["document"], new["document"]):
        found.rows += _rows(change)
    facts = [{name: _text(value) for name, value in record["facts"].items()} for record in (old, new)]
    found.rows += [DifferenceRow("fact", *row) for row in _unequal(*facts)]
    files = [{name: f"{size:,} B {digest[:DIGITS]}" for name, (digest, size) in x.files.items()} for x in (a, b)]
    found.rows += [DifferenceRow("file", *row) for row in _unequal(*files) if not row[0].startswith("views/")]
    if not found.same:
        found.rows += [DifferenceRow("inside", *row) for row in _inside(a, b)]
    costs = [_costs(record) for record in (old, new)]
    found.rows += [DifferenceRow("cost", *row) for row in _unequal(*costs)]
    return found


def _rows(change: Change) -> Iterator[DifferenceRow]:
    if change.kind == "input":
        sides = [{_instance(each): digest for each, digest in instances(side)} for side in (change.old, change.new)]
        for each, a, b in _unequal(*sides):
            yield DifferenceRow("input", change.name + each, a[:DIGITS], b[:DIGITS])
        return
    text = _text if change.kind in {"stage", "param", "tool"} else _digits
    yield DifferenceRow(change.kind, f"{change.name} {change.item}".rstrip(), text(change.old), text(change.new))


def _instance(each: Iterable[tuple[str, str]]) -> str:
    return f"[{','.join(value for _, value in each)}]" if each else ""


def _costs(record: Record) -> dict[str, str]:
    return {
        "seconds": f"{record['seconds']:.2f} s",
        "bytes": f"{record_size(record):,}",
        "peak_bytes": f"{record['peak_bytes']:,}",
    }


def _inside(a: Artifact, b: Artifact) -> Iterator[tuple[str, str, str]]:
    stage = a.record["stage"]
    reference = find("comparers", stage) if stage == b.record["stage"] else None
    if reference is not None:
        compare: Comparer = load_object(reference)
        yield from compare(*({name: x.object(name) for name in x.whole.files} for x in (a.whole, b.whole)))
        return
    for name in a.files.keys() & b.files.keys():
        changed = a.files[name][0] != b.files[name][0] and max(a.files[name][1], b.files[name][1]) <= JSON_LIMIT
        if name.endswith(".json") and changed:
            rows = list(_unequal(*(dict(_leaves(x.read_json(name), "")) for x in (a, b))))
            yield from ((f"{name}: {what}", old, new) for what, old, new in rows[:SHOWN])
            if len(rows) > SHOWN:
                yield f"{name}: {len(rows) - SHOWN} more", "", ""


def _leaves(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, below in value.items():
            yield from _leaves(below, f"{path}.{key}" if path else key)
    elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        for i, below in enumerate(value):
            yield from _leaves(below, f"{path}[{i}]")
    else:
        yield path, json.dumps(value, ensure_ascii=False)


def _unequal(a: Mapping[str, str], b: Mapping[str, str]) -> list[tuple[str, str, str]]:
    names = list(dict.fromkeys([*a, *b]))
    return [(name, a.get(name, ""), b.get(name, "")) for name in names if a.get(name) != b.get(name)]


def _text(value: Any) -> str:
    if isinstance(value, Mapping) and value.keys() == {MASKED}:
        return show(value)
    return "" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _digits(value: Any) -> str:
    return "" if value is None else str(value)[:DIGITS]


@dataclass
class Sets:
    """Two sets of results: which nodes only one has, how the others differ, and how many do not."""

    a: str
    b: str
    only_a: list[str]
    only_b: list[str]
    differing: list[Difference]
    same: int

    def document(self) -> JsonObject:
        """Return the differences as ``--json`` prints them."""
        return asdict(self)


def compare_sets(name_a: str, a: Mapping[str, Artifact], name_b: str, b: Mapping[str, Artifact]) -> Sets:
    """Compare the results of the nodes that two runs or pipelines share; equal keys are equal results but
    where a stage is not deterministic.
    """
    shared = [node for node in a if node in b]
    differing = [difference(a[node], b[node]) for node in shared if not _is_same(a[node], b[node])]
    only_a, only_b = [node for node in a if node not in b], [node for node in b if node not in a]
    return Sets(name_a, name_b, only_a, only_b, differing, len(shared) - len(differing))


def _is_same(a: Artifact, b: Artifact) -> bool:
    return a.key == b.key and same_outputs(a.record, b.record)


def state(project: Project, run: str = "") -> dict[str, Artifact]:
    """Return every node's result, as of a run or as it is now; a record that is gone is left out."""
    from stagegraph.query.artifact import Artifact, tell_behind
    from stagegraph.query.history import find_run, key_at, past_runs

    runs = past_runs(project.workspace.journal, project.name) if run else []
    position = find_run(runs, run) if run else -1
    if not run:
        project.standing(project.dag.nodes)
    names = dict.fromkeys([*project.nodes, *(n["node"] for r in runs[: position + 1] for n in r.nodes)])
    found = {}
    for name in names:
        known = key_at(runs, position, name) if run else (project.key(project.dag.by_name[name]) or "", "")
        record = project.workspace.record(*known) if known and known[0] else None
        if record is not None:
            found[name] = Artifact(f"{name}@{runs[position].id[:8]}" if run else name, record, project.workspace)
    if not run:
        tell_behind(project, found)
    return found
