"""The index: small JSON documents by name, shared by every process that works on one store.

Kinds of document, by the prefix of their name:
``rec:<key>`` the record of one execution; writing it is the commit of a node
``alt:<digest>`` the record of an execution that another one of its key has taken the place of, and differs from
``part:<digest>`` the object of a part that a stage memoised
``last:<pipeline>/<node>`` the key of the last finished execution of a node, and of the last failed attempt
``mat:<pipeline>/<node>`` what was materialised: key, and the stats of its files, directories and objects
``obj:<digest>`` the stat of a verified object   ``src:<path>`` stat and digest of a source file
``text:<digest>`` source text of a module by the digest that stands for it in keys
``gone:<pipeline>`` that ``gc`` found results of a pipeline and no file
``spec:<number>`` a pipeline as it was read last
``code`` summaries of source modules   ``memo:<name>`` small facts about tools

Records and parts are files (:mod:`stagegraph.store.documents`); all else is a cache in one database, which can be lost
at the cost of digesting, and of placing outputs, again. So a database that cannot be read is set aside and begun anew,
and one that cannot be written (a full or read-only disk, a lock) is left as it is: neither costs a result or ends a
run. Every document is sealed, and one that is not what was written is as good as none.

diskcache owns the database and does all writing; reading goes straight to its one table, because a run without news
should pay neither for the import nor for the settings it writes on opening.
"""

from __future__ import annotations

import contextlib
import errno
import sqlite3
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import RLock, Timer, get_ident
from typing import TYPE_CHECKING, Any

from stagegraph.errors import warn
from stagegraph.store.documents import DamagedError, Documents, intact, seal, unseal

if TYPE_CHECKING:
    import diskcache

    from stagegraph.stage import Json, JsonObject

BUSY_SECONDS = 60
NO_UTF8 = "\ufffd"  # in a text that was decoded with it in place of what is none
SAID_AFTER = 3  # seconds of waiting without a word
# What a database that another process is just creating answers: there is no file, or no table, yet.
NOTHING_YET = {sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_ERROR}
UNREADABLE = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}


