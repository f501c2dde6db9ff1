"""The worker process: runs stages of one profile, one after the other, and stays warm between them.

Requests come as JSON lines on standard input, events go out as JSON lines on the descriptor given as the first
argument. While a stage runs, everything it prints, native code included, goes to its log file. Output files are
synced and digested here, next to the work, so that the parent stays responsive.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import os
import re
import resource
import signal
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any, TextIO

from stagegraph.digest import digest_file
from stagegraph.errors import StageError
from stagegraph.execution.messages import (
    Failed,
    Found,
    Made,
    Mapped,
    MapRequest,
    PieceFailed,
    PieceRequest,
    Progressed,
    Request,
    Succeeded,
    WorkerEvent,
    Written,
)
from stagegraph.registry import Origin, load_object
from stagegraph.stage import Context, Instance, JsonObject, NewPart, Part, Piece, SourceFiles, Stage
from stagegraph.store.memo import Memo, PartCode
from stagegraph.store.objects import fsync_file
from stagegraph.store.record import FileEntry, Spent

PROGRESS_SECONDS = 0.1
PR_SET_PDEATHSIG = 1
UNSPENT: Spent = {"cpu_seconds": 0.0, "peak_bytes": 0}
VIEW_NAME = re.compile(r"[\w-][\w.-]*")


class PieceError(Exception):
    """A piece failed on another worker, which told how."""

    def __init__(self, failure: PieceFailed) -> None:
        super().__init__("; ".join(failure["problems"]))
        self.failure = failure


class WorkerContext(Context):
    """The stage author's context, backed by files and the event stream; ``answers`` to its requests come on another."""

    def __init__(self, request: Request, params: Any, events: TextIO, answers: TextIO | None = None) -> None:
        self.params = params
        self.document = request["document"]
        self.out = Path(request["out"])
        self._request = request
        self._inputs = request["inputs"]
        self._sources = request["sources"]
        self._events = events
        self._answers = answers
        self._last_progress = 0.0
        self._store = Path(request["store"])
        self._parts = {kind: PartCode(*code) for kind, code in request["parts"].items()}
        self._fresh: bool = request["fresh"]
        self._opening = Lock()
        self._memo: Memo | None = None
        self.found: Found = {"facts": {}, "warnings": [], "summary": "", "parts": {}, "damaged": []}

    def input(self, port: str) -> Path:
        ((_, path),) = self._inputs[port]
        return Path(path)

    def inputs(self, port: str) -> list[Instance]:
        return [Instance(each, Path(path)) for each, path in self._inputs[port]]

    def has_input(self, port: str) -> bool:
        return port in self._inputs

    def source(self, name: str) -> SourceFiles:
        found = self._sources[name]
        return SourceFiles(Path(found["root"]), {n: Path(p) for n, p in found["files"].items()}, found["digests"])

    def recall(self, kind: str, document: JsonObject) -> Part | None:
        return self.memo.recall(kind, document)

    def remember(self, kind: str, document: JsonObject, file: Path, **facts: Any) -> Part:
        refuse_secrets(self._request, {file.name: file}, document, facts)
        return self.memo.remember(kind, document, file, **facts)

    def remember_all(self, kind: str, parts: Sequence[NewPart]) -> None:
        for document, file, _, facts in parts:
            refuse_secrets(self._request, {file.name: file}, document, facts)
        self.memo.remember_all(kind, parts)

    def map(self, kind: str, pieces: Sequence[Piece]) -> list[Any] | None:
        if self._answers is None or not self._request["maps"]:
            return None
        requests: list[PieceRequest] = [
            {"kind": kind, "name": name, "what": what, "files": files} for name, what, files in pieces
        ]
        event: MapRequest = {"event": "map", "pieces": requests}
        send(self._events, event)
        answer: Mapped | PieceFailed = json.loads(self._answers.readline())
        if answer["event"] == "end":
            sys.stdout.write(answer["log"])
            raise PieceError(answer)
        if answer["parts"]:
            self.memo.take(kind, answer["parts"])
        return answer["results"]

    @property
    def memo(self) -> Memo:
        """The memoised parts of this execution; most stages have none, and never open the index."""
        with self._opening:
            if self._memo is None:
                self._memo = Memo.open(self._store, self._parts, fresh=self._fresh)
            return self._memo

    def settle(self) -> dict[tuple[int, int], str]:
        """Sync what was memoised and count it; return the parts' (device, inode) -> digest."""
        if self._memo is None:
            return {}
        self.found["parts"] = {
            kind: {"made": counts["made"], "reused": counts["reused"], "code": self._parts[kind].digest}
            for kind, counts in sorted(self._memo.counts.items())
        }
        self.found["damaged"] = self._memo.damaged
        self.found["warnings"] += self._memo.warnings()
        return self._memo.settle()

    def progress(self, done: int, total: int, unit: str = "", note: str = "") -> None:
        now = time.monotonic()
        if now - self._last_progress >= PROGRESS_SECONDS or done == total:
            self._last_progress = now
            progress: Progressed = {"event": "progress", "done": done, "total": total, "unit": unit, "note": note}
            send(self._events, progress)

    def warn(self, message: str) -> None:
        self.found["warnings"].append(_text(message))

    def fact(self, name: str, value: Any) -> None:
        self.found["facts"][_text(name)] = json.loads(json.dumps(value))  # as every later run will see it

    def view(self, name: str, text: str) -> None:
        if not VIEW_NAME.fullmatch(name):
            raise ValueError(f"view name {name!r} must be letters, digits, '-', '_' and '.'")
        folder = self.out / "views"
        folder.mkdir(exist_ok=True)
        (folder / name).write_text(_text(text), encoding="utf-8")

    def summary(self, text: str) -> None:
        self.found["summary"] = " ".join(_text(text).split())


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected text, found {type(value).__name__}: {value!r}")
    return value


