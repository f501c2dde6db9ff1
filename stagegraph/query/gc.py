"""Says what can be removed from a store: earlier results by run and by size, never what is in use.

In use are the results that ``artifacts/`` shows, of every pipeline that has a file (:mod:`stagegraph.query.needs`),
those that the pipeline files beside it need as they stand, and those a run under way has settled on. While a run is
under way memoised parts and objects that nothing names (yet) are left alone too. Nothing goes where what names things
is damaged. What goes is removed by :mod:`stagegraph.query.removal`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import TYPE_CHECKING

from stagegraph.errors import StoreError
from stagegraph.query.contents import Contents, Removable, Sweep, Usage, look, usage
from stagegraph.query.history import past_runs
from stagegraph.query.needs import Needs, gone
from stagegraph.query.removal import Watch, remove, remove_idle_locks
from stagegraph.store.journal import EXECUTED, HIT
from stagegraph.store.leftovers import leftovers, tree_size
from stagegraph.store.record import other_name

if TYPE_CHECKING:
    from stagegraph.store.workspace import Workspace

KEEP_RUNS = 10
RESULTS = {"result", "other"}
NAMING = ("rec:", "part:", "alt:")  # documents that name objects


def choose(
    workspace: Workspace, found: Usage, *, keep_runs: int, max_size: int | None, without: Collection[str] = ()
) -> Sweep:
    """Say what goes: results older than the last ``keep_runs`` runs of each pipeline, then the oldest until it fits.

    The runs of pipelines ``without`` a file keep nothing.
    """
    recent = _keys_of_runs(workspace, keep_runs, without)
    candidates = [item for item in found.others if item.kind in RESULTS or not found.contents.running]
    holders = Counter(digest for item in found.others for digest in item.digests)
    sweep = Sweep(left=found.contents.total)
    first = [item for item in candidates if item.kind == "object" or (item.kind in RESULTS and item.name not in recent)]
    chosen = {item.name for item in first}  # names differ: keys, digests and names in the index
    for item in first:
        _drop(item, sweep, holders, found)
    for item in candidates if max_size is not None else ():
        if sweep.left <= (max_size or 0):
            break
        if item.name not in chosen:
            _drop(item, sweep, holders, found)
    if found.contents.running:
        sweep.notes.append(
            f"{found.contents.running} under way: memoised parts, and what nothing names yet, were left alone"
        )
    if max_size is not None and sweep.left > max_size:
        sweep.notes.append("what is left is in use and larger than --max-size")
    return sweep


def _drop(item: Removable, sweep: Sweep, holders: Counter[str], found: Usage) -> None:
    """Let an item go, and with it the objects that nothing else holds."""
    size = 0
    for digest in item.digests:
        holders[digest] -= 1
        if not holders[digest] and digest not in found.used and digest in found.contents.sizes:
            sweep.digests.add(digest)
            size += found.contents.sizes[digest]
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
    contents: Contents | None = None,
) -> Sweep:
    """Remove what :func:`choose` says, unless it comes into use meanwhile; return what went.

    ``agreed`` limits it to what an earlier call said; ``contents`` is what the store holds, where that was looked at
    already. :class:`StoreError` if the index or a record is damaged.
    """
    if not workspace.root.is_dir():
        return Sweep()
    watch = None if dry_run else Watch(workspace)
    contents = contents or look(workspace)
    _refuse_damaged(workspace, contents)
    without, notes = gone(workspace, needed.names, contents, mark=not dry_run)
    found = usage(contents, needed.keys, without)
    if agreed is not None:
        names = {(item.kind, item.name) for item in agreed.items}
        used = [item for item in found.others if (item.kind, item.name) not in names]
        found.used.update(digest for item in used for digest in item.digests)
        found.others = [item for item in found.others if (item.kind, item.name) in names]
    sweep = choose(workspace, found, keep_runs=keep_runs, max_size=max_size, without=without)
    sweep.notes += notes + needed.notes
    if not contents.running:
        _add_leftovers(workspace, sweep)
    if watch is not None:
        remove(workspace, sweep, watch, contents.sizes, _unused_texts(workspace, contents, sweep))
        if not contents.running:
            remove_idle_locks(workspace)
    return sweep


def _refuse_damaged(workspace: Workspace, contents: Contents) -> None:
    """Refuse to call anything unneeded where what names it could not be read."""
    aside = workspace.index.set_aside
    problem = f"just now set aside as {aside}" if aside else workspace.index.problem()
    problems = [f"the index is damaged ({problem})"] if problem else []
    if bad := [name for name in workspace.index.files.damaged | workspace.index.damaged if name.startswith(NAMING)]:
        problems.append(f"{len(bad)} records or parts are damaged")
    if contents.records and not any(last.get("key") for last in contents.lasts.values()):
        problems.append("nothing says which results are in use: the index and the journal are gone")
    if problems:
        advice = "nothing was removed; `pipeline fsck --repair` mends it, a `pipeline run` makes again what is missing"
        raise StoreError(f"{'; '.join(problems)}: {advice}")


def _add_leftovers(workspace: Workspace, sweep: Sweep) -> None:
    for path in leftovers(workspace):
        name = path.relative_to(workspace.root).as_posix()
        sweep.items.append(Removable("leftover", name, "left behind", "", (), size := tree_size(path)))
        sweep.sizes.append(size)
        sweep.freed += size


def _unused_texts(workspace: Workspace, contents: Contents, sweep: Sweep) -> list[str]:
    """Return the names of the source texts that no record has which stays."""
    goes = {item.name for item in sweep.items if item.kind == "result"}
    code = {d for key, r in contents.records.items() if key not in goes for d in r["document"]["code"].values()}
    return [name for name in workspace.index.names("text:") if name.removeprefix("text:") not in code]
