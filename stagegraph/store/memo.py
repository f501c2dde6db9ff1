"""Memoisation below a node's grain: a stage's finished parts (one page of a book) as objects.

``part:<digest of kind, code and document>`` in the index names the object of a part. It is written as soon as the part
is finished, by the worker, so that a killed run leaves what it had done to the next one. An object is synced only where
it becomes part of an output; otherwise it is trusted no further than the digest that is taken when it is next used.

A name once given keeps its object while that is intact: other nodes may have been made of it. What is made again under
it and differs is used by the execution that made it, which is warned that its work is not deterministic.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple, TypedDict, cast

from stagegraph.digest import digest_file, digest_json, stat_id
from stagegraph.stage import JsonObject, NewPart, Part
from stagegraph.store.index import Index
from stagegraph.store.objects import Store, fsync_file
from stagegraph.store.record import is_digest

PART_SCHEMA = 1
SHOWN = 3  # names of parts in a warning


class PartCode(NamedTuple):
    """The code that makes one kind of part: its digest, and the files it was read from with their stats."""

    digest: str
    files: Mapping[str, Sequence[int]]

    def is_unchanged(self) -> bool:
        """Say whether every file is still the one that was digested, so that what was imported is what it says."""
        try:
            return all(list(stat_id(path)) == list(stat) for path, stat in self.files.items())
        except OSError:
            return False


class PartEntry(TypedDict):
    """What the index says of a part: the digest and the size of its object, and the small facts beside it."""

    schema: int
    kind: str
    digest: str
    size: int
    facts: JsonObject


PART_FIELDS = PartEntry.__required_keys__


def is_part(entry: Any) -> bool:
    """Say whether a document is the entry of a part, whose digest names an object and nothing else."""
    if not isinstance(entry, dict) or entry.get("schema") != PART_SCHEMA or not entry.keys() >= PART_FIELDS:
        return False
    return is_digest(entry["digest"]) and type(entry["size"]) is int and isinstance(entry["facts"], dict)


class Memo:
    """The parts one execution reuses and makes; safe to use from several threads. ``fresh`` reuses nothing.

    ``codes`` says what makes each kind of part.
    """

    def __init__(self, store: Store, codes: Mapping[str, PartCode], *, fresh: bool = False) -> None:
        self._store = store
        self._codes = codes
        self._fresh = fresh
        self._lock = Lock()
        self._made: set[str] = set()
        self._used: set[str] = set()
        self._differing: list[str] = []
        self._taken: dict[str, PartEntry] = {}  # what other machines made for this execution
        self.entries: dict[str, PartEntry] = {}  # name in the index -> all that was reused or made
        self.counts: dict[str, Counter[str]] = {}  # kind -> reused, made

    @classmethod
    def open(cls, root: Path, codes: Mapping[str, PartCode], *, fresh: bool) -> Memo:
        """Open the memo of the store at ``root`` from a process that has no workspace."""
        return cls(Store(root, Index(root / "index")), codes, fresh=fresh)

    def recall(self, kind: str, document: JsonObject) -> Part | None:
        """Return a part, its object verified, or None if it is not known, is lost or was damaged."""
        name = self._name(kind, document) if kind in self._codes else ""
        entry = self._taken.get(name) or (None if self._fresh or not name else self._entry(name))
        if entry is None or self._store.check(entry["digest"]) is not None:  # read, as it becomes part of a result
            return None
        self._count("made" if name in self._taken else "reused", name, entry)
        return Part(self._store.path(entry["digest"]), entry["facts"])

    def remember(self, kind: str, document: JsonObject, file: Path, *, digest: str | None = None, **facts: Any) -> Part:
        """Take a finished file for a part: it becomes a read-only object, under a second name if that is possible.

        Whoever wrote the file may have taken its ``digest`` on the way.
        """
        digest = digest or digest_file(file)
        self.remember_all(kind, [(document, file, digest, facts)])
        return Part(self._store.path(digest), facts)

    def remember_all(self, kind: str, parts: Sequence[NewPart]) -> None:
        """Do the same for several (document, file, digest, facts): they are known at once, after one commit."""
        found: list[tuple[str, str, PartEntry]] = []
        for document, file, digest, facts in parts:
            size = file.stat().st_size
            if self._store.share(file, digest):
                with self._lock:
                    self._made.add(digest)
            entry: PartEntry = {"schema": PART_SCHEMA, "kind": kind, "digest": digest, "size": size, "facts": facts}
            found.append((self._name(kind, document), file.name, entry))
        self._keep(kind, found)
        for name, _, entry in found:
            self._count("made", name, entry)

    def take(self, kind: str, entries: Mapping[str, PartEntry]) -> None:
        """Take parts that other machines made for this execution, and whose objects are here already."""
        with self._lock:
            self._taken.update(entries)
            self._made.update(entry["digest"] for entry in entries.values())
        self._keep(kind, [(name, entry["digest"][:16], entry) for name, entry in entries.items()])

    def _keep(self, kind: str, found: Sequence[tuple[str, str, PartEntry]]) -> None:
        """Let the index know parts (name, what a warning calls it, entry), but for what it has otherwise and intact."""
        entries: dict[str, PartEntry] = {}
        for name, shown, entry in found:
            known, digest = self._entry(name), entry["digest"]
            if known is None or (known["digest"] != digest and self._store.verify(known["digest"]) is not None):
                entries[name] = entry
            elif known["digest"] != digest:
                with self._lock:
                    self._differing.append(f"{kind} {shown}")
        # Code that was edited since it was digested may be what was imported: what it made is for this run alone.
        if self._codes[kind].is_unchanged():
            self._store.index.set_all(entries)

    def _name(self, kind: str, document: JsonObject) -> str:
        """Return the name under which the index knows a part."""
        if kind not in self._codes:
            raise ValueError(f"'{kind}' is no kind of part that the stage declares (Stage.parts)")
        return f"part:{digest_json([kind, self._codes[kind].digest, document])}"

    def _entry(self, name: str) -> PartEntry | None:
        entry = self._store.index.get(name)
        return cast("PartEntry", entry) if is_part(entry) else None

    def warnings(self) -> list[str]:
        """Say which parts were made otherwise than those that are kept for the same code and document."""
        if not self._differing:
            return []
        more = f" and {len(self._differing) - SHOWN} more" if len(self._differing) > SHOWN else ""
        what = f"made again, {', '.join(self._differing[:SHOWN])}{more} differ from what is kept for the same code and "
        return [f"{what}inputs: not deterministic. This result has the new ones, others keep theirs"]

    @property
    def damaged(self) -> list[str]:
        """The objects found damaged, which are in quarantine now."""
        return self._store.damaged

    def _count(self, how: str, name: str, entry: PartEntry) -> None:
        with self._lock:
            self.counts.setdefault(entry["kind"], Counter(reused=0, made=0))[how] += 1
            self._used.add(entry["digest"])
            self.entries[name] = entry

    def settle(self) -> dict[tuple[int, int], str]:
        """Sync the new objects that became outputs; return every part's (device, inode) -> digest."""
        known = {}
        for digest in sorted(self._used):
            path = self._store.path(digest)
            try:
                status = path.stat()
            except OSError:
                continue  # removed meanwhile: an output that is a link of it is digested like any other
            known[status.st_dev, status.st_ino] = digest
            if digest in self._made and status.st_nlink > 1:
                fsync_file(path)
                self._store.remember(digest)
        return known
