"""Runs nodes on the workers of a Dask.distributed cluster, which schedules, monitors and retries them.

What is sent is one JSON document a node (:mod:`stagegraph.execution.site` reads it); files go through a remote of the
user's, never through Dask. A worker says by events of one topic how its node goes, the end too: so what has ended is
known at once, and is not lost with the worker. When a node has ended, its outputs are fetched into its sandbox here and
committed like those of any other. A node whose worker dies is begun again elsewhere, three times at most (Dask's
``allowed-failures``).
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import uuid
from base64 import b64decode, b64encode
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Event, Lock
from typing import TYPE_CHECKING, Any

from stagegraph.errors import PlanError, warn
from stagegraph.execution.executor import AtWork, Slot, Task
from stagegraph.execution.resources import MEBIBYTE
from stagegraph.execution.sandbox import request_for
from stagegraph.execution.site import PROTOCOL, execute, platform
from stagegraph.remote.errors import MismatchError, RemoteError, StoppedError
from stagegraph.remote.storage import Storage
from stagegraph.store.record import are_storable

if TYPE_CHECKING:
    from stagegraph.execution.messages import ClusterRequest, ClusterTask, KnownWorker, SlotEvent, Succeeded
    from stagegraph.execution.messages import Event as Message
    from stagegraph.planning.dag import Node
    from stagegraph.planning.planner import Planner
    from stagegraph.remote.settings import ClusterSettings
    from stagegraph.store.workspace import Workspace

NEEDS = "running in a cluster needs more packages: pip install 'stagegraph[dask]'"
CONNECT_SECONDS = 30  # Dask tries again as long, also where nobody listens; a busy scheduler takes its time
LOOK_SECONDS = 2.0  # how long what is known of the workers is good
AHEAD = 2  # nodes that are handed over for each thread, so that none waits for the next
AT_ONCE = 8  # files under way
LATE_SECONDS = 2.0  # after which an end whose event was lost is asked for


class Cluster:
    """A Dask cluster as a place where nodes run; connected when the first node is to run there."""

    def __init__(self, settings: ClusterSettings, workspace: Workspace, planner: Planner, jobs: int) -> None:
        try:
            import distributed  # noqa: F401 - 0.5 s that a run without news does not pay
        except ImportError:
            raise PlanError(NEEDS) from None
        self._settings = settings
        self.workspace = workspace
        self._planner = planner
        self._jobs = jobs
        self._topic = f"stagegraph-{uuid.uuid4().hex}"
        self._stop = Event()
        self._pool = ThreadPoolExecutor(AT_ONCE, "cluster")
        self._client: Any = None
        self._storage: Storage | None = None
        self._slots: dict[str, ClusterSlot] = {}
        self._workers: dict[str, KnownWorker] = {}  # by address
        self._looked = 0.0
        self._refused: dict[str, dict[str, str]] = {}  # stage -> address -> why it may not run it
        self._reported: set[str] = set()

    # -- what the scheduler asks -------------------------------------------------------------------------------------

    def refuse(self, nodes: Iterable[Node]) -> None:
        """Refuse nothing: a worker that fits may join later."""

    def full(self, running: AtWork) -> bool:
        """Say whether the workers have a full queue."""
        threads: int = sum(worker["nthreads"] for worker in self._known_workers().values())
        if not threads:
            self._say_once(f"no worker is connected to {self._settings.scheduler}; waiting for one")
        most = AHEAD * threads
        return len(running) >= min(most, self._jobs or most)

    def has(self, node: Node, running: AtWork) -> bool:  # noqa: ARG002 - which worker it fits, Dask knows
        """Say whether the workers can take another node."""
        return not self.full(running)

    def over(self, running: AtWork) -> Iterator[tuple[Any, str]]:  # noqa: ARG002 - the workers look
        """Yield nothing: each worker watches its own memory."""
        yield from ()

    def start(self, task: Task) -> Slot:
        """Submit a node."""
        slot = ClusterSlot(self, task)
        self.submit(slot)
        return slot

    def release(self, slot: Any, *, keep: bool) -> None:  # noqa: ARG002 - nothing of it is used again
        """Forget a node; it ends if it has not."""
        slot.kill()

    def stop(self) -> None:
        """Cancel the nodes and transfers under way."""
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)
        if self._client is not None:
            for slot in list(self._slots.values()):
                slot.kill()
            with contextlib.suppress(Exception):
                self._client.unsubscribe_topic(self._topic)
                self._client.close(timeout=CONNECT_SECONDS)

    # -- what is under way -------------------------------------------------------------------------------------------

    def submit(self, slot: ClusterSlot) -> None:
        """Let Dask run what a slot asks for, on any worker that has not refused it."""
        client, node = self._connected(), slot.task.node
        refused = self._refused.get(node.stage.id, {})
        fit = [address for address in self._known_workers() if address not in refused] if refused else None
        if fit == []:
            slot.deliver({"event": "gone", "meaning": f"no worker can run it: {'; '.join(refused.values())}"})
            return
        resources = wanted(node, self._workers.values())
        offered = {name for worker in self._workers.values() for name in worker["resources"]}
        if lacking := ", ".join(name for name in resources if name not in offered):
            self._say_once(f"{node.name}: waiting for a worker that offers {lacking}; no worker does")
        named: ClusterTask = {**slot.request, "task": slot.renamed()}
        request = json.dumps(named)
        self._slots[slot.id] = slot
        slot.future = client.submit(execute, request, key=slot.id, pure=False, workers=fit, resources=resources or None)

    def refuse_worker(self, slot: ClusterSlot, address: str, problems: Sequence[str]) -> None:
        """Stop sending a stage's nodes to a worker whose code, libraries or tools differ."""
        stage = slot.task.node.stage.id
        message = f"{address}: {'; '.join(problems)}"
        if address not in self._refused.setdefault(stage, {}):
            self._refused[stage][address] = message
            warn(f"worker {message}; it gets no '{stage}' in this run")
        self._looked = 0.0

    def supply(self, slot: ClusterSlot, digests: Sequence[str]) -> None:
        """Upload the inputs that a worker needs and did not find in the remote."""
        task = slot.task
        needed = {
            digest: self.workspace.store.path(digest)
            for instances in task.layout.values()
            for _, _, files in instances
            for digest, _ in files.values()
        }
        for state in task.prepared.sources.values():
            for name, digest in state.digests.items():
                object_path = self.workspace.store.path(digest)
                needed[digest] = object_path if object_path.exists() else state.files[name]
        try:
            for digest in needed.keys() & digests:  # and nothing else, whatever a worker asks for
                self._through().give(digest, needed[digest])
        except (RemoteError, OSError) as error:
            slot.deliver({"event": "gone", "meaning": f"its inputs could not be uploaded to {self._remote}: {error}"})
        else:
            slot.deliver({"event": "supplied"})

    def collect(self, slot: ClusterSlot, end: Succeeded) -> None:
        """Fetch the outputs of a node that has ended into its sandbox."""
        files = {name: entry for port in end["outputs"].values() for name, entry in port.items()}
        files |= {f"views/{name}": entry for name, entry in end["views"].items()}
        if not are_storable(files):
            slot.deliver({"event": "gone", "meaning": f"its worker reports invalid outputs: {sorted(files)!r:.200}"})
            return
        try:
            for name, (digest, size) in files.items():
                target = slot.task.sandbox.out / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.unlink(missing_ok=True)
                self._through().take(digest, size, target)
        except StoppedError:
            return
        except (RemoteError, MismatchError, OSError) as error:
            slot.deliver({"event": "gone", "meaning": f"its outputs could not be fetched from {self._remote}: {error}"})
        else:
            slot.deliver({"event": "collected", "end": end})

    def beside(self, what: Any, *arguments: Any) -> None:
        """Run a slow call in another thread."""
        with contextlib.suppress(RuntimeError):  # the run is over
            self._pool.submit(what, self, *arguments)

    def forget(self, slot: ClusterSlot) -> None:
        """Stop delivering events to a slot."""
        self._slots.pop(slot.id, None)

    def request(self, task: Task) -> ClusterRequest:
        """Return the request that is sent for a node."""
        decision = task.decision
        own = {name: b64encode(path.read_bytes()).decode() for name, path in self._planner.own_files(decision).items()}
        sizes = {
            name: {file: path.stat().st_size for file, path in state.files.items()}
            for name, state in task.prepared.sources.items()
        }
        return {
            **request_for(decision, task.prepared, fresh=task.fresh),
            "protocol": PROTOCOL,
            "platform": platform(),
            "topic": self._topic,
            "key": decision.key,
            "rows": decision.rows,
            "layout": task.layout,
            "sizes": sizes,
            "own_files": own,
            "memory": task.node.spec.resources.memory,
            "labels": [*task.node.spec.resources.labels],
            "remote": [self._settings.remote.name, self._settings.remote.url],
        }

    @property
    def _remote(self) -> str:
        return f"remote '{self._settings.remote.name}'"

    def _through(self) -> Storage:
        if self._storage is None:
            self._storage = Storage(self._settings.remote, self._stop)
        return self._storage

    def _known_workers(self) -> dict[str, KnownWorker]:
        now = time.monotonic()
        if now - self._looked > LOOK_SECONDS:
            client = self._connected()
            if client.status == "closed":  # Dask has given up to connect again
                raise PlanError(f"the scheduler {self._settings.scheduler} is gone; run again to resume")
            # It is busy, or connected again, or closed.
            with contextlib.suppress(TimeoutError, OSError, AttributeError):
                identity = client.sync(client.scheduler.identity, n_workers=-1, callback_timeout=LOOK_SECONDS)
                self._workers = identity["workers"]
            self._looked = now
        return self._workers

    def _connected(self) -> Any:
        if self._client is None:
            from distributed import Client
            from distributed.security import Security

            tls = self._settings.tls
            security: Any = None
            if self._settings.scheduler.startswith("tls://"):
                files = {"tls_ca_file": "ca", "tls_client_cert": "cert", "tls_client_key": "key"}
                given = {name: tls[each] for name, each in files.items() if each in tls}
                security = Security(require_encryption=True, **given)
            try:
                self._client = Client(
                    self._settings.scheduler, timeout=CONNECT_SECONDS, security=security, set_as_default=False
                )
            except (OSError, ValueError, TypeError) as error:
                first = str(error).partition("\n")[0]
                raise PlanError(f"the scheduler {self._settings.scheduler} cannot be reached: {first}") from None
            self._client.subscribe_topic(self._topic, self._arrived)
        return self._client

    def _arrived(self, event: tuple[float, Any]) -> None:
        """Take an event of a worker; called in Dask's thread."""
        event_document = json.loads(event[1])
        slot = self._slots.get(event_document["task"])
        if slot is not None:
            slot.deliver(event_document)

    def _say_once(self, text: str) -> None:
        if text not in self._reported:
            self._reported.add(text)
            warn(text)


