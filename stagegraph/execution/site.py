"""Runs a node on a worker of a cluster: downloads its inputs from the remote and uploads its outputs to it.

Each Dask worker keeps a store of its own, which is a cache (``STAGEGRAPH_WORKER_DIR``, else in Dask's directory), and
worker processes that stay warm. Before a node runs it is checked that this machine would make the same of it as the one
that planned it: its platform, its code, module by module, its libraries and its tools. What is imported stays as it was
imported, so a worker whose code or libraries have changed since is to be started again before it makes anything more.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from base64 import b64decode
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Lock
from typing import TYPE_CHECKING, cast

from stagegraph.digest import digest_json
from stagegraph.errors import PipelineError
from stagegraph.execution.budget import Budget
from stagegraph.execution.resources import MEBIBYTE
from stagegraph.execution.sandbox import Sandbox, Worker, Workers, placed
from stagegraph.execution.spreading import Spreading, failed
from stagegraph.execution.watching import Say, end_of, watch
from stagegraph.execution.worker import params_of
from stagegraph.planning.code import CodeDigests
from stagegraph.planning.planner import code_of, libraries_of, part_codes
from stagegraph.planning.sources import Sources
from stagegraph.registry import Origin
from stagegraph.remote.errors import MismatchError, RemoteError
from stagegraph.remote.storage import Storage
from stagegraph.spec.model import Remote
from stagegraph.stage import Stage
from stagegraph.store.memo import PartCode
from stagegraph.store.objects import RottenError
from stagegraph.store.partial import partial_file
from stagegraph.store.workspace import Workspace

if TYPE_CHECKING:
    from stagegraph.execution.messages import (
        ClusterEnd,
        ClusterEvent,
        ReceivedTask,
        Refused,
        Request,
        SourceRequest,
        Succeeded,
    )


PROTOCOL = 2  # of what a client sends and is told
DIRECTORY = "STAGEGRAPH_WORKER_DIR"
AT_ONCE = 8  # files under way
SHOWN = 3  # modules in a message
STALE = "its code or its libraries have changed since it was started; start it again"


def platform() -> str:
    """Return the platform: machines of one platform make the same results."""
    return f"{sys.platform} {os.uname().machine}"


def execute(text: str) -> str:
    """Run the node, or the piece, of one request (the function that Dask calls).

    Returns the final event; that of a node was also sent.
    """
    from distributed import get_worker

    worker = get_worker()
    request = cast("ReceivedTask", json.loads(text) | {"where": worker.address})

    def say(event: ClusterEvent) -> None:
        if request["topic"]:
            worker.log_event(request["topic"], json.dumps({"task": request["task"], **event}))

    def cancelled() -> bool:
        state = worker.state.tasks.get(request["task"])
        return state is None or state.state not in ("executing", "long-running")

    folder = os.environ.get(DIRECTORY) or f"{worker.local_directory}/stagegraph"
    offered = int(worker.state.total_resources.get("MEMORY", 0)) // MEBIBYTE
    end = _site(folder, offered).run(request, say, cancelled)
    answer = json.dumps({"task": request["task"], **end, "where": worker.address})
    if request["topic"]:
        worker.log_event(request["topic"], answer)
    return answer


_SITES = Lock()


def _site(folder: str, offered: int) -> Site:
    with _SITES:  # threads of one worker share it
        return _made(folder, offered)


@functools.cache
def _made(folder: str, offered: int) -> Site:
    return Site(Path(folder), offered)


class Site:
    """The store, the worker processes and the connections that the nodes of one Dask worker share, and the memory that
    it ``offers`` (MiB; 0 is any).
    """

    def __init__(self, folder: Path, offers: int = 0) -> None:
        self._workspace = Workspace(folder.absolute())
        self._workspace.create()
        self._workers = Workers(())
        self._budget = Budget(offers)
        self._storages: dict[str, Storage] = {}
        # A worker process ends with the thread that began it, so one that stays begins them all.
        self._starter = ThreadPoolExecutor(1, "starter")
        self._transfers = ThreadPoolExecutor(AT_ONCE, "transfer")
        self._checked: dict[str, list[str]] = {}
        self._checking = Lock()
        self._read = PartCode("", {})  # the files of all that was checked, as they were then

    def run(self, request: ReceivedTask, say: Say, cancelled: Callable[[], bool]) -> ClusterEnd:
        """Run a node, or make a piece; return the event that ends it: ``end``, ``made``, ``refused`` or ``lacks``."""
        if request["protocol"] != PROTOCOL:
            return _refused(
                f"speaks protocol {PROTOCOL}, not {request['protocol']}: its stagegraph is of another version"
            )
        if request["platform"] != platform():
            return _refused(f"is {platform()}, not {request['platform']}")
        try:
            origin = self._origin(request)
            codes = CodeDigests(self._workspace.index, Path(origin.folder) if origin.folder else None)
            if problems := self._mismatches(request, origin, codes):
                return _refused(*problems)
            with self._workspace.locked(request["key"], wait=True):
                end = self._run(request, origin, codes, say, cancelled)
            return end if self._read.is_unchanged() else _refused(STALE)
        except (RemoteError, MismatchError) as error:
            return failed(f"remote '{request['remote'][0]}' on its worker: {error}")
        except (OSError, RottenError) as error:
            return failed(f"on its worker: {error}")

    # -- is it the same here? ----------------------------------------------------------------------------------------

    def _origin(self, request: ReceivedTask) -> Origin:
        """Return the stage's origin on this machine; modules of the pipeline's folder come with the request."""
        reference, folder, arguments = request["origin"]
        if not folder:
            return Origin(reference, "", tuple(arguments))
        files = request["own_files"]
        base = self._workspace.root / "code" / digest_json(files)
        for name, text in files.items():
            path = base / name
            if ".." in Path(name).parts or Path(name).is_absolute():
                raise OSError(f"{name} leaves its folder")
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                new = path.with_name(f".{path.name}.{os.getpid()}.{id(text)}")
                new.write_bytes(b64decode(text))
                new.rename(path)
        return Origin(reference, str(base), tuple(arguments))

    def _mismatches(self, request: ReceivedTask, origin: Origin, codes: CodeDigests) -> list[str]:
        """Return how this machine differs from a node's key; compared once for each stage, code and tools."""
        document = request["document"]
        parts = [document["code"], document.get("libraries", {}), document["tools"]]
        comparison_id = digest_json([origin, *parts, request["params"]])
        with self._checking:
            if not self._read.is_unchanged():
                return [STALE]
            if comparison_id not in self._checked:
                self._checked[comparison_id] = _mismatches(request, origin, codes)
                self._read = PartCode("", {**codes.files_read(), **self._read.files})
                codes.save()
            return self._checked[comparison_id]

    # -- run ---------------------------------------------------------------------------------------------------------

    def _run(
        self,
        request: ReceivedTask,
        origin: Origin,
        codes: CodeDigests,
        say: Say,
        cancelled: Callable[[], bool],
    ) -> ClusterEnd:
        store, storage = self._workspace.store, self._storage(request)
        layout, remote_sources = request["layout"], self._sources_not_here(request)
        wanted = {
            digest: size
            for instances in layout.values()
            for _, _, files in instances
            for digest, size in files.values()
        }
        for name in remote_sources:
            sizes = request["sizes"][name]
            wanted |= {digest: sizes[file] for file, digest in request["sources"][name]["digests"].items()}
        if lacking := self._fetch(storage, wanted):
            return {"event": "lacks", "digests": lacking}
        sandbox = Sandbox.create(self._workspace, request["key"])
        try:
            inputs = sandbox.lay_out_inputs(store, layout)
            sources: dict[str, SourceRequest] = dict(request["sources"])
            for name in remote_sources:
                base, digests = sandbox.folder / "source" / name, sources[name]["digests"]
                sandbox.lay_out(store, base, digests)
                files = {file: str(base / file) for file in digests}
                sources[name] = {"root": str(base), "files": files, "digests": digests}
            log = sandbox.open_log(self._workspace.log_path(request["key"]), ())
            stage = origin.make()
            paths = placed(sandbox, log, self._workspace.root, inputs, part_codes(codes, stage, request["rows"]))
            maps = request["piece"] is None
            spreading = self._spreading(request, storage, say, cancelled)
            with (
                self._budget.taken(request["memory"], cancelled),
                self._worker(stage.profile, new=bool(request["memory"])) as worker,
            ):
                say({"event": "began", "where": request["where"]})
                task_request = {**request, **paths, "sources": sources, "origin": origin, "maps": maps}
                worker.send(cast("Request", task_request))
                end = watch(worker, request, log, say, cancelled, spreading)
            if end["event"] == "made":
                self._upload(storage, {entry["digest"] for entry in end["parts"].values()})
                return end
            if end["ok"] is False:
                return end if maps else {**end, "log": end_of(log.path)}
            self._give(storage, sandbox, end)
            cpu, peak = end["cpu_seconds"] + spreading.cpu_seconds, max(end["peak_bytes"], spreading.peak_bytes)
            return {**end, "cpu_seconds": cpu, "peak_bytes": peak, "damaged": [], "host": os.uname().nodename}
        finally:
            sandbox.remove(self._workspace)

    def _spreading(self, request: ReceivedTask, storage: Storage, say: Say, cancelled: Callable[[], bool]) -> Spreading:
        """Return what has the pieces of a node made, if its stage asks for it."""
        store, files = self._workspace.store, dict[str, Path]()
        for source in request["sources"].values():
            files |= {digest: Path(source["files"][name]) for name, digest in source["digests"].items()}
        inputs = {d for instances in request["layout"].values() for *_, found in instances for d, _ in found.values()}

        def lend(digests: Sequence[str]) -> list[str]:
            own = [digest for digest in digests if digest in files or digest in inputs]  # and nothing else
            here = {digest: store.path(digest) if store.verify(digest) is None else files.get(digest) for digest in own}
            for digest, path in here.items():
                if path is not None:
                    storage.give(digest, path)
            return [digest for digest in digests if here.get(digest) is None]

        return Spreading(
            request,
            execute,
            fetch=lambda wanted: self._fetch(storage, wanted),
            lend=lend,
            tell=lambda done, total: say(
                {
                    "event": "progress",
                    "done": done,
                    "total": total,
                    "unit": "pieces",
                    "note": "on the cluster's workers",
                }
            ),
            cancelled=cancelled,
            meanwhile=lambda: self._budget.lent(request["memory"], cancelled),
        )

    def _storage(self, request: ReceivedTask) -> Storage:
        name, url = request["remote"]
        if url not in self._storages:
            self._storages[url] = Storage(Remote(name, url, reads=True, writes=True), Event())
        return self._storages[url]

    def _sources_not_here(self, request: ReceivedTask) -> list[str]:
        """Return the sources that this machine does not have, as they were, under the same path."""
        sources = Sources(self._workspace.index)
        found = []
        for name, source in request["sources"].items():
            files = {file: Path(path) for file, path in source["files"].items()}
            if not all(sources.is_intact(path, source["digests"][file]) for file, path in files.items()):
                found.append(name)
        return found

    def _fetch(self, storage: Storage, wanted: Mapping[str, int]) -> list[str]:
        """Fetch the objects that the store lacks; return those that the remote lacks too."""
        store = self._workspace.store
        missing = [digest for digest in wanted if store.verify(digest) is not None]
        if not missing:
            return []
        with self._scratch() as folder:

            def take(digest: str) -> bool:
                try:
                    with partial_file(self._workspace.root, digest, folder / digest) as file:
                        storage.take(digest, wanted[digest], file)
                except MismatchError:
                    return False
                return True

            there = dict(zip(missing, self._transfers.map(take, missing), strict=True))
            for digest in missing:
                if there[digest]:
                    store.adopt(folder / digest, digest)
        return [digest for digest in missing if not there[digest]]

    @contextmanager
    def _scratch(self) -> Iterator[Path]:
        from tempfile import TemporaryDirectory

        self._workspace.work.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=self._workspace.root, prefix="fetched-") as name:
            yield Path(name)

    def _give(self, storage: Storage, sandbox: Sandbox, end: Succeeded) -> None:
        """Adopt the outputs into the local store, for nodes that read them, and upload them to the remote."""
        store = self._workspace.store
        files = {name: digest for port in end["outputs"].values() for name, (digest, _) in port.items()}
        files |= {f"views/{name}": digest for name, (digest, _) in end["views"].items()}
        for name, digest in files.items():
            store.adopt(sandbox.out / name, digest)
        self._upload(storage, set(files.values()))

    def _upload(self, storage: Storage, digests: Iterable[str]) -> None:
        store = self._workspace.store
        list(self._transfers.map(lambda digest: storage.give(digest, store.path(digest)), digests))

    @contextmanager
    def _worker(self, profile: str, *, new: bool) -> Iterator[Worker]:
        worker = self._starter.submit(self._workers.take, profile, new=new).result()
        try:
            yield worker
        except BaseException:
            worker.kill()
            raise
        if worker.alive() and not new:
            self._starter.submit(self._workers.give_back, worker).result()
        else:
            worker.kill()


