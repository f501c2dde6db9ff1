"""One ``artifacts/`` directory: store, index, journal, locks, logs, and the materialised outputs people look at.

Layout: ``<pipeline>/<node>/`` holds the files of a node's outputs; everything else lives under ``.stagegraph/``.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Container, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, cast

from stagegraph.digest import digest_json, stat_id
from stagegraph.errors import REMOVE, StoreError
from stagegraph.files import dotted, remove_tree
from stagegraph.store.folders import folder_times, real_directories, remove_strays, stat_or_none
from stagegraph.store.index import Index
from stagegraph.store.journal import Journal, LastResult
from stagegraph.store.locks import Locks
from stagegraph.store.objects import Store
from stagegraph.store.record import (
    KnownRecord,
    Record,
    brief,
    is_newer,
    is_record_of,
    other_name,
    record_files,
    result_digest,
)

FOLDERS = ("objects", "records", "others", "parts", "index", "logs", "failed", "work", "locks", "running", "quarantine")

if TYPE_CHECKING:
    from typing import Unpack

    from stagegraph.stage import JsonObject
    from stagegraph.store.memo import PartEntry


class Materialised(TypedDict, total=False):
    """What is known of a node's directory: the ``key`` that it shows, and by what it is told that nothing changed.

    ``files`` are name -> [digest, stat], ``folders`` name -> time of change, ``objects`` digest -> stat of the object,
    ``record`` the stat of the key's record and what it says.
    """

    key: str
    files: dict[str, list[Any]]
    folders: dict[str, int]
    objects: dict[str, list[int] | None]
    record: tuple[list[int], JsonObject]


class Workspace(Locks):
    """Everything under one ``artifacts/`` directory."""

    def __init__(self, artifacts: Path) -> None:
        self.artifacts = artifacts
        self._artifacts = str(artifacts)
        super().__init__(artifacts / ".stagegraph")
        self.index = Index(self.root / "index")
        self.store = Store(self.root, self.index)
        self.journal = Journal(self.root / "journal.jsonl")
        self._materialised: dict[str, Materialised] = {}
        self._lasts: dict[str, LastResult] = {}
        self.work = self.root / "work"
        self.failed = self.root / "failed"
        self._secret_key: bytes | None = None
        self._may_make_key = False

    def create(self) -> None:
        """Make the directories; looking at a pipeline that was never run makes none."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(
                f"{error.filename or self.root}: {error.strerror}; artifacts/ must be a writable directory"
            ) from None
        self._may_make_key = True

    def check_folders(self) -> None:
        """Raise :class:`StoreError` where a file, or a link to none, is in the place of a folder of the store."""
        places = [self.root / name for name in FOLDERS]
        wrong = [path for path in places if os.path.lexists(path) and not path.is_dir()]
        if wrong:
            raise StoreError(*(f"{path}: is no folder; {REMOVE}" for path in wrong))

    def secret_key(self, like: Workspace | None = None) -> bytes:
        """Return the key with which secrets are digested: the store's own, made by its first run, or that of another.

        Whoever only looks at a store without one gets one that no result was made with.
        """
        from stagegraph.store.secret_key import KEY_BYTES, load_key

        if like is not None:
            self._secret_key, self._may_make_key = like.secret_key(), False
        new = self._secret_key or os.urandom(KEY_BYTES)
        found = load_key(self.root / "secret.key", new if self._may_make_key else None)
        self._secret_key = found or new
        return self._secret_key

    def close(self) -> None:
        """Release the index."""
        self.index.close()

    # -- records ---------------------------------------------------------------------------------------------------

    def record(self, key: str, result: str = "") -> Record | None:
        """Return the record of a key, or None if there is none that can be believed.

        ``result`` asks for one result of it (:func:`~stagegraph.store.record.result_digest`), should there be several.
        :class:`StoreError` for one that a newer version wrote: what it says may mean something else here.
        """
        record = self._record(f"rec:{key}", key)
        if record is not None and result not in {"", result_digest(record)}:
            return self._record(other_name(key, result), key)
        return record

    def _record(self, name: str, key: str) -> Record | None:
        record: Record | None = self.index.get(name)
        if record is None or is_record_of(record, key):
            return record
        if is_newer(record):
            raise StoreError(
                f"{self.root} has results of a newer version of stagegraph (a record of schema {record['schema']}); "
                "use that version, or another directory"
            )
        self.index.damaged.add(name)
        return None

    def shown_record(self, pipeline: str, node: str, key: str) -> Record | None:
        """Return the record of a key if the node's directory shows its result, and nothing has changed since: neither
        the record's file, nor an object, nor what is shown. That is asked of every node of a run without news.
        """
        known = self._shown(pipeline, node)
        if known.get("key") != key or "record" not in known:
            return None
        shown, (stat, text) = f"{self._artifacts}/{pipeline}/{dotted(node)}", known["record"]
        try:
            same = (
                list(stat_id(f"{self._root}/records/{key[:2]}/{key}")) == stat
                and all(list(stat_id(self.store.file(digest))) == was for digest, was in known["objects"].items())
                and all(list(stat_id(f"{shown}/{name}")) == was for name, (_, was) in known["files"].items())
                and all(stat_id(f"{shown}/{name}")[3] == was for name, was in known["folders"].items())
            )
        except (OSError, KeyError):  # an earlier version knew less of a directory
            return None
        return cast("Record", KnownRecord(text, lambda: self.record(key))) if same else None

    def _record_stat(self, key: str) -> list[int] | None:
        return stat_or_none(f"{self._root}/records/{key[:2]}/{key}")

    def keep_other(self, key: str) -> None:
        """Keep the record of a key beside the one that will take its place: made from the same, and not the same."""
        record = self.record(key)
        if record is not None:
            self.index.set(other_name(key, result_digest(record)), record)

    def others(self, key: str = "") -> Iterator[tuple[str, Record]]:
        """Yield the results, with their names in the index, that others of their key took the place of."""
        for name in self.index.names("alt:"):
            found = self.index.get(name)
            stored_key = found.get("key") if isinstance(found, dict) else None
            if isinstance(stored_key, str) and stored_key.startswith(key) and is_record_of(found, stored_key):
                current = self.record(stored_key)
                if current is None or result_digest(current) != result_digest(found):
                    yield name, found

    def is_damaged(self, key: str) -> bool:
        """Say whether the record of a key was looked for and found damaged."""
        return f"rec:{key}" in self.index.damaged | self.index.files.damaged

    def records(self) -> Iterator[Record]:
        """Yield every record there is."""
        for name in self.index.names("rec:"):
            record = self.record(name.removeprefix("rec:"))
            if record is not None:
                yield record

    def last(self, pipeline: str, node: str) -> LastResult:
        """Return what is remembered of a node: see :class:`~stagegraph.store.journal.LastResult`."""
        name = f"last:{pipeline}/{node}"
        if name not in self._lasts:
            known: LastResult | None = self.index.get(name)
            self._lasts[name] = known if isinstance(known, dict) else self._journaled.get((pipeline, node), {})
        return self._lasts[name]

    @cached_property
    def _journaled(self) -> dict[tuple[str, str], LastResult]:
        """What the journal says of every node's last result and failure: where the index does not know, or is new."""
        return self.journal.last_results()

    def lasts(self) -> dict[str, LastResult]:
        """Return what is remembered of every node there ever was: ``pipeline/node`` -> as :meth:`last`."""
        nodes = {tuple(name.removeprefix("last:").split("/", 1)) for name in self.index.names("last:")}
        return {
            f"{pipeline}/{node}": self.last(pipeline, node) for pipeline, node in sorted(nodes | {*self._journaled})
        }

    def read_ahead(self, pipeline: str) -> None:
        """Read what is known of all nodes of a pipeline at once."""
        self.index.read_ahead(f"last:{pipeline}/", f"mat:{pipeline}/")

    def last_record(self, pipeline: str, node: str) -> Record | None:
        """Return the record of the last finished execution or hit of a node, or None."""
        key = self.last(pipeline, node).get("key")
        return self.record(key) if key else None

    def set_last(self, pipeline: str, node: str, **facts: Unpack[LastResult]) -> None:
        """Remember a key of a node: of its result, of its failure, or of what runs."""
        old = self.last(pipeline, node)
        new: LastResult = facts if "key" in facts else {**old, **facts}
        if old != new:
            self.index.set(f"last:{pipeline}/{node}", new)
            self._lasts[f"last:{pipeline}/{node}"] = new

    def lost_files(self, pipeline: str, node: str, record: Record) -> list[str]:
        """Return what is missing or damaged among the objects of a record, as reasons.

        Their stats are remembered together with the node's directory, so that a no-op asks the index once a node.
        """
        known = self._shown(pipeline, node).get("objects", {})
        lost = []
        for name, (digest, _) in record_files(record).items():
            if known.get(digest) == stat_or_none(self.store.file(digest)) is not None:
                continue
            wrong = self.store.verify(digest)
            if wrong:
                lost.append(f"stored {name} was {wrong}")
        return lost

    def _shown(self, pipeline: str, node: str) -> Materialised:
        """Return what is known of a node's directory; read once a run."""
        name = f"mat:{pipeline}/{node}"
        if name not in self._materialised:
            known: Materialised | None = self.index.get(name)
            self._materialised[name] = known if isinstance(known, dict) else {}
        return self._materialised[name]

    def parts(self) -> Iterator[tuple[str, PartEntry]]:
        """Yield the index's name of every memoised part, and its entry: kind, digest of its object, size in bytes."""
        from stagegraph.store.memo import is_part

        for name in self.index.names("part:"):
            entry: PartEntry | None = self.index.get(name)
            if is_part(entry):
                yield name, cast("PartEntry", entry)

    # -- materialised outputs --------------------------------------------------------------------------------------

    def node_dir(self, pipeline: str, node: str) -> Path:
        """Return the directory that shows a node's outputs."""
        return self.artifacts / pipeline / dotted(node)

    def materialise(
        self, pipeline: str, node: str, key: str, record: Record, verified: Container[str] = ()
    ) -> list[str]:
        """Make the node's directory hold exactly this record's files; return the names that had to be restored.

        :class:`~stagegraph.store.objects.RottenError` if an object turns out damaged; those ``verified`` just now, by
        digest, are not looked at.
        """
        shown = f"{self._artifacts}/{pipeline}/{dotted(node)}"
        known = self._shown(pipeline, node)
        if known and not os.path.exists(shown):  # noqa: PTH110 - on the path of every hit
            with contextlib.suppress(OSError):  # as earlier versions called it
                Path(shown).with_name(node).rename(shown)
        fresh = known.get("key") != key
        wanted = record_files(record)
        have = known.get("files", {})
        restored = []
        files: dict[str, list[Any]] = {}
        for name, (digest, _) in wanted.items():
            now = stat_or_none(f"{shown}/{name}")
            if have.get(name) == [digest, now] or self._is_in_place(have.get(name), digest, f"{shown}/{name}"):
                files[name] = [digest, now]
            else:
                restored.append(name)
        folders = folder_times(shown, wanted)
        objects = self._object_stats(wanted)
        if not restored and not fresh and (folders, objects) == (known.get("folders"), known.get("objects")):
            if stat := self._record_stat(key):
                self._know(pipeline, node, {**known, "record": (stat, brief(record))})
            return []
        with self.locked(f"node-{digest_json([pipeline, node])}", wait=True):  # one run at a time in one directory
            for parent in dict.fromkeys(f"{dotted(node)}/{name}".rpartition("/")[0] for name in wanted):
                real_directories(self._artifacts, f"{pipeline}/{parent}")
            # What was in place behind a link to a folder is not any more, and nothing behind it is touched.
            restored += [name for name in files if not os.path.lexists(f"{shown}/{name}")]
            for name in restored:
                self.store.place(wanted[name][0], f"{shown}/{name}", known=wanted[name][0] in verified)
                files[name] = [wanted[name][0], list(stat_id(f"{shown}/{name}"))]
            strays = remove_strays(shown, wanted)
            state: Materialised = {"key": key, "files": files, "folders": folder_times(shown, wanted)}
            state["objects"] = self._object_stats(wanted)
            if stat := self._record_stat(key):
                state["record"] = (stat, brief(record))
            self._know(pipeline, node, state)
        return [] if fresh else restored + strays

    def _object_stats(self, wanted: Mapping[str, tuple[str, int]]) -> dict[str, list[int] | None]:
        return {digest: stat_or_none(self.store.file(digest)) for digest, _ in wanted.values()}

    def _know(self, pipeline: str, node: str, state: Materialised) -> None:
        self.index.set(f"mat:{pipeline}/{node}", state)
        self._materialised[f"mat:{pipeline}/{node}"] = state

    def is_shown(self, pipeline: str, node: str, key: str, record: Record) -> bool:
        """Say whether the node's directory holds this record's files as they were put there."""
        known = self._shown(pipeline, node)
        folder = self.node_dir(pipeline, node)
        wanted = record_files(record)
        have = known.get("files", {})
        same = all(self._is_in_place(have.get(n), digest, folder / n) for n, (digest, _) in wanted.items())
        return same and known.get("key") == key and known.get("folders") == folder_times(str(folder), wanted)

    def unshown(self, pipeline: str, node: str, record: Record) -> dict[str, int]:
        """Return the files of a record that a run would have to put into the node's directory: name -> bytes."""
        have = self._shown(pipeline, node).get("files", {})
        folder = self.node_dir(pipeline, node)
        return {
            name: size
            for name, (digest, size) in record_files(record).items()
            if not self._is_in_place(have.get(name), digest, folder / name)
        }

    @contextlib.contextmanager
    def checkout(self, files: Mapping[str, tuple[str, int]]) -> Iterator[Path]:
        """Show stored files, name -> (digest, size), in a directory of their own meanwhile."""
        with self.scratch("checkout") as target:
            for file, (digest, _) in files.items():
                (target / file).parent.mkdir(parents=True, exist_ok=True)
                self.store.place(digest, target / file)
            yield target

    @contextlib.contextmanager
    def scratch(self, purpose: str) -> Iterator[Path]:
        """Lend an empty directory meanwhile, which no sweep of another run takes for one left behind."""
        name = f"{purpose}-{os.getpid()}"
        target = self.work / name
        with self.locked(name, wait=True):
            try:
                target.mkdir(parents=True)
                yield target
            finally:
                remove_tree(target)

    def _is_in_place(self, known: Any, digest: str, target: str | Path) -> bool:
        """Say whether a file is as it was put there, or its object under another name: links to it come and go."""
        if known == [digest, stat_or_none(target)]:
            return True
        return bool(known) and known[0] == digest and self.store.is_object(digest, target)

    # -- work and logs --------------------------------------------------------------------------------------------

    def log_path(self, key: str) -> Path:
        """Return the file that captures what an execution of this key prints."""
        return Path(f"{self._root}/logs/{key[:2]}/{key}.log")

    def sweep(self) -> None:
        """Remove the work directories that killed runs left behind; those in use are locked and stay."""
        self.index.move_to_files()
        if self.work.is_dir():
            for folder in self.work.iterdir():
                with contextlib.suppress(OSError), self.locked(folder.name, wait=False) as free:
                    if free:
                        remove_tree(folder)

    def keep_failed(self, folder: Path, pipeline: str, node: str) -> Path:
        """Keep the work directory of a failure (the last one of each node) and return where it is."""
        target = self.failed / pipeline / dotted(node)
        remove_tree(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(target)
        with contextlib.suppress(OSError):
            folder.parent.rmdir()
        return target