class ClusterSlot:
    """A node that was submitted to the cluster."""

    def __init__(self, cluster: Cluster, task: Task) -> None:
        self.id = ""  # what Dask calls it
        self.task = task
        self.request = cluster.request(task)
        self.future: Any = None
        self._cluster = cluster
        self._descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._events: deque[SlotEvent] = deque()
        self._lock = Lock()
        self._closed = False
        self._supplied: set[str] = set()
        self._finished = 0.0
        self._ended = False

    def fileno(self) -> int:
        """Return a descriptor that becomes readable when there are events."""
        return self._descriptor

    def renamed(self) -> str:
        """Take a new task name: for Dask, the task of the old name is done."""
        self._cluster.forget(self)
        self.id, self.future = f"{self.task.node.name}-{uuid.uuid4().hex}", None
        return self.id

    def deliver(self, event: SlotEvent) -> None:
        """Take an event, from any thread."""
        with self._lock:
            if not self._closed:
                self._events.append(event)
                os.eventfd_write(self._descriptor, 1)

    def receive(self) -> list[Message]:
        """Return the events that have arrived; those meant for this side are handled here."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._descriptor)
        found: list[Message] = []
        while self._events:
            found += self._taken(self._events.popleft())
        return found or self._lost()

    def _taken(self, event: SlotEvent) -> list[Message]:
        cluster = self._cluster
        if event["event"] == "log":
            self._write_log(event["offset"], b64decode(event["text"]))
        elif event["event"] == "end":
            if event["ok"] is False:
                return [event]
            if not self._ended:
                self._ended = True
                cluster.beside(Cluster.collect, self, event)
        elif event["event"] == "collected":
            return [event["end"]]
        elif event["event"] == "lacks":
            return self._supply(event["digests"])
        elif event["event"] == "supplied":
            cluster.submit(self)
        elif event["event"] == "refused":
            cluster.refuse_worker(self, event["where"], event["problems"])
            cluster.submit(self)
        else:
            return [event]
        return []

    def _supply(self, digests: Sequence[str]) -> list[Message]:
        if again := self._supplied.intersection(digests):
            return [
                {
                    "event": "gone",
                    "meaning": f"its worker does not find {min(again)[:16]}, which was given to the remote",
                }
            ]
        self._supplied.update(digests)
        self.renamed()
        self._cluster.beside(Cluster.supply, self, digests)
        return []

    def _write_log(self, offset: int, text: bytes) -> None:
        with contextlib.suppress(OSError):  # a full disk; the node is none the worse for it
            descriptor = os.open(self.task.log.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                if not offset:
                    os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, text, offset)
            finally:
                os.close(descriptor)

    def _lost(self) -> list[Message]:
        """Return the end of a task that Dask gave up, or that ended without an event."""
        status = getattr(self.future, "status", "pending")
        if status == "pending" or self._ended:
            return []
        if status == "finished":
            return self._asked()
        error = self.future.exception(timeout=CONNECT_SECONDS) if status == "error" else None
        if type(error).__name__ == "KilledWorker":
            return [{"event": "gone", "meaning": f"its worker died, and so did each one that tried it again: {error}"}]
        return [{"event": "gone", "meaning": f"the cluster lost it: {error or status}"}]

    def _asked(self) -> list[Message]:
        now = time.monotonic()
        self._finished = self._finished or now
        if now - self._finished > LATE_SECONDS:
            self._finished = now
            self.deliver(json.loads(self.future.result(timeout=CONNECT_SECONDS)))
        return []

    def kill(self) -> None:
        """Cancel the task."""
        self._cluster.forget(self)
        with self._lock:
            if not self._closed:
                self._closed = True
                os.close(self._descriptor)
        if self.future is not None:
            self.future.release()


def wanted(node: Node, workers: Iterable[KnownWorker]) -> dict[str, float]:
    """Return the Dask resources that a node requires.

    Its labels, and ``MEMORY``, in bytes, only where some worker offers any.
    """
    takes = node.spec.resources
    found = dict(takes.labels)
    if takes.memory and any("MEMORY" in worker["resources"] for worker in workers):
        found["MEMORY"] = takes.memory * MEBIBYTE
    return found
