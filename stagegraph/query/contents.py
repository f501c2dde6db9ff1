"""Lists the contents of a store: every object, what refers to it, and whether that is in use.

In use are the results that ``artifacts/`` shows, those that pipeline files need as they stand, and those a run under
way has settled on.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from stagegraph.store.leftovers import tree_size
from stagegraph.store.pins import pinned
from stagegraph.store.record import record_files

if TYPE_CHECKING:
    from stagegraph.stage import JsonObject
    from stagegraph.store.journal import LastResult
    from stagegraph.store.record import Record
    from stagegraph.store.workspace import Workspace

FOLDERS = ("failed", "logs", "quarantine", "index", "work")


@dataclass(frozen=True, slots=True)
class Removable:
    """Something that gc can remove: an earlier result, a memoised part, or an object that nothing refers to."""

    kind: str  # "result", "other" (one that another of its key took the place of), "part", "object" or "leftover"
    name: str  # key, name in the index, digest, or path in the store
    what: str  # for people: node or stage, or kind of part
    when: str  # as records tell it; empty sorts first
    digests: tuple[str, ...]
    size: int = 0  # bytes, of a leftover: others free what their objects take


@dataclass
class Contents:
    """The whole contents of a store. ``records`` are by key, ``lasts`` by ``pipeline/node``; ``nodes`` says of which
    node a key was last the result.
    """

    sizes: dict[str, int]  # of its objects, in bytes
    records: dict[str, Record]
    others: list[Removable]  # parts, and results that another of their key took the place of
    lasts: dict[str, LastResult]
    nodes: dict[str, str]
    running: int
    pins: set[str]
    folders: dict[str, int]  # what is not an object: bytes

    @property
    def total(self) -> int:
        """Bytes of all objects."""
        return sum(self.sizes.values())


@dataclass
class Usage:
    """What of the contents of a store is in use, and what else there is, oldest first."""

    contents: Contents
    current: dict[str, Record]  # "pipeline/node" -> record
    used: set[str]  # digests of objects that must stay
    others: list[Removable]

    def size(self, digests: Iterable[str]) -> int:
        """Return the bytes that these objects take, each counted once."""
        return sum(self.contents.sizes.get(digest, 0) for digest in set(digests))


@dataclass
class Sweep:
    """What gc removes, the bytes that this frees, and notes on what it could not remove."""

    items: list[Removable] = field(default_factory=list)
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


def look(workspace: Workspace) -> Contents:
    """List the whole store; changes by others meanwhile may or may not be included."""
    running, pins = pinned(workspace.root)
    sizes, times = {}, {}
    for digest in workspace.store.digests():
        try:
            found = os.stat(workspace.store.file(digest))  # noqa: PTH116 - one of many
        except OSError:  # gone meanwhile
            continue
        sizes[digest], times[digest] = found.st_size, int(found.st_mtime)
    nodes = workspace.journal.node_of_key()
    others = [
        Removable("other", name, f"{nodes.get(r['key'], r['stage'])}, made otherwise", r["started"], objects_of(r))
        for name, r in workspace.others()
    ]
    for name, part in workspace.parts():
        digest = part["digest"]
        others.append(Removable("part", name, part["kind"], _stamp(times.get(digest, 0)), (digest,)))
    return Contents(
        sizes,
        {record["key"]: record for record in workspace.records()},
        others,
        workspace.lasts(),
        nodes,
        running,
        pins,
        {n: tree_size(p) for n in FOLDERS if (p := workspace.root / n).is_dir()},
    )


def usage(found: Contents, needed: Collection[str] = (), without: Collection[str] = ()) -> Usage:
    """Say what is in use; ``needed`` are the keys that pipeline files need.

    What is shown of the pipelines ``without`` a file is not in use for that.
    """
    records = found.records
    current = {
        name: records[last["key"]]
        for name, last in found.lasts.items()
        if last.get("key") in records and name.partition("/")[0] not in without
    }
    used = {key for key in {*found.pins, *needed} if key in records} | {record["key"] for record in current.values()}
    objects = {digest for key in used for digest in objects_of(records[key])}
    others = [_result(record, found.nodes) for key, record in records.items() if key not in used] + found.others
    named = objects.union(*(item.digests for item in others))
    others += [Removable("object", digest, "named by nothing", "", (digest,)) for digest in found.sizes.keys() - named]
    others.sort(key=lambda item: (item.when, item.name))
    return Usage(found, current, objects, others)


def _result(record: Record, nodes: Mapping[str, str]) -> Removable:
    node = nodes.get(record["key"])
    return Removable("result", record["key"], node or record["stage"], record["started"], objects_of(record))


def objects_of(record: Record) -> tuple[str, ...]:
    """Return the digests of a record's objects, each once."""
    return tuple({digest for digest, _ in record_files(record).values()})


@functools.lru_cache
def _stamp(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds)) if seconds else ""
