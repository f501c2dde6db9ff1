"""The parent's side of execution: private work directories and handles of worker processes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from stagegraph.files import remove_tree
from stagegraph.planning.key import secrets_of
from stagegraph.registry import find, hidden_variables

if TYPE_CHECKING:
    from stagegraph.execution.messages import (
        Event,
        Layout,
        Mapped,
        NodeRequest,
        PieceFailed,
        Placed,
        Request,
        SourceRequest,
    )
    from stagegraph.planning.dag import Node
    from stagegraph.planning.planner import Decision, Prepared
    from stagegraph.planning.secrets import Mask, MaskedLog
    from stagegraph.store.memo import PartCode
    from stagegraph.store.objects import Store
    from stagegraph.store.record import Record
    from stagegraph.store.workspace import Workspace

EXIT_GRACE_SECONDS = 2.0
# Waits for the end of its input, and kills a group of processes.
GUARD = ("/bin/sh", "-c", 'read -r line; kill -9 "-$1"', "sh")


@dataclass
class Log:
    """The log of an execution, and the mask that removes secrets from it and from the events of the stage.

    A worker writes to ``target``.
    """

    path: Path
    mask: Mask | None = None
    pipe: MaskedLog | None = None

    @property
    def target(self) -> Path:
        """The log itself, or the pipe before it."""
        return self.pipe.pipe if self.pipe else self.path

    def masked(self, event: Event) -> Event:
        """Return an event without secrets."""
        return cast("Event", self.mask.event(event)) if self.mask else event

    def close(self) -> None:
        """Flush what was printed into the log."""
        if self.pipe:
            self.pipe.close()


@dataclass
class Sandbox:
    """The private directory of one execution: ``in/`` holds its verified inputs, ``out/`` takes its outputs.

    Inputs are real files, not symbolic links: small ones copied, large ones hard links to their objects.
    """

    folder: Path
    out: Path = field(init=False)  # where the stage writes
    linked: dict[str, str] = field(default_factory=dict)  # path of a hard link -> digest of its object
    secret: bool = False  # whether what was written may hold a secret
    placed: list[str] = field(default_factory=list)  # inputs
    made: dict[str, None] = field(default_factory=dict)  # directories, each after those above it

    def __post_init__(self) -> None:
        """Name what is asked for again and again."""
        self.out = self.folder / "out"

    @classmethod
    def create(cls, workspace: Workspace, key: str) -> Sandbox:
        """Make an empty sandbox for the execution of ``key``, whose lock the caller holds.

        What a killed run left behind for this key goes now: the sweep passes over a key that is locked.
        """
        of_key = workspace.work / key
        try:
            of_key.mkdir(parents=True)
        except FileExistsError:
            remove_tree(of_key)
            of_key.mkdir()
        # Never the same directory twice: a compiler that outlived a killed run may still write into the old one.
        sandbox = cls(of_key / str(time.time_ns()))
        sandbox._make(f"{sandbox.folder}/out")
        return sandbox

    def lay_out_inputs(self, store: Store, layout: Layout) -> dict[str, list[Any]]:
        """Put the inputs below ``in/``; return port -> [(``foreach`` values, path)]."""
        inputs: dict[str, list[Any]] = {}
        for port, instances in layout.items():
            for i, (each, path, files) in enumerate(instances):
                base = f"{self.folder}/in/{port}.{i}"  # nothing that is not in the key may be seen
                self.lay_out(store, base, {name: digest for name, (digest, _) in files.items()})
                inputs.setdefault(port, []).append([each, os.path.abspath(f"{base}/{path}")])  # noqa: PTH100 - a text
        return inputs

    def lay_out(self, store: Store, base: str | Path, files: Mapping[str, str]) -> None:
        """Put objects below a folder; ``files`` are relative names -> digests."""
        for name, digest in files.items():
            target = f"{base}/{name}"
            self._make(target.rpartition("/")[0])
            self.placed.append(target)
            if store.place(digest, target):
                self.linked[os.path.abspath(target)] = digest  # noqa: PTH100 - a text all along

    def _make(self, folder: str) -> None:
        """Make a directory below that of the sandbox, and those above it; each once."""
        if folder not in self.made:
            if folder != str(self.folder):
                self._make(folder.rpartition("/")[0])
            os.mkdir(folder)  # noqa: PTH102
            self.made[folder] = None

    def open_log(self, path: Path, secrets: Sequence[str]) -> Log:
        """Return what takes the prints of a stage with these ``secrets`` among its parameters; the log is ``path``."""
        if not path.parent.is_dir():
            path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file():
            remove_tree(path)  # whatever took its place: a directory cannot be written, a pipe would wait for a reader
        self.secret = bool(secrets)
        if not secrets:
            return Log(path)
        from stagegraph.planning.secrets import Mask, MaskedLog

        path.unlink(missing_ok=True)
        mask = Mask(secrets)
        return Log(path, mask, MaskedLog(self.folder / "log", path, mask))

    def remove(self, workspace: Workspace) -> None:
        """Remove everything; objects whose links go with it stay known as intact."""
        try:  # what is known to be there, as long as nothing else is: walking the directory takes several times that
            for file in self.placed:
                os.unlink(file)  # noqa: PTH108
            for folder in reversed(self.made):
                os.rmdir(folder)  # noqa: PTH106
        except OSError:
            remove_tree(self.folder)
        with contextlib.suppress(OSError):
            self.folder.parent.rmdir()
        self._relearn(workspace)

    def keep(self, workspace: Workspace, pipeline: str, node: str) -> Path | None:
        """Remove the inputs, move the outputs to where a failure can be inspected, and return that folder.

        None where the disk takes no more, or what was written may hold a secret.
        """
        try:
            if self.secret:
                self.remove(workspace)
                return None
            remove_tree(self.folder / "in")
            self._relearn(workspace)
            return workspace.keep_failed(self.folder, pipeline, node)
        except OSError:
            remove_tree(self.folder)
            return None

    def _relearn(self, workspace: Workspace) -> None:
        for digest in self.linked.values():
            workspace.store.relink(digest)


def layout_of(node: Node, records: Mapping[Node, Record]) -> Layout:
    """Return the layout of a node's inputs below ``in/``, from the records of its upstream nodes."""
    layout: Layout = {}
    for port, upstream in node.inputs.items():
        declared = node.stage.inputs[port]
        for u in sorted(upstream, key=lambda n: sorted(n.spec.each.items())):
            each = dict(u.spec.each) if declared.many else {}
            files = records[u]["outputs"][declared.port]["files"]
            layout.setdefault(port, []).append((each, u.stage.outputs[declared.port].path, files))
    return layout