def send(events: TextIO, event: WorkerEvent) -> None:
    """Write one event; if the parent is gone there is nobody left to work for."""
    try:
        events.write(json.dumps(event) + "\n")
        events.flush()
    except BrokenPipeError:
        os._exit(1)


def collect_outputs(stage: Stage, out: Path, known: Mapping[tuple[int, int], str]) -> Written:
    """Check what was written against what was declared; sync and digest it. ``known``: (device, inode) -> digest."""
    written = written_files(out)
    outputs: dict[str, dict[str, FileEntry]] = {port: {} for port in stage.outputs}
    views: dict[str, FileEntry] = {}
    problems = []
    for name, path in written.items():
        ports = [port for port, o in stage.outputs.items() if name == o.path or name.startswith(f"{o.path}/")]
        if ports:
            outputs[ports[0]][name] = _digest_output(path, known, out.parent / "in")
        elif name.startswith("views/"):
            views[path.name] = _digest_output(path, known, out.parent / "in")
        else:
            problems.append(f"stage '{stage.id}' wrote {name}, which is none of its declared outputs")
    for port, files in outputs.items():
        if not files:
            problems.append(f"stage '{stage.id}' did not write its output '{port}' ({stage.outputs[port].path})")
    if problems:
        raise RuntimeError("\n".join(problems))
    return {"outputs": outputs, "views": views}


def refuse_secrets(request: Request, files: Mapping[str, Path], *documents: Any) -> None:
    """Raise if a secret would be stored: in the name or content of an output, or in the record."""
    if request["secrets"]:
        from stagegraph.planning.secrets import Mask

        mask = Mask(request["secrets"])
        for name, path in files.items():
            if mask.holds(path) or mask.value(name) != name:
                raise RuntimeError(f"{mask.value(name)} holds a secret of the stage's parameters; no output may")
        if mask.value(documents) != list(documents):
            raise RuntimeError("what the stage remembers holds a secret of its parameters; no part may")


def written_files(out: Path) -> dict[str, Path]:
    """List the files below ``out`` by relative name; anything but real files and directories is refused."""
    files = {}
    for folder, folders, names in os.walk(out, followlinks=False):
        for name in sorted(folders + names):
            path = Path(folder, name)
            if path.is_symlink() or not (path.is_dir() or path.is_file()):
                raise RuntimeError(
                    f"output {path.relative_to(out)} is a link or a special file; outputs are real files"
                )
            if not path.is_dir():
                files[path.relative_to(out).as_posix()] = path
    return dict(sorted(files.items()))


def _digest_output(path: Path, known: Mapping[tuple[int, int], str], inputs: Path) -> FileEntry:
    status = path.stat()
    digest = known.get((status.st_dev, status.st_ino))
    if digest is None and status.st_nlink > 1 and not any(map(path.samefile, inputs.rglob("*"))):  # one that is a copy
        raise RuntimeError(f"output {path.name} is a hard link to a file that is no input and no part; copy it")
    if digest is None:
        fsync_file(path)
        digest = digest_file(path)
    return [digest, status.st_size]