def _mismatches(request: ReceivedTask, origin: Origin, codes: CodeDigests) -> list[str]:
    document = request["document"]
    codes.sweep_libraries()
    try:
        stage: Stage = origin.make()
        code = code_of(codes, origin.module, stage, request["rows"])
        libraries = libraries_of(codes, origin.module, stage, request["rows"])
        tools = dict(stage.tools(params_of(stage, request["params"])))
    except PipelineError as error:
        return list(error.problems)
    except Exception as error:  # noqa: BLE001 - a stage that cannot be made here, for whatever reason
        return [f"has no stage like '{document['stage']}' ({type(error).__name__}: {error})"]
    wanted, problems = document["code"], []
    if differing := sorted(name for name in wanted.keys() | code.keys() if wanted.get(name) != code.get(name)):
        more = f" and {len(differing) - SHOWN} more" if len(differing) > SHOWN else ""
        problems.append(f"its code differs: {', '.join(differing[:SHOWN])}{more}")
    for asked, found in ((document["tools"], tools), (document.get("libraries", {}), libraries)):
        for name in sorted(asked.keys() | found.keys()):
            here, there = found.get(name, "none"), asked.get(name, "none")
            if here != there:
                problems.append(f"it has {name} {here}, not {there}")
    return problems


def _refused(*problems: str) -> Refused:
    return {"event": "refused", "problems": list(problems)}