def request_for(decision: Decision, prepared: Prepared, *, fresh: bool) -> NodeRequest:
    """Return the part of a request that is the same wherever the node runs; ``fresh``: it reuses no memoised parts."""
    node = decision.node
    assert decision.document is not None, "it was settled"
    params = {f.name: getattr(prepared.params, f.name) for f in dataclasses.fields(prepared.params)}
    sources: dict[str, SourceRequest] = {
        name: {
            "root": str(state.root),
            "files": {n: str(p.absolute()) for n, p in state.files.items()},
            "digests": state.digests,
        }
        for name, state in prepared.sources.items()
    }
    return {
        "prepare": find("profiles", node.stage.profile),
        "origin": node.spec.origin,
        "params": params,
        "document": decision.document,
        "sources": sources,
        "fresh": fresh,
        "secrets": prepared.secrets,
        "piece": None,
    }


def placed(
    sandbox: Sandbox, log: Log, store: Path, inputs: Mapping[str, list[Any]], parts: Mapping[str, PartCode]
) -> Placed:
    """Return the part of a request that names paths here; ``parts``: kind of memoised part -> the code behind it."""
    return {
        "inputs": inputs,
        "linked": sandbox.linked,
        "out": str(sandbox.out.absolute()),
        "store": str(store.absolute()),
        "parts": parts,
        "log": str(log.target.absolute()),
        "maps": False,
    }


