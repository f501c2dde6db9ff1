"""The index: small JSON documents by name, shared by every process that works on one store.

Kinds of document, by the prefix of their name:
``rec:<key>`` the record of one execution; writing it is the commit of a node
``last:<pipeline>/<node>`` the key of the last finished execution of a node, and of the last failed attempt
``mat:<pipeline>/<node>`` what was materialised: key, and the stats of its files, directories and objects
``obj:<digest>`` the stat of a verified object   ``src:<path>`` stat and digest of a source file
``code`` summaries of source modules   ``memo:<name>`` small facts about tools

Values are JSON (never pickle), nothing is ever evicted. A database that cannot be read is set aside and begun anew:
what it knew is rebuilt, nothing crashes.
"""

from __future__ import annotations

import sqlite3
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
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
            if isinstance(error, sqlite3.OperationalError) and "locked" in str(error):
                raise
            self.set_aside = directory.with_name(f"{directory.name}.damaged-{int(time.time())}")
            directory.rename(self.set_aside)
            self._cache = self._open()

    def _open(self) -> diskcache.Cache:
        cache = diskcache.Cache(
            str(self.directory),
            disk=diskcache.JSONDisk,
            disk_compress_level=1,
            eviction_policy="none",
            cull_limit=0,
            size_limit=UNLIMITED,
        )
        cache.get("code")  # a damaged page shows now, not in the middle of a run
        return cache

    def get(self, name: str) -> Any:
        """Return the document, or None if there is none or it cannot be decoded."""
        try:
            return self._cache.get(name)
        except (ValueError, zlib.error, OSError):
            return None

    def set(self, name: str, document: Any) -> None:
        """Write a document; atomic, visible to other processes at once."""
        self._cache.set(name, document)

    def delete(self, name: str) -> None:
        """Forget a document; no error if there is none."""
        self._cache.delete(name)

    def names(self, prefix: str) -> Iterator[str]:
        """Yield the names that begin with ``prefix``."""
        for name in self._cache.iterkeys():
            if isinstance(name, str) and name.startswith(prefix):
                yield name

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Group many reads and writes into one transaction."""
        with self._cache.transact(retry=True):
            yield

    def close(self) -> None:
        """Release the database."""
        self._cache.close()
