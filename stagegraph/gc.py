"""Who uses the space of a store, and what can go: earlier results by run and by size, never what is in use.

In use are the results that ``artifacts/`` shows, of every pipeline, and those a run under way has settled on. While a
run is under way memoised parts and objects that nothing names (yet) are left alone too. A record goes before its
objects, so that whenever this is interrupted, what remains is whole or is seen to be missing and rebuilt.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from stagegraph.history import EXECUTED, past_runs
from stagegraph.pins import pinned
from stagegraph.plan import HIT
from stagegraph.record import record_files
from stagegraph.store import remove_tree

if TYPE_CHECKING:
    from pathlib import Path

    from stagegraph.record import Record
    from stagegraph.workspace import Workspace


@dataclass(frozen=True)
class Item:
    """Something that can be kept or go: an earlier result, a memoised part, an object that nothing names."""

    kind: str  # "result", "part" or "object"
    name: str  # key, name in the index, or digest
    what: str  # for people: stage or kind of part
    when: str  # as records tell it; empty sorts first
    digests: frozenset[str]


@dataclass
class Usage:
    """What a store holds: sizes of its objects, what is in use, and what else there is, oldest first."""

    sizes: dict[str, int]
    current: dict[str, Record]  # "pipeline/node" -> record
    used: set[str]  # digests of objects that must stay
    others: list[Item]
    running: int
    folders: dict[str, int]  # what is not an object: bytes

    @property
    def total(self) -> int:
        """Bytes of all objects."""
        return sum(self.sizes.values())

    def size(self, digests: Iterable[str]) -> int:
        """Return the bytes that these objects take, each counted once."""
        return sum(self.sizes.get(digest, 0) for digest in set(digests))


@dataclass
class Sweep:
    """What goes, the bytes that this frees, and what could not be done."""

    items: list[Item] = field(default_factory=list)
    digests: set[str] = field(default_factory=set)
    freed: int = 0
    left: int = 0
    notes: list[str] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        """Return the sweep as ``--json`` prints it."""
        items = [{"kind": i.kind, "name": i.name, "what": i.what, "when": i.when} for i in self.items]
        return {"freed_bytes": self.freed, "left_bytes": self.left, "removed": items, "notes": self.notes}


def usage(workspace: Workspace) -> Usage:
    """Look at everything there is."""
    store = workspace.store
    sizes = {digest: store.path(digest).stat().st_size for digest in store.digests()}
    running, pins = pinned(workspace.root)
    records = {record["key"]: record for record in workspace.records()}
    lasts = workspace.lasts()
    current = {name: records[last["key"]] for name, last in lasts.items() if last.get("key") in records}
    used = {key for key in pins if key in records} | {record["key"] for record in current.values()}
    objects = {digest for key in used for digest, _ in record_files(records[key]).values()}
    others = [_result(record) for key, record in records.items() if key not in used]
    others += [_part(workspace, name, part) for name, part in workspace.parts()]
    named = objects.union(*(item.digests for item in others))
    others += [Item("object", digest, "named by nothing", "", frozenset([digest])) for digest in sizes.keys() - named]
    others.sort(key=lambda item: (item.when, item.name))
    folders = {n: _tree_size(workspace.root / n) for n in ("failed", "logs", "quarantine", "index", "work")}
    return Usage(sizes, current, objects, others, running, folders)


def _result(record: Record) -> Item:
    digests = frozenset(digest for digest, _ in record_files(record).values())
    return Item("result", record["key"], record["stage"], record["started"], digests)


def _part(workspace: Workspace, name: str, part: dict[str, Any]) -> Item:
    try:
        made = workspace.store.path(part["digest"]).stat().st_mtime
    except OSError:
        made = 0.0
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(made)) if made else ""
    return Item("part", name, part["kind"], when, frozenset([part["digest"]]))


def _tree_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0


def choose(workspace: Workspace, found: Usage, *, keep_runs: int, max_size: int | None) -> Sweep:
    """Say what goes: results older than the last ``keep_runs`` runs of each pipeline, then the oldest until it fits."""
    kept = _keys_of_runs(workspace, keep_runs)
    candidates = [item for item in found.others if item.kind == "result" or not found.running]
    holders = Counter(digest for item in found.others for digest in item.digests)
    sweep = Sweep(left=found.total)
    first = [item for item in candidates if item.kind == "object" or (item.kind == "result" and item.name not in kept)]
    for item in first:
        _drop(item, sweep, holders, found)
    for item in candidates if max_size is not None else ():
        if sweep.left <= (max_size or 0):
            break
        if item not in first:
            _drop(item, sweep, holders, found)
    if found.running:
        sweep.notes.append(f"{found.running} under way: memoised parts, and what nothing names yet, were left alone")
    if max_size is not None and sweep.left > max_size:
        sweep.notes.append("what is left is in use and larger than --max-size")
    return sweep


def _drop(item: Item, sweep: Sweep, holders: Counter[str], found: Usage) -> None:
    """Let an item go, and with it the objects that nothing else holds."""
    sweep.items.append(item)
    for digest in item.digests:
        holders[digest] -= 1
        if not holders[digest] and digest not in found.used and digest in found.sizes:
            sweep.digests.add(digest)
            sweep.freed += found.sizes[digest]
            sweep.left -= found.sizes[digest]


def _keys_of_runs(workspace: Workspace, count: int) -> set[str]:
    """Return the keys of every node's result as of each of the last ``count`` runs of each pipeline."""
    keys: set[str] = set()
    for pipeline in {entry.get("pipeline", "") for entry in workspace.journal.entries()}:
        runs = past_runs(workspace.journal, pipeline)
        state: dict[str, str] = {}
        for position, run in enumerate(runs):
            state |= {node["node"]: node["key"] for node in run.nodes if node["outcome"] in EXECUTED | {HIT}}
            if position >= len(runs) - count:
                keys.update(state.values())
    return keys


def collect(workspace: Workspace, *, keep_runs: int, max_size: int | None, dry_run: bool) -> Sweep:
    """Remove what :func:`choose` says, while no run settles or commits a node; return what went."""
    with workspace.alone():
        found = usage(workspace)
        sweep = choose(workspace, found, keep_runs=keep_runs, max_size=max_size)
        if not dry_run:
            _remove(workspace, sweep)
    return sweep


def _remove(workspace: Workspace, sweep: Sweep) -> None:
    for item in sweep.items:
        if item.kind == "result":
            workspace.index.delete(f"rec:{item.name}")
            workspace.log_path(item.name).unlink(missing_ok=True)
        elif item.kind == "part":
            workspace.index.delete(item.name)
    for digest in sweep.digests:
        remove_tree(workspace.store.path(digest))
        workspace.index.delete(f"obj:{digest}")
    code = {digest for record in workspace.records() for digest in record["document"]["code"].values()}
    for name in list(workspace.index.names("text:")):
        if name.removeprefix("text:") not in code:
            workspace.index.delete(name)
