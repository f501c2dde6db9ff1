"""Watches the worker process of a node on a worker of a cluster, and forwards what it says and prints."""

from __future__ import annotations

import select
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, cast

from stagegraph.execution.resources import MEBIBYTE, memory_text, resident_bytes
from stagegraph.execution.spreading import Spreading, failed

if TYPE_CHECKING:
    from stagegraph.execution.messages import ClusterEvent, Failure, Made, ReceivedTask, Succeeded, WorkerEvent
    from stagegraph.execution.sandbox import Log, Worker

Say: TypeAlias = "Callable[[ClusterEvent], None]"

LOOK_SECONDS = 0.2
LOG_BYTES = 1 << 20  # of a node's prints that are sent
PIECE_LOG_BYTES = 64 << 10  # of a piece's, if it fails


def watch(
    worker: Worker,
    request: ReceivedTask,
    log: Log,
    say: Say,
    cancelled: Callable[[], bool],
    spreading: Spreading,
) -> Succeeded | Made | Failure:
    """Forward a worker process's events until it ends, and stop it if it exceeds its memory limit."""
    tail, limit = _Tail(log.path, say), request["memory"]
    while True:
        select.select([worker], [], [], LOOK_SECONDS)
        for event in cast("list[WorkerEvent]", worker.receive()):
            if event["event"] == "progress":
                say(event)
                continue
            if event["event"] == "map":
                worker.send(spreading.run(event["pieces"]))
                continue
            tail.send()
            if event["event"] == "gone":
                worker.kill()
                return failed(event["meaning"])
            assert event["event"] in ("end", "made")
            return event
        tail.send()
        if cancelled():
            worker.kill()
            return failed("cancelled")
        if limit and (used := resident_bytes([worker.pid])[worker.pid]) > limit * MEBIBYTE:
            worker.kill()
            took, most = memory_text(used // MEBIBYTE), memory_text(limit)
            return failed(f"took {took} of memory, more than its resources.memory of {most}, and was stopped")


class _Tail:
    """Sends new text of a log, up to a total size."""

    def __init__(self, path: Path, say: Say) -> None:
        self._path, self._say = path, say
        self._sent = 0

    def send(self) -> None:
        """Send what was printed since the last call."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._sent)
                text = file.read(max(LOG_BYTES - self._sent, 0))
        except OSError:
            return
        if text:
            if self._sent + len(text) == LOG_BYTES:
                text += b"\n... the rest is on the worker\n"
            self._say({"event": "log", "offset": self._sent, "text": b64encode(text).decode()})
            self._sent += len(text)


def end_of(log: Path) -> str:
    """Return the end of what a piece printed."""
    with log.open("rb") as file:
        file.seek(max(log.stat().st_size - PIECE_LOG_BYTES, 0))
        return file.read().decode(errors="replace")
