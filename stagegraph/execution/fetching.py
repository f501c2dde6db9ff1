"""Looks results up in the user's remotes before their nodes run, and uploads new results."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Generic, TypeVar

from stagegraph.store.workspace import Workspace

if TYPE_CHECKING:
    from concurrent.futures import Future
    from queue import SimpleQueue

    from stagegraph.remote.shared import Fetched, Shared
    from stagegraph.spec.model import Remote
    from stagegraph.store.record import Record

T = TypeVar("T")


class Fetching(Generic[T]):
    """The requests to the remotes by key, each with the node that waits for the answer.

    ``remotes`` are those of the pipeline file. The user's configuration is read when the first result is missing: a
    run without news pays for none of it.
    """

    def __init__(self, workspace: Workspace, remotes: Sequence[Remote], *, enabled: bool) -> None:
        self._workspace = workspace
        self._remotes = remotes
        self._enabled = enabled
        self._shared: Shared | None = None
        self._waiting: dict[str, list[T]] = {}
        self._ended: SimpleQueue[tuple[str, Future[Fetched | None]]] | None = None

    def __bool__(self) -> bool:
        """Whether anything is under way."""
        return bool(self._waiting)

    def _open(self) -> Shared | None:
        if self._enabled and self._shared is None:
            from stagegraph.remote.settings import load_settings

            settings = load_settings(self._remotes)
            if not settings.remotes:
                self._enabled = False
                return None
            from stagegraph.remote.shared import Shared

            self._shared = Shared(settings, self._workspace)
        return self._shared

    def begin(self, key: str, waits: T) -> bool:
        """Request the result of a key; False if there is no remote to ask."""
        shared = self._open()
        if shared is None or not shared.reads:
            return False
        if key not in self._waiting:
            from queue import SimpleQueue

            ended = self._ended = self._ended or SimpleQueue()
            shared.fetch(key).add_done_callback(lambda future: ended.put((key, future)))
        self._waiting.setdefault(key, []).append(waits)
        return True

    def ended(self, seconds: float) -> Iterator[tuple[list[T], Fetched | None]]:
        """Yield each node whose answer has come, with the answer; waits at most so long for the first."""
        if self._ended is None:
            return
        from queue import Empty

        with contextlib.suppress(Empty):
            while self._waiting:
                key, future = self._ended.get(timeout=seconds) if seconds else self._ended.get_nowait()
                seconds = 0.0
                yield self._waiting.pop(key), future.result()

    def take(self, fetched: Fetched) -> None:
        """Adopt a result of another machine into this store."""
        for digest, file in fetched.objects.items():
            self._workspace.store.adopt(file, digest)
        self._workspace.index.set(f"rec:{fetched.record['key']}", fetched.record)

    def give(self, record: Record) -> None:
        """Upload a result to the remotes that accept results, while nodes run."""
        shared = self._open()
        if shared is not None:
            shared.push(record)

    def finish(self, *, wait: bool) -> None:
        """Finish the uploads, if ``wait``, and remove temporary files of downloads."""
        if self._shared is not None:
            self._shared.finish() if wait else self._shared.close()