class Index:
    """Documents by name: files beside ``directory`` and one SQLite database in it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.files = Documents(directory.parent)
        self.set_aside: Path | None = None
        self.damaged: set[str] = set()  # names of documents that were read and not believed
        self._ahead: dict[str, str] = {}  # texts of documents that were read before they were asked for
        self._readonly = False
        self._pending: dict[str, Json] | None = None  # documents that wait for the end of together()
        self._early: dict[str, Json] = {}  # documents from before there was a store, written with the next
        self._holder = 0  # the thread in it
        self._reader: sqlite3.Connection | None = None
        self._writer: diskcache.Cache | None = None
        self._lock = RLock()  # threads share it (a memo's do): one at a time opens the database or reads

    def get(self, name: str) -> Any:
        """Return the document, or None if there is none or it is damaged."""
        if self.files.owns(name):
            found = self.files.get(name)
            if found is not None:
                return found
        pending = self._pending
        if pending is not None and name in pending:
            return pending[name]
        text: str | None
        if name in self._ahead:
            text = self._ahead.pop(name)
        else:
            rows = self._rows("SELECT value FROM Cache WHERE key = ? AND raw = 1", _row_name(name))
            text = rows[0][0] if rows else None
        try:
            return unseal(name, text) if text is not None else None
        except DamagedError:
            self.damaged.add(name)
            return None

    def read_ahead(self, *prefixes: str) -> None:
        """Read every document of these names at once, each for its next ``get``: asking one by one takes far longer."""
        for prefix in prefixes:
            query = "SELECT key, value FROM Cache WHERE key >= ? AND key < ? AND raw = 1"
            self._ahead.update(self._rows(query, prefix, f"{prefix}\U0010ffff"))

    def set(self, name: str, document: Any) -> None:
        """Write a document; atomic, visible to other processes at once. What is a file is written, or raises."""
        self.set_all({name: document})

    def set_all(self, documents: JsonObject) -> None:
        """Write documents by name; those in the database all or none, in one commit, which takes as long as many."""
        cached = {}
        for name, document in documents.items():
            self._ahead.pop(name, None)
            if self.files.owns(name):
                self.files.set(name, document)
            else:
                cached[name] = document
        if self._pending is not None and get_ident() == self._holder:
            self._pending.update(cached)
        elif cached and not self.directory.parent.is_dir():  # where nothing was ever run, nothing is kept
            self._early.update(cached)
        elif cached:
            cached, self._early = self._early | cached, {}
            rows = {_row_name(name): seal(name, document) for name, document in cached.items()}
            self._change(lambda cache: [cache.set(name, text) for name, text in rows.items()])

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Write what is set meanwhile to the database in one commit at the end; ``get`` knows it at once.

        For the documents that begin and end nodes: a commit for each would take most of the engine's time. Within
        another ``together`` of the same thread it is part of that.
        """
        if self._pending is not None and self._holder == get_ident():
            yield
            return
        self._pending, self._holder = {}, get_ident()
        try:
            yield
        finally:
            pending, self._pending = self._pending, None
            self.set_all(pending)

    def delete(self, name: str) -> None:
        """Forget a document; no error if there is none."""
        self.delete_all([name])

    def delete_all(self, names: Sequence[str]) -> None:
        """Forget some hundred documents at most, in one commit; no error for those that are not there."""
        for name in names:
            self._ahead.pop(name, None)
            if self._pending is not None:
                self._pending.pop(name, None)
        self.files.delete_all([name for name in names if self.files.owns(name)])
        rows = [_row_name(name) for name in names]
        # Most of many are no rows: documents that are files, objects that were never verified.
        query = f"SELECT key FROM Cache WHERE raw = 1 AND key IN ({', '.join('?' * len(rows))})"  # noqa: S608 - marks
        known = [row for (row,) in self._rows(query, *rows)]
        if known:
            self._change(lambda cache: [cache.delete(row) for row in known])

    def version(self) -> int:
        """Return a number that is another one whenever something was written to the database since it was asked."""
        rows = self._rows("PRAGMA data_version")
        return int(rows[0][0]) if rows else 0

    def names(self, prefix: str) -> Iterator[str]:
        """Yield the names that begin with ``prefix``."""
        seen: set[str] = set()
        if self.files.owns(prefix):
            seen.update(self.files.names(prefix))
            yield from sorted(seen)
        yield from (name for name in self._names(prefix) if name not in seen)

    def _names(self, prefix: str) -> list[str]:
        last = f"{prefix}\U0010ffff"
        rows = self._rows("SELECT key FROM Cache WHERE key >= ? AND key < ? AND raw = 1", prefix, last)
        return [name for (name,) in rows if isinstance(name, str)]

    def move_to_files(self) -> None:
        """Make files of the records and parts that a store of an earlier version has in its database."""
        for prefix in ("rec:", "part:"):
            for name in self._names(prefix):
                document = self.get(name)
                if document is not None and self.files.path(name) is not None and self.files.get(name) is None:
                    self.files.set(name, document)
                self._change(lambda cache, name=name: cache.delete(name))

    def problem(self) -> str | None:
        """Read the whole database; return what is wrong with it, if anything."""
        if not (self.directory / "cache.db").exists():
            return None
        try:
            with self._lock:
                ((verdict, *_), *_) = self._reading().execute("PRAGMA quick_check(1)").fetchall()
                for name, text in self._reading().execute("SELECT key, value FROM Cache WHERE raw = 1"):
                    try:
                        if NO_UTF8 not in str(name) and intact(str(name), text) is text:  # such a row is nobody's
                            unseal(str(name), text)
                    except DamagedError:
                        self.damaged.add(str(name))
        except sqlite3.DatabaseError as error:
            return str(error)
        if verdict != "ok":
            return str(verdict)
        return f"{len(self.damaged)} of its documents are damaged" if self.damaged else None

    def begin_anew(self) -> None:
        """Set the database aside."""
        with self._lock:
            self.close()
            aside = self.directory.with_name(f"{self.directory.name}.damaged-{time.time_ns()}")
            self.directory.rename(aside)
            self.set_aside = aside
            self.damaged.clear()

    def close(self) -> None:
        """Release the database."""
        if self._reader is not None:
            self._reader.close()
        if self._writer is not None:
            with contextlib.suppress(sqlite3.Error):
                self._writer.close()
        self._reader = self._writer = None

    # -- the database ------------------------------------------------------------------------------------------------

    def _rows(self, query: str, *values: str) -> list[tuple[Any, ...]]:
        with self._lock:
            for again in (True, False):
                try:
                    return self._reading().execute(query, values).fetchall()
                except sqlite3.DatabaseError as error:
                    if _code(error) in NOTHING_YET:
                        break
                    if _code(error) not in UNREADABLE:
                        raise
                    self._mend(error, again=again)
            return []

    def _reading(self) -> sqlite3.Connection:
        if self._reader is None:
            path = (self.directory / "cache.db").absolute()
            self._reader = self._connect(path, "mode=rw")
            try:
                self._reader.execute("SELECT 1 FROM Cache LIMIT 1").fetchall()
            except sqlite3.OperationalError as error:
                # Nobody may write beside it, as reading a database that is shared takes: then nobody else does.
                if _code(error) not in {sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY} or not path.exists():
                    raise
                self._reader = self._connect(path, "mode=ro&immutable=1")
        return self._reader

    @staticmethod
    def _connect(path: Path, options: str) -> sqlite3.Connection:
        reader = sqlite3.connect(
            f"{path.as_uri()}?{options}", BUSY_SECONDS, isolation_level=None, check_same_thread=False, uri=True
        )
        reader.text_factory = lambda text: text.decode(errors="replace")  # damaged, and said so by its seal
        return reader

    def _change(self, change: Any) -> None:
        """Write to the database, if it can be; once it could not, this process tries no more."""
        if self._readonly or not self.directory.parent.is_dir():  # where nothing was ever run, nothing is kept
            return
        import diskcache

        for again in (True, False, None):
            try:
                self._transact(change)
            except diskcache.Timeout:
                self._give_up(f"it was locked for {BUSY_SECONDS} s")
            except sqlite3.DatabaseError as error:
                if _code(error) in UNREADABLE and again is not None:
                    self._mend(error, again=again)
                    continue
                self._give_up(str(error), quietly=_code(error) == sqlite3.SQLITE_READONLY)
            except OSError as error:
                self._give_up(error.strerror or str(error), quietly=error.errno in {errno.EACCES, errno.EROFS})
            return

    def _transact(self, change: Any) -> None:
        """Write to the database in one commit; what it waits for, if another process keeps it locked, is said.

        Only writing waits: reading never does.
        """
        import diskcache

        cache = self._writing()
        until, reported = time.monotonic() + BUSY_SECONDS, False
        while True:
            try:
                with cache.transact():
                    change(cache)
                    return
            except diskcache.Timeout:
                if time.monotonic() >= until:
                    raise
                if not reported:
                    self._say_locked()
                reported = True

    def _say_locked(self) -> None:
        warn(f"another process keeps the index {self.directory} locked; waiting for it, at most {BUSY_SECONDS} s")

    def _give_up(self, why: str, *, quietly: bool = False) -> None:
        self._readonly = True
        if self._writer is not None:
            with contextlib.suppress(sqlite3.Error):
                self._writer.close()  # a transaction whose commit failed would keep everybody else from writing
            self._writer = None
        if not quietly:
            warn(f"the index {self.directory} could not be written ({why}); no result is lost by that")

    def _writing(self) -> diskcache.Cache:
        with self._lock:
            if self._writer is None:
                try:
                    self._writer = self._open_writer()
                except (TypeError, ValueError, KeyError, AttributeError) as error:
                    self._mend(error, again=False)  # settings of a format before this one, or damaged
                    self._writer = self._open_writer()
            return self._writer

    def _open_writer(self) -> diskcache.Cache:
        import diskcache

        timer = Timer(SAID_AFTER, self._say_locked)  # opening waits for a minute by itself
        timer.daemon = True
        timer.start()
        try:
            return diskcache.Cache(
                str(self.directory),
                min(SAID_AFTER, BUSY_SECONDS),
                disk_min_file_size=1 << 30,  # bytes: every value is a row, none a file of its own
                eviction_policy="none",
                cull_limit=0,
                size_limit=1 << 62,
            )
        finally:
            timer.cancel()

    def _mend(self, why: Exception, *, again: bool) -> None:
        """Open a database that cannot be read ``again``, as another process may have mended it; else set it aside."""
        self.close()
        if again:
            return
        try:
            self.begin_anew()
        except OSError:  # it may not be moved: it stays, and is not asked again
            self._give_up(str(why))
            self._reader = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        else:
            warn(f"the index could not be read ({why}); it was set aside as {self.set_aside} and is begun anew")


def _row_name(name: str) -> str:
    """Return a name as a database can hold it: of a path that is not UTF-8, with its odd bytes written out."""
    return name.encode(errors="backslashreplace").decode()


def _code(error: sqlite3.DatabaseError) -> int:
    return int(getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT)) & 0xFF