class Workers:
    """The worker processes of one run; idle ones stay warm.

    No environment variable with a secret of the pipeline in it reaches one.
    """

    def __init__(self, nodes: Iterable[Node]) -> None:
        secrets = {secret for node in nodes for secret in secrets_of(node.spec.params)}
        hidden = hidden_variables()
        self._environment = {
            name: value
            for name, value in os.environ.items()
            if name not in hidden and not any(secret in value for secret in secrets)
        }
        self._idle: dict[str, list[Worker]] = {}

    def take(self, profile: str, *, new: bool) -> Worker:
        """Return a worker: a warm one, unless a ``new`` one is asked for, as nobody else's memory or secrets are in it.

        One that died while idle is no node's fault.
        """
        idle = self._idle.get(profile, [])
        while idle and not new:
            worker = idle.pop()
            if worker.alive():
                return worker
            worker.kill()
        return Worker(profile, self._environment)

    def give_back(self, worker: Worker) -> None:
        """Keep a worker warm."""
        self._idle.setdefault(worker.profile, []).append(worker)

    def stop(self) -> None:
        """End idle workers."""
        for workers in self._idle.values():
            for worker in workers:
                worker.stop()


class Worker:
    """A worker process of one profile, in a process group of its own so that a terminal's Ctrl-C does not reach it."""

    def __init__(self, profile: str, environment: Mapping[str, str]) -> None:
        self.profile = profile
        reader, writer = os.pipe()
        self._events = os.fdopen(reader, "rb", buffering=0)
        os.set_blocking(reader, False)
        env = {
            **environment,
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
            "PYTHONHASHSEED": "0",
            "PYTHONUNBUFFERED": "1",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "stagegraph.execution.worker", profile, str(writer), str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[writer],
            env=env,
            start_new_session=True,
        )
        os.close(writer)
        self._guard = _guard(self._process.pid)
        self._pending = b""

    @property
    def pid(self) -> int:
        """The process, which leads a session of its own."""
        return self._process.pid

    def fileno(self) -> int:
        """Return the descriptor that becomes readable when there are events."""
        return self._events.fileno()

    def send(self, request: Request | Mapped | PieceFailed) -> None:
        """Start a request, or answer one of its stage; that the process is gone shows on the event stream."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()

    def receive(self) -> list[Event]:
        """Return the events that have arrived; an event ``gone`` when the process has ended."""
        ended = self._process.poll() is not None  # asked first: what it wrote before it ended is read below
        while chunk := self._events.read(1 << 16):
            self._pending += chunk
        *lines, self._pending = self._pending.split(b"\n")
        events: list[Event] = [json.loads(line) for line in lines]
        if ended or chunk == b"":
            events.append({"event": "gone", "meaning": describe_exit(self._process.wait())})
        return events

    def alive(self) -> bool:
        """Say whether the process still runs."""
        return self._process.poll() is None

    def kill(self) -> None:
        """End the process and everything it started, at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._close()

    def stop(self) -> None:
        """Let an idle process end by itself."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(EXIT_GRACE_SECONDS)
        self.kill()  # whatever it started ends with it

    def _close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            if self._process.stdin:
                self._process.stdin.close()
        self._events.close()
        if self._guard:
            self._guard.kill()
            self._guard.communicate()


def _guard(group: int) -> subprocess.Popen[bytes] | None:
    """Start a process that kills the ``group`` if this process is killed; None where there is no shell to do it.

    The worker ends by itself then, but what it has started (a command, a compiler) would work on.
    """
    with contextlib.suppress(OSError):
        return subprocess.Popen(
            [*GUARD, str(group)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={},
            start_new_session=True,
        )
    return None


def describe_exit(code: int) -> str:
    """Say how a process ended: the signal's name, and what it usually means."""
    if code >= 0:
        return f"its worker process ended with status {code}"
    name = signal.Signals(-code).name
    meaning = {
        "SIGKILL": "; usually out of memory: raise its resources.memory so that less runs beside it",
        "SIGSEGV": "; a crash in native code, often a mismatch of library versions: see the pins in pyproject.toml",
    }.get(name, "")
    return f"its worker process was killed by {name}{meaning}"
