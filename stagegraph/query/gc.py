"""Disk usage of a store, and what can be removed: earlier results by run and by size, never what is in use.

In use are the results that ``artifacts/`` shows, of every pipeline that has a file (:mod:`stagegraph.query.needs`),
those that the pipeline files beside it need as they stand, and those a run under way has settled on. While a run is
under way memoised parts and objects that nothing names (yet) are left alone too. Nothing goes where what names things
is damaged. A record goes before its objects, so that whenever this is interrupted, what remains is whole or is seen to
be missing and rebuilt.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from stagegraph.errors import StoreError
from stagegraph.files import remove_tree
from stagegraph.query.history import past_runs
from stagegraph.query.needs import Needs, gone
from stagegraph.store.journal import EXECUTED, HIT
from stagegraph.store.leftovers import idle_locks, leftovers, tree_size
from stagegraph.store.pins import pinned
from stagegraph.store.record import other_name, record_files

if TYPE_CHECKING:
    from stagegraph.stage import JsonObject
    from stagegraph.store.memo import PartEntry
    from stagegraph.store.record import Record
    from stagegraph.store.workspace import Workspace

RESULTS = {"result", "other"}
FOLDERS = ("failed", "logs", "quarantine", "index", "work")


@dataclass(frozen=True)
class Item:
    """Something that can be kept or go: an earlier result, a memoised part, an object that nothing names."""

    kind: str  # "result", "other" (one that another of its key took the place of), "part", "object" or "leftover"
    name: str  # key, name in the index, digest, or path in the store
    what: str  # for people: node or stage, or kind of part
    when: str  # as records tell it; empty sorts first
    digests: frozenset[str]
    size: int = 0  # bytes, of a leftover: others free what their objects take


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
    sizes: list[int] = field(default_factory=list)  # bytes that each item frees
    digests: set[str] = field(default_factory=set)
    freed: int = 0
    left: int = 0
    notes: list[str] = field(default_factory=list)

    def document(self) -> JsonObject:
        """Return the sweep as ``--json`` prints it."""
        items = [
            {"kind": i.kind, "name": i.name, "what": i.what, "when": i.when, "bytes": size}
            for i, size in zip(self.items, self.sizes, strict=True)
        ]
        return {"freed_bytes": self.freed, "left_bytes": self.left, "removed": items, "notes": self.notes}


def usage(workspace: Workspace, needed: Collection[str] = (), without: Collection[str] = ()) -> Usage:
    """Look at everything there is; ``needed`` are the keys that pipeline files need.

    What is shown of the pipelines ``without`` a file is not in use for that.
    """
    store = workspace.store
    sizes = {digest: store.path(digest).stat().st_size for digest in store.digests()}
    running, pins = pinned(workspace.root)
    records = {record["key"]: record for record in workspace.records()}
    lasts = workspace.lasts()
    current = {
        name: records[last["key"]]
        for name, last in lasts.items()
        if last.get("key") in records and name.partition("/")[0] not in without
    }
    used = {key for key in {*pins, *needed} if key in records} | {record["key"] for record in current.values()}
    objects = {digest for key in used for digest, _ in record_files(records[key]).values()}
    nodes = workspace.journal.node_of_key()
    others = [_result(record, nodes.get(key)) for key, record in records.items() if key not in used]
    others += [
        Item("other", name, f"{nodes.get(r['key'], r['stage'])}, made otherwise", r["started"], _objects(r))
        for name, r in workspace.others()
    ]
    others += [_part(workspace, name, part) for name, part in workspace.parts()]
    named = objects.union(*(item.digests for item in others))
    others += [Item("object", digest, "named by nothing", "", frozenset([digest])) for digest in sizes.keys() - named]
    others.sort(key=lambda item: (item.when, item.name))
    folders = {n: tree_size(p) for n in FOLDERS if (p := workspace.root / n).is_dir()}
    return Usage(sizes, current, objects, others, running, folders)


def _result(record: Record, node: str | None) -> Item:
    return Item("result", record["key"], node or record["stage"], record["started"], _objects(record))


def _objects(record: Record) -> frozenset[str]:
    return frozenset(digest for digest, _ in record_files(record).values())


def _part(workspace: Workspace, name: str, part: PartEntry) -> Item:
    try:
        made = workspace.store.path(part["digest"]).stat().st_mtime
    except OSError:
        made = 0.0
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(made)) if made else ""
    return Item("part", name, part["kind"], when, frozenset([part["digest"]]))


def choose(
    workspace: Workspace, found: Usage, *, keep_runs: int, max_size: int | None, without: Collection[str] = ()
) -> Sweep:
    """Say what goes: results older than the last ``keep_runs`` runs of each pipeline, then the oldest until it fits.

    The runs of pipelines ``without`` a file keep nothing.
    """
    kept = _keys_of_runs(workspace, keep_runs, without)
    candidates = [item for item in found.others if item.kind in RESULTS or not found.running]
    holders = Counter(digest for item in found.others for digest in item.digests)
    sweep = Sweep(left=found.total)
    first = [item for item in candidates if item.kind == "object" or (item.kind in RESULTS and item.name not in kept)]
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
    size = 0
    for digest in item.digests:
        holders[digest] -= 1
        if not holders[digest] and digest not in found.used and digest in found.sizes:
            sweep.digests.add(digest)
            size += found.sizes[digest]
    sweep.items.append(item)
    sweep.sizes.append(size)
    sweep.freed += size
    sweep.left -= size


def _keys_of_runs(workspace: Workspace, count: int, without: Collection[str]) -> set[str]:
    """Return what the last ``count`` runs of each pipeline had, of every node: keys, and names of other results."""
    keys: set[str] = set()
    for pipeline in {entry.get("pipeline", "") for entry in workspace.journal.entries()} - {*without}:
        runs = past_runs(workspace.journal, pipeline)
        state: dict[str, tuple[str, str]] = {}
        for position, run in enumerate(runs):
            done = [node for node in run.nodes if node["outcome"] in EXECUTED | {HIT}]
            state |= {node["node"]: (node["key"], node.get("result", "")) for node in done}
            if position >= len(runs) - count:
                keys.update(name for key, result in state.values() for name in (key, other_name(key, result)))
    return keys


def collect(
    workspace: Workspace,
    needed: Needs,
    *,
    keep_runs: int,
    max_size: int | None,
    dry_run: bool,
    agreed: Sweep | None = None,
) -> Sweep:
    """Remove what :func:`choose` says, while no run settles or commits a node; return what went.

    ``agreed`` limits it to what an earlier call said. :class:`StoreError` if the index or a record is damaged.
    """
    if not workspace.root.is_dir():
        return Sweep()
    with workspace.alone():
        _refuse_damaged(workspace)
        without, notes = gone(workspace, needed.names, mark=not dry_run)
        found = usage(workspace, needed.keys, without)
        if agreed is not None:
            names = {(item.kind, item.name) for item in agreed.items}
            used = [item for item in found.others if (item.kind, item.name) not in names]
            found.used.update(digest for item in used for digest in item.digests)
            found.others = [item for item in found.others if (item.kind, item.name) in names]
        sweep = choose(workspace, found, keep_runs=keep_runs, max_size=max_size, without=without)
        sweep.notes += notes + needed.notes
        if not found.running:
            _add_leftovers(workspace, sweep)
        if not dry_run:
            _remove(workspace, sweep)
            for lock in idle_locks(workspace) if not found.running else ():
                lock.unlink()
    return sweep


def _refuse_damaged(workspace: Workspace) -> None:
    """Refuse to call anything unneeded where what names it cannot be read."""
    aside = workspace.index.set_aside
    problem = f"just now set aside as {aside}" if aside else workspace.index.problem()
    problems = [f"the index is damaged ({problem})"] if problem else []
    keys = [name.removeprefix("rec:") for name in workspace.index.names("rec:")]
    bad = [key for key in keys if workspace.record(key) is None]
    bad += [n for kind in ("part:", "alt:") for n in workspace.index.names(kind) if workspace.index.get(n) is None]
    if bad:
        problems.append(f"{len(bad)} records or parts are damaged")
    if keys and not any(last.get("key") for last in workspace.lasts().values()):
        problems.append("nothing says which results are in use: the index and the journal are gone")
    if problems:
        advice = "nothing was removed; `pipeline fsck --repair` mends it, a `pipeline run` makes again what is missing"
        raise StoreError(f"{'; '.join(problems)}: {advice}")


def _add_leftovers(workspace: Workspace, sweep: Sweep) -> None:
    for path in leftovers(workspace):
        name = path.relative_to(workspace.root).as_posix()
        sweep.items.append(Item("leftover", name, "left behind", "", frozenset(), size := tree_size(path)))
        sweep.sizes.append(size)
        sweep.freed += size


def _remove(workspace: Workspace, sweep: Sweep) -> None:
    for item in sweep.items:
        if item.kind == "result":
            workspace.index.delete(f"rec:{item.name}")
            workspace.log_path(item.name).unlink(missing_ok=True)
        elif item.kind in {"part", "other"}:
            workspace.index.delete(item.name)
        elif item.kind == "leftover":
            remove_tree(workspace.root / item.name)
    for digest in sweep.digests:
        remove_tree(workspace.store.path(digest))
        workspace.index.delete(f"obj:{digest}")
    code = {digest for record in workspace.records() for digest in record["document"]["code"].values()}
    for name in list(workspace.index.names("text:")):
        if name.removeprefix("text:") not in code:
            workspace.index.delete(name)
