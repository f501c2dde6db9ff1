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
what it knew is rebuilt, nothing crashes.
"""

from __future__ import annotations

import sqlite3
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diskcache

UNLIMITED = 1 << 62


class Index:
    """Documents by name in one SQLite database under ``directory``."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.set_aside: Path | None = None
        try:
            self._cache = self._open()
        except sqlite3.DatabaseError as error:
            self._begin_anew(error)

    def _open(self) -> diskcache.Cache:
        return diskcache.Cache(
            str(self.directory),
            disk=diskcache.JSONDisk,
            disk_compress_level=1,
            eviction_policy="none",
            cull_limit=0,
            size_limit=UNLIMITED,
        )

    def _begin_anew(self, error: sqlite3.DatabaseError) -> None:
        """Set a damaged database aside; anything else (a full disk, a lock) is the caller's to report."""
        if (error.sqlite_errorcode & 0xFF) not in {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}:
            raise error
        self.set_aside = self.directory.with_name(f"{self.directory.name}.damaged-{time.time_ns()}")
        self.directory.rename(self.set_aside)
        self._cache = self._open()

    def get(self, name: str) -> Any:
        """Return the document, or None if there is none or it cannot be decoded."""
        try:
            return self._cache.get(name)
        except (ValueError, zlib.error, OSError):
            return None
        except sqlite3.DatabaseError as error:
            self._begin_anew(error)
            return None

    def set(self, name: str, document: Any) -> None:
        """Write a document; atomic, visible to other processes at once."""
        try:
            self._cache.set(name, document)
        except sqlite3.DatabaseError as error:
            self._begin_anew(error)
            self._cache.set(name, document)

    def delete(self, name: str) -> None:
        """Forget a document; no error if there is none."""
        self._cache.delete(name)

    def names(self, prefix: str) -> Iterator[str]:
        """Yield the names that begin with ``prefix``."""
        for name in self._cache.iterkeys():
            if isinstance(name, str) and name.startswith(prefix):
                yield name

    def close(self) -> None:
        """Release the database."""
        self._cache.close()