def known_inputs(request: Request) -> dict[tuple[int, int], str]:
    """Large inputs by identity: an output that is a hard link of one need not be digested again."""
    statuses = {digest: Path(path).stat() for path, digest in request["linked"].items()}
    return {(status.st_dev, status.st_ino): digest for digest, status in statuses.items()}


def run_one(request: Request, events: TextIO, answers: TextIO) -> Succeeded | Made | Failed:
    """Run one stage, or make one piece of it, and return the event that ends it."""
    usage = _Usage()
    try:
        stage = Origin(*request["origin"]).make()
        ctx = WorkerContext(request, params_of(stage, request["params"]), events, answers)
        if request["piece"]:
            return _made(stage, ctx, request["piece"], usage)
        stage.run(ctx)
        refuse_secrets(request, written_files(ctx.out))
        known = ctx.settle() | known_inputs(request)
        written = collect_outputs(stage, ctx.out, known)
        json.dumps(ctx.found)  # what cannot be recorded is the stage's bug, and is said as one
        return {"event": "end", "ok": True, **ctx.found, **written, **usage.spent()}
    except StageError as error:
        return failed(error.problems, usage.spent())
    except PieceError as error:
        return failed(error.failure["problems"], usage.spent(), bug=error.failure["bug"])
    except OSError as error:
        _print_traceback()
        return failed([_problem_of(error)], usage.spent())
    except Exception as error:  # noqa: BLE001 - a stage's bug must not take the worker down
        _print_traceback()
        return failed([f"{type(error).__name__}: {error}"], usage.spent(), bug=True)


def _made(stage: Stage, ctx: WorkerContext, piece: PieceRequest, usage: _Usage) -> Made:
    result = stage.make(ctx, piece["what"])
    json.dumps(result)
    ctx.settle()
    parts = {name: entry for name, entry in ctx.memo.entries.items() if entry["kind"] == piece["kind"]}
    return {"event": "made", "result": result, "parts": parts, **usage.spent()}


def params_of(stage: Stage, written: JsonObject) -> Any:
    """Return the ``Params`` of a stage from a request."""
    names = {f.name for f in dataclasses.fields(stage.Params)}
    return stage.Params(**{k: _tupled(v) for k, v in written.items() if k in names})


def failed(problems: Sequence[str], spent: Spent = UNSPENT, *, bug: bool = False) -> Failed:
    """Return the event for a failed execution."""
    return {"event": "end", "ok": False, "problems": [*problems], "bug": bug, **spent}


def _problem_of(error: OSError) -> str:
    return f"{error.filename or 'I/O'}: {error.strerror or error}"


def _print_traceback() -> None:
    with contextlib.suppress(OSError):  # a full disk; the problem itself is said all the same
        traceback.print_exc()


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


class _Usage:
    """CPU seconds (own and of child processes) and the peak memory of one execution, not of the worker's life."""

    def __init__(self) -> None:
        self._cpu = self._cpu_seconds()
        self._children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM; see proc(5)

    def spent(self) -> Spent:
        children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        peak = max(_high_water_kib(), children if children > self._children else 0)
        return {"cpu_seconds": round(self._cpu_seconds() - self._cpu, 3), "peak_bytes": peak * 1024}

    @staticmethod
    def _cpu_seconds() -> float:
        t = os.times()
        return t.user + t.system + t.children_user + t.children_system


def _high_water_kib() -> int:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1])
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    """Serve requests until standard input closes."""
    profile, events_fd = sys.argv[1], int(sys.argv[2])
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a killed run leaves no orphans at work
    if os.getppid() != int(sys.argv[3]):  # it was killed before that
        return
    # Where whoever started the run ignores it, every command would seem to end with status 0.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    requests = os.fdopen(os.dup(0), encoding="utf-8")
    events = os.fdopen(events_fd, "w", encoding="utf-8")
    os.set_inheritable(events_fd, False)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    prepared = False
    for line in requests:
        request: Request = json.loads(line)
        try:
            log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NONBLOCK, 0o666)
        except OSError as error:
            send(events, failed([_problem_of(error)]))
            continue
        os.set_blocking(log, True)  # it was opened so that a pipe in its place hangs nobody; the engine's own is read
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        if not prepared and request["prepare"]:
            try:
                load_object(request["prepare"])()
            except Exception as error:  # noqa: BLE001 - reported as the node's failure
                _print_traceback()
                send(events, failed([f"worker '{profile}': {error}"], bug=True))
                continue
        prepared = True
        end = run_one(request, events, requests)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        send(events, end)


if __name__ == "__main__":
    main()
