"""Lets the workers of a cluster make the pieces of a node that runs on one of them (``Context.map``).

Each piece is a task of its own, submitted by the node's worker: the node's request, with those source files alone that
the piece reads. Its parts go through the remote like a node's outputs. Meanwhile the node's thread is free for pieces,
so one worker with one thread is enough. Pieces reserve nothing with Dask; their memory counts on the worker that makes
them (:mod:`stagegraph.execution.budget`).
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from stagegraph.digest import digest_json
from stagegraph.store.memo import is_part

if TYPE_CHECKING:
    from stagegraph.execution.messages import (
        Failure,
        Lacks,
        LaidOut,
        Made,
        Mapped,
        PieceFailed,
        PieceRequest,
        ReceivedTask,
        RefusedBy,
        SourceRequest,
    )
    from stagegraph.store.memo import PartEntry

    Answer: TypeAlias = Made | Failure | PieceFailed | RefusedBy | Lacks

LOOK_SECONDS = 0.1
ANSWER_SECONDS = 5.0  # after which an answer is asked for again: the worker that had it may be gone


class Spreading:
    """The pieces of one node; ``execute`` is what Dask calls with the text of a request.

    ``fetch`` gets objects (digest -> size) and ``lend`` gives some to the remote; both return those that they cannot.
    ``tell`` hears how many pieces are made, of how many; ``meanwhile`` is entered while they are.
    """

    def __init__(
        self,
        request: ReceivedTask,
        execute: Callable[[str], str],
        *,
        fetch: Callable[[Mapping[str, int]], Sequence[str]],
        lend: Callable[[Sequence[str]], Sequence[str]],
        tell: Callable[[int, int], None],
        cancelled: Callable[[], bool],
        meanwhile: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._request, self._execute = request, execute
        self._fetch, self._lend, self._tell, self._cancelled = fetch, lend, tell, cancelled
        self._meanwhile = meanwhile
        self._client: Any = None
        self._waiting: dict[Any, int] = {}  # future -> which piece
        self._refused: dict[str, str] = {}  # address -> why it makes none
        self._lent: dict[int, set[str]] = {}  # which piece -> what the remote was given for it
        self.cpu_seconds = 0.0
        self.peak_bytes = 0

    def run(self, pieces: Sequence[PieceRequest]) -> Mapped | PieceFailed:
        """Have all pieces made; the first that fails ends the others."""
        from distributed import worker_client

        with worker_client() as self._client, self._meanwhile():
            try:
                return self._made(pieces)
            finally:
                self._client.cancel(list(self._waiting))
                self._waiting.clear()

    def _made(self, pieces: Sequence[PieceRequest]) -> Mapped | PieceFailed:
        results: list[Any] = [None] * len(pieces)
        parts: dict[str, PartEntry] = {}
        for index, piece in enumerate(pieces):
            if problem := self._submit(index, piece):
                return problem
        while self._waiting:
            if self._cancelled():
                return _piece_failed("cancelled")
            for future in [future for future in self._waiting if future.done()]:
                answer = _answer(future)
                if answer is None:
                    continue
                index = self._waiting.pop(future)
                if problem := self._again(index, pieces[index], answer):
                    return problem
                if answer["event"] == "made":
                    results[index] = answer["result"]
                    parts |= answer["parts"]
                    self._tell(len(pieces) - len(self._waiting), len(pieces))
            time.sleep(LOOK_SECONDS)
        return {"event": "mapped", "results": results, "parts": parts}

    def _again(self, index: int, piece: PieceRequest, answer: Answer) -> PieceFailed | None:
        """Take what a worker answered: its parts, or why it is to be asked again; return what ends the node."""
        if answer["event"] == "end":
            problems = [f"{piece['name']}: {problem}" for problem in answer["problems"]]
            return {**_piece_failed(*problems), "bug": answer["bug"], "log": cast("PieceFailed", answer).get("log", "")}
        if answer["event"] == "made":
            self.cpu_seconds += answer["cpu_seconds"]
            self.peak_bytes = max(self.peak_bytes, answer["peak_bytes"])
            if not all(map(is_part, answer["parts"].values())):
                return _piece_failed(f"{piece['name']}: its worker reports invalid parts")
            if self._fetch({entry["digest"]: entry["size"] for entry in answer["parts"].values()}):
                return _piece_failed(f"{piece['name']}: the remote does not have the parts that its worker gave it")
            return None
        if answer["event"] == "lacks":
            lent = self._lent.setdefault(index, set())
            if lent.intersection(answer["digests"]) or self._lend(answer["digests"]):
                return _piece_failed(f"{piece['name']}: its worker does not find its inputs in the remote")
            lent.update(answer["digests"])
        else:
            self._refused[answer["where"]] = f"{answer['where']}: {'; '.join(answer['problems'])}"
        return self._submit(index, piece)

    def _submit(self, index: int, piece: PieceRequest) -> PieceFailed | None:
        """Let Dask make a piece on a worker that offers what the node needs, before nodes that have not begun."""
        request = {**self._request, **request_of(self._request, piece), "task": f"piece-{uuid.uuid4().hex}"}
        fit = None
        if self._refused or request["labels"]:
            workers = self._client.scheduler_info(n_workers=-1)["workers"]
            wanted = set(request["labels"])
            fit = [
                a for a, worker in workers.items() if a not in self._refused and wanted <= worker["resources"].keys()
            ]
            if not fit:
                lacking = [f"others offer no {label}" for label in request["labels"]]
                why = "; ".join([*self._refused.values(), *lacking])
                return _piece_failed(f"{piece['name']}: no worker can make it: {why}")
        text, key = json.dumps(request), request["task"]
        future = self._client.submit(self._execute, text, key=key, pure=False, workers=fit, priority=1)
        self._waiting[future] = index
        return None


def request_of(request: ReceivedTask, piece: PieceRequest) -> dict[str, Any]:
    """Return what of a node's request is different for a piece: it reads some of the files, and tells nobody."""
    sources: dict[str, SourceRequest] = {}
    sizes: dict[str, dict[str, int]] = {}
    for name, source in request["sources"].items():
        read = piece["files"].get(name, ())
        files = {file: source["files"][file] for file in read}
        sources[name] = {**source, "files": files, "digests": {file: source["digests"][file] for file in read}}
        sizes[name] = {file: request["sizes"][name][file] for file in read}
    layout = {
        port: [_some(each, piece["files"].get(port)) for each in found] for port, found in request["layout"].items()
    }
    key = digest_json([request["key"], piece])
    return {"piece": piece, "key": key, "topic": "", "sources": sources, "sizes": sizes, "layout": layout}


def _some(instance: LaidOut, read: Sequence[str] | None) -> LaidOut:
    """Return an input with those of its files that a piece reads, by their names below its path; None means all."""
    each, path, files = instance
    if read is None:
        return instance
    return each, path, {name: entry for name, entry in files.items() if name.removeprefix(f"{path}/") in read}


def _piece_failed(*problems: str) -> PieceFailed:
    return {**failed(*problems), "log": ""}


def _answer(future: Any) -> Answer | None:
    """Return what a worker answered; None if that is under way still."""
    if future.status != "finished":
        error = future.exception() if future.status == "error" else None
        lost = type(error).__name__ == "KilledWorker"
        return failed(
            "its worker died, and so did each one that tried it again" if lost else f"{error or future.status}"
        )
    try:
        return cast("Answer", json.loads(future.result(timeout=ANSWER_SECONDS)))
    except TimeoutError:
        return None


def failed(*problems: str) -> Failure:
    """Return the event for a failure that is not the stage's."""
    return {"event": "end", "ok": False, "problems": list(problems), "bug": False}
