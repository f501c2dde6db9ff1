"""The index: small JSON documents by name, shared by every process that works on one store.

Kinds of document, by the prefix of their name:
``rec:<key>`` the record of one execution; writing it is the commit of a node
``last:<pipeline>/<node>`` the key of the last finished execution of a node, and of the last failed attempt
``mat:<pipeline>/<node>`` what was materialised: key, and the stats of its files, directories and objects
``obj:<digest>`` the stat of a verified object   ``src:<path>`` stat and digest of a source file
``part:<digest>`` the object of a part that a stage memoised
``text:<digest>`` source text of a module by the digest that stands for it in keys
``code`` summaries of source modules   ``memo:<name>`` small facts about tools

Values are JSON (never pickle), nothing is ever evicted. A database that cannot be read is set aside and begun anew:
what it knew is rebuilt, nothing crashes. diskcache owns the database and does all writing; reading goes straight to
its one table, because a run without news should pay neither for the import nor for the settings it writes on opening.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import diskcache

BUSY_SECONDS = 60
# What a database that another process is just creating answers: there is no file, or no table, yet.
NOTHING_YET = {sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_ERROR}


class Index:
    """Documents by name in one SQLite database under ``directory``."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.set_aside: Path | None = None
        self._reader: sqlite3.Connection | None = None
        self._writer: diskcache.Cache | None = None
        self._lock = Lock()  # threads share it (a memo's do): one at a time opens the database or reads

    def get(self, name: str) -> Any:
        """Return the document, or None if there is none or it cannot be decoded."""
        rows = self._rows("SELECT value FROM Cache WHERE key = ? AND raw = 1", name)
        try:
            return json.loads(rows[0][0]) if rows else None
        except (ValueError, TypeError):
            return None

    def set(self, name: str, document: Any) -> None:
        """Write a document; atomic, visible to other processes at once."""
        self.set_all({name: document})

    def set_all(self, documents: Mapping[str, Any]) -> None:
        """Write documents by name, all or none; one commit, which takes as long as many of them."""
        texts = {name: json.dumps(document) for name, document in documents.items()}
        try:
            self._write(texts)
        except sqlite3.DatabaseError as error:
            self._begin_anew(error)
            self._write(texts)

    def _write(self, texts: Mapping[str, str]) -> None:
        cache = self._writing()
        with cache.transact():
            for name, text in texts.items():
                cache.set(name, text)

    def delete(self, name: str) -> None:
        """Forget a document; no error if there is none."""
        self._writing().delete(name)

    def names(self, prefix: str) -> Iterator[str]:
        """Yield the names that begin with ``prefix``."""
        last = f"{prefix}\U0010ffff"
        for (name,) in self._rows("SELECT key FROM Cache WHERE key >= ? AND key < ? AND raw = 1", prefix, last):
            yield name

    def close(self) -> None:
        """Release the database."""
        if self._reader is not None:
            self._reader.close()
        if self._writer is not None:
            self._writer.close()
        self._reader = self._writer = None

    def _rows(self, query: str, *values: str) -> list[tuple[Any, ...]]:
        with self._lock:
            try:
                return self._reading().execute(query, values).fetchall()
            except sqlite3.DatabaseError as error:
                if (error.sqlite_errorcode & 0xFF) not in NOTHING_YET:
                    self._begin_anew(error)
                return []

    def _reading(self) -> sqlite3.Connection:
        if self._reader is None:
            address = f"{(self.directory / 'cache.db').absolute().as_uri()}?mode=rw"
            self._reader = sqlite3.connect(
                address, BUSY_SECONDS, isolation_level=None, check_same_thread=False, uri=True
            )
        return self._reader

    def _writing(self) -> diskcache.Cache:
        with self._lock:
            if self._writer is None:
                try:
                    self._writer = self._open_writer()
                except TypeError:  # settings of the format before this one, whose documents cannot be read
                    self._set_aside()
                    self._writer = self._open_writer()
            return self._writer

    def _open_writer(self) -> diskcache.Cache:
        import diskcache

        return diskcache.Cache(
            str(self.directory),
            BUSY_SECONDS,
            disk_min_file_size=1 << 30,  # bytes: every value is a row, none a file of its own
            eviction_policy="none",
            cull_limit=0,
            size_limit=1 << 62,
        )

    def _begin_anew(self, error: sqlite3.DatabaseError) -> None:
        """Set a damaged database aside; anything else (a full disk, a lock) is the caller's to report."""
        if (error.sqlite_errorcode & 0xFF) not in {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}:
            raise error
        self._set_aside()

    def _set_aside(self) -> None:
        self.close()
        self.set_aside = self.directory.with_name(f"{self.directory.name}.damaged-{time.time_ns()}")
        self.directory.rename(self.set_aside)
