"""Nodes on the workers of a Dask cluster: scheduler and workers are processes of their own and speak TLS."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import yaml

import stages
from stagegraph import Pipeline
from stagegraph.digest import digest_file
from stagegraph.errors import PlanError, SpecError
from stagegraph.execution.budget import Budget
from stagegraph.execution.cluster import Cluster
from stagegraph.execution.outcome import Run
from stagegraph.execution.reporter import Reporter
from stagegraph.execution.site import DIRECTORY, PROTOCOL, STALE, Site, platform
from stagegraph.execution.spreading import Spreading, request_of
from stagegraph.planning.code import CodeDigests
from stagegraph.planning.planner import code_of, libraries_of
from stagegraph.remote.settings import load_settings
from tests.engine.test_libraries import install
from tests.support.checkpoints import write_qwen

pytest.importorskip("distributed")
pytest.importorskip("obstore")
x509 = pytest.importorskip("cryptography.x509")

WORK = '''
"""Stages that say where they ran."""
from __future__ import annotations
import os, time
from dataclasses import dataclass, replace
from pathlib import Path
from stagegraph.stage import Context, In, Out, Source, Stage, param, source


class Work(Stage):
    """Adds up."""

    id = "work"

    @dataclass(frozen=True)
    class Params:
        """Parameters."""

        value: int = param("a number")
        notes: str = param("folder in which a start is noted", hashed=False)
        seconds: float = param("for how long", default=0.0, hashed=False)
        words: Source = source("text", include=("*.txt",), optional=True)
        secret: str = param("a secret", default="")

    inputs = {"before": In("work", "out", "what comes before", optional=True)}
    outputs = {"out": Out("out.txt", "the sum")}

    def run(self, ctx: Context) -> None:
        note = f"{ctx.params.value}-{os.getppid()}-{os.getpid()}-{time.time_ns()}"
        (Path(ctx.params.notes) / note).touch()
        print(f"adding {ctx.params.value}", flush=True)
        ctx.progress(1, 2, "steps")
        time.sleep(ctx.params.seconds)
        before = int(ctx.input("before").read_text()) if ctx.has_input("before") else 0
        if ctx.params.words:
            before += len(ctx.source("words").path("words.txt").read_text())
        ctx.view("page", "seen")
        (ctx.out / "out.txt").write_text(f"{before + ctx.params.value}\\n")
'''
VERSIONED = '''
"""A stage that not every worker has."""
from __future__ import annotations
import os
from stagegraph.stage import Context
from .work import Work


class Versioned(Work):
    """The same, with a tool, and code of an installed package."""

    id = "versioned"
    inputs = {}

    def tools(self, params):
        return {"adder": os.environ.get("ADDER", "1")}

    def run(self, ctx: Context) -> None:
        import stages.sizes

        super().run(ctx)
'''

SQUARES = '''
"""A stage whose parts others may make."""
from __future__ import annotations
import json, os, shutil, time
from dataclasses import dataclass
from pathlib import Path
from stagegraph.stage import Context, Piece, Out, Source, Stage, StageError, param, source


class Squares(Stage):
    """Squares the number in each file."""

    id = "squares"

    @dataclass(frozen=True)
    class Params:
        """Parameters."""

        notes: str = param("folder in which a start is noted", hashed=False)
        numbers: Source = source("a number in each", include=("*.txt",))
        seconds: float = param("for how long a square is made", default=0.0, hashed=False)
        slow: str = param("a file whose square is made for ten minutes, the first time", default="", hashed=False)
        forget: str = param("a folder that is removed before pieces are made", default="", hashed=False)

    outputs = {"out": Out("out.json", "the squares")}
    parts = {"square": "local.squares"}

    def run(self, ctx: Context) -> None:
        names = sorted(ctx.source("numbers").files)
        if ctx.params.forget:
            shutil.rmtree(ctx.params.forget)
        made = ctx.map("square", [Piece(f"file {name}", name, {"numbers": [name]}) for name in names])
        assert made is None or made == [int(ctx.source("numbers").path(name).read_text()) for name in names]
        squares = [self._square(ctx, name) for name in names]
        (ctx.out / "out.json").write_text(json.dumps(squares))

    def make(self, ctx: Context, what: str) -> int:
        assert set(ctx.source("numbers").files) == {what}, "it reads no other"
        self._square(ctx, what)
        return int(ctx.source("numbers").path(what).read_text())

    def _square(self, ctx: Context, name: str) -> int:
        number = int(ctx.source("numbers").path(name).read_text())
        part = ctx.recall("square", {"number": number})
        if part is None:
            if number < 0:
                print(f"{number} is too small", flush=True)
                raise StageError(f"{number} has no square here")
            first = not any(Path(ctx.params.notes).glob(f"{number}-*"))
            (Path(ctx.params.notes) / f"{number}-{os.getppid()}-{os.getpid()}-{time.time_ns()}").touch()
            time.sleep(600 if name == ctx.params.slow and first else ctx.params.seconds)
            file = ctx.out / name
            file.write_text(str(number * number))
            part = ctx.remember("square", {"number": number}, file)
            file.unlink()
        return int(part.path.read_text())
'''


class Process(NamedTuple):
    process: subprocess.Popen[bytes]
    log: Path


class Grid(NamedTuple):
    """A scheduler with two workers, of which the second has another tool, and other code of the package ``stages``."""

    address: str
    tls: dict[str, str]
    workers: Sequence[Process]
    start: Callable[..., Process]


def certificates(folder: Path) -> dict[str, str]:
    """Make a certificate that scheduler, workers and clients share, signed by itself."""
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "stagegraph")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem, private = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    (folder / "cert.pem").write_bytes(made.public_bytes(pem))
    (folder / "key.pem").write_bytes(key.private_bytes(pem, private, serialization.NoEncryption()))
    return {"ca": str(folder / "cert.pem"), "cert": str(folder / "cert.pem"), "key": str(folder / "key.pem")}


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Grid]:
    folder = tmp_path_factory.mktemp("grid")
    tls = certificates(folder)
    with contextlib.ExitStack() as stack:

        def start(name: str, *words: str, **environment: str) -> Process:
            files = ["--tls-ca-file", tls["ca"], "--tls-cert", tls["cert"], "--tls-key", tls["key"]]
            log = folder / f"{name}.log"
            with log.open("wb") as out:
                process = subprocess.Popen(
                    [sys.executable, "-m", "distributed.cli.dask_" + words[0], *words[1:], *files],
                    cwd=folder,
                    env=os.environ | environment,
                    stdout=out,
                    stderr=out,
                    start_new_session=True,
                )
            stack.callback(process.wait)
            stack.callback(process.kill)
            return Process(process, log)

        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        address = f"tls://127.0.0.1:{port}"
        start("scheduler", "scheduler", "--protocol", "tls", "--host", address, "--no-dashboard")

        def worker(name: str, *offers: str, **environment: str) -> Process:
            options = ["--nthreads", "1", "--no-nanny", "--no-dashboard", "--host", "127.0.0.1"]
            options += ["--local-directory", str(folder / name), *offers]
            return start(name, "worker", address, *options, **environment)

        shutil.copytree(Path(stages.__file__).parent, folder / "other" / "stages")
        with (folder / "other" / "stages" / "sizes.py").open("a", encoding="utf-8") as file:
            file.write("\nOTHER = 1\n")
        here = worker("here"), worker("other", ADDER="2", PYTHONPATH=str(folder / "other"))
        yield Grid(address, tls, here, worker)


class Client:
    """A folder with a pipeline and a store of its own, and a user whose nodes run in the cluster."""

    def __init__(self, folder: Path, remote: Path, grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.remote = folder, remote
        self.config, self.notes = folder / "config.yaml", folder / "notes"
        self.notes.mkdir(parents=True)
        (folder / "work.py").write_text(WORK)
        (folder / "versioned.py").write_text(VERSIONED)
        executor = {"kind": "dask", "scheduler": grid.address, "tls": grid.tls}
        self.config.write_text(
            json.dumps({"remotes": {"team": {"url": str(remote), "mode": "both"}}, "executor": executor})
        )
        monkeypatch.setenv("STAGEGRAPH_CONFIG", str(self.config))

    def write(self, count: int, uses: str = "Work", *, chain: bool = True, **given: Any) -> None:
        entries = {}
        for i in range(count):
            needs = [f"n{i - 1}"] if chain and i else []
            params = {"value": i + 1, "notes": str(self.notes), **given}
            entries[f"n{i}"] = {"uses": f"./{uses.lower()}.py:{uses}", "needs": needs, "with": params}
        (self.folder / "pipeline.yaml").write_text(json.dumps({"version": 1, "name": "adding", "stages": entries}))

    def run(self, reporter: Reporter | None = None, **options: Any) -> Run:
        with Pipeline(self.folder / "pipeline.yaml") as pipeline:
            return pipeline.run(reporter=reporter, **options)

    def shown(self, name: str) -> str:
        return (self.folder / "artifacts" / "adding" / name / "out.txt").read_text()

    def starts(self) -> list[list[int]]:
        """Value, process of the parent, process, of every start of a stage, in the order of time."""
        notes = [[int(word) for word in path.name.split("-")] for path in self.notes.iterdir()]
        return [note[:3] for note in sorted(notes, key=lambda note: note[3])]


@pytest.fixture
def client(tmp_path: Path, grid: Grid, monkeypatch: pytest.MonkeyPatch) -> Client:
    return Client(tmp_path / "client", tmp_path / "remote", grid, monkeypatch)


class Watching(Reporter):
    """Keeps what it hears; ``at_progress`` is called once a node reports some."""

    def __init__(self, at_progress: Callable[[], None] = lambda: None) -> None:
        self.heard: list[str] = []
        self._at_progress = at_progress

    def progress(self, node: Any, done: int, total: int, unit: str, note: str) -> None:
        self.heard.append(f"{node.name} {done}/{total} {unit}")
        self._at_progress()

    def retrying(self, node: Any, problem: str, attempt: int) -> None:
        self.heard.append(f"{node.name} again: {problem}")


def outcomes(run: Run) -> list[str]:
    return [outcome.status for outcome in run.outcomes]


def until(true: Callable[[], object]) -> None:
    while not true():
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2]
    except OSError:
        return False


def test_nodes_run_on_workers_and_end_here(client: Client, grid: Grid) -> None:
    client.write(3)
    watching = Watching()
    run = client.run(watching)
    assert outcomes(run) == ["BUILT"] * 3
    assert client.shown("n2") == "6\n"
    assert {parent for _, parent, _ in client.starts()} <= {worker.process.pid for worker in grid.workers}
    assert "n0 1/2 steps" in watching.heard
    logs = [outcome.log.read_text() for outcome in run.outcomes if outcome.log]
    assert logs == ["adding 1\n", "adding 2\n", "adding 3\n"]
    assert {path.name for path in client.folder.glob("artifacts/.stagegraph/work/*")} == set()
    objects = {path.name for path in client.remote.glob("objects/*/*")}
    for outcome in run.outcomes:
        assert outcome.record
        assert {digest for digest, _ in outcome.record["outputs"]["out"]["files"].values()} <= objects
    code = "import sys; from stagegraph.cli.main import dispatch; dispatch(['run', '-q']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=client.folder, capture_output=True, text=True, check=True)
    assert {"distributed", "dask", "obstore", "cryptography"}.isdisjoint(done.stdout.split())


def test_what_is_made_is_what_is_made_here(client: Client, tmp_path: Path) -> None:
    client.write(2)
    there = client.run()
    shutil.rmtree(client.folder / "artifacts")
    shutil.rmtree(client.remote)
    here = client.run(executor="local")
    assert outcomes(here) == ["BUILT"] * 2
    assert client.starts()[-1][1] == os.getpid()
    pairs = [(a.record, b.record) for a, b in zip(there.outcomes, here.outcomes, strict=True)]
    assert all(
        a and b and (a["key"], a["outputs"], a["views"]) == (b["key"], b["outputs"], b["views"]) for a, b in pairs
    )


def test_a_worker_that_would_make_something_else_is_refused_by_name(client: Client, grid: Grid, caplog) -> None:
    client.write(6, "Versioned", chain=False, seconds=0.2)
    watching = Watching()
    assert outcomes(client.run(watching)) == ["BUILT"] * 6
    assert {parent for _, parent, _ in client.starts()} == {grid.workers[0].process.pid}
    (said,) = [text for text in caplog.messages if "gets no 'versioned'" in text]
    assert "worker tls://127.0.0.1:" in said
    assert "its code differs: stages.sizes; it has adder 2, not 1" in said
    assert not [text for text in watching.heard if "lost" in text]


def test_a_worker_with_another_library_or_another_since_it_was_started_is_refused(tmp_path: Path, monkeypatch) -> None:
    """What is imported stays as it was, whatever the files have become, and so do the processes that stay warm."""
    install(tmp_path / "installed")
    monkeypatch.syspath_prepend(str(tmp_path / "installed"))
    text = WORK.replace("print(f", "import maths; print(f")
    request: dict[str, Any] = {
        "protocol": PROTOCOL, "platform": platform(), "key": "0" * 64, "remote": ["team", str(tmp_path)], "rows": {},
        "origin": ["local.work:Work", str(tmp_path), []], "own_files": {"work.py": b64encode(text.encode()).decode()},
        "params": {"value": 1, "notes": str(tmp_path)},
    }  # fmt: skip
    site = Site(tmp_path / "store")
    origin = site._origin(request)
    codes = CodeDigests(site._workspace.index, Path(origin.folder))
    stage = origin.make()
    document: dict[str, Any] = {"stage": "work", "tools": {}, "code": code_of(codes, origin.module, stage, {})}
    libraries = libraries_of(codes, origin.module, stage, {})
    assert "maths-lib" in libraries
    other = document | {"libraries": libraries | {"maths-lib": "1.0 of another build"}}
    refused = site.run(request | {"document": other}, lambda _event: None, lambda: False)
    assert refused["event"] == "refused"
    (problem,) = refused["problems"]
    assert problem == f"it has maths-lib {libraries['maths-lib']}, not 1.0 of another build"

    def rebuilt(*_arguments: Any) -> dict[str, Any]:
        (tmp_path / "installed" / "maths" / "fast.so").write_bytes(b"rebuilt")
        return {"event": "end", "ok": True}

    monkeypatch.setattr(Site, "_run", rebuilt)
    for _ in ("meanwhile", "before"):
        ended = site.run(
            request | {"document": document | {"libraries": libraries}}, lambda _event: None, lambda: False
        )
        assert ended == {"event": "refused", "problems": [STALE]}


def test_a_worker_lends_what_it_has_of_a_node_s_own_inputs(tmp_path: Path) -> None:
    site, given = Site(tmp_path / "store"), list[str]()
    (tmp_path / "here").write_text("here")
    here, lost, foreign = digest_file(tmp_path / "here"), "a" * 64, "b" * 64
    site._workspace.store.adopt(tmp_path / "here", here)
    layout = {"port": [({}, "x", {"x": [here, 4], "y": [lost, 4]})]}
    request: Any = {"sources": {}, "layout": layout}
    storage: Any = SimpleNamespace(give=lambda digest, _path: given.append(digest))
    spreading = site._spreading(request, storage, lambda _event: None, lambda: False)
    assert spreading._lend([here, lost, foreign]) == [lost, foreign]
    assert given == [here]


def test_where_no_worker_fits_the_node_fails_with_every_reason(client: Client, grid: Grid, monkeypatch) -> None:
    client.write(1)
    monkeypatch.setattr("stagegraph.execution.cluster.platform", lambda: "plan9 mips")
    run = client.run()
    assert outcomes(run) == ["FAILED"]
    (problem,) = run.outcomes[0].problems
    assert problem.startswith("no worker can run it: tls://127.0.0.1:")
    assert problem.count(f"is {sys.platform} {os.uname().machine}, not plan9 mips") == len(grid.workers)


def test_what_a_worker_lacks_is_given_to_the_remote(client: Client, monkeypatch) -> None:
    (client.folder / "words").mkdir()
    (client.folder / "words" / "words.txt").write_text("four")
    client.write(1)
    assert outcomes(client.run(executor="local")) == ["BUILT"]
    shutil.rmtree(client.remote)
    client.write(2, words="words")
    request = Cluster.request

    def elsewhere(self: Cluster, task: Any) -> dict[str, Any]:
        found = request(self, task)
        for source in found["sources"].values():
            source["files"] = {name: f"/nowhere/{name}" for name in source["files"]}
        return found

    monkeypatch.setattr(Cluster, "request", elsewhere)
    assert outcomes(client.run()) == ["BUILT", "BUILT"]
    assert client.shown("n1") == "11\n"


def test_a_node_whose_worker_is_killed_runs_elsewhere(client: Client, grid: Grid) -> None:
    doomed = grid.start("doomed").process
    client.write(6, chain=False, seconds=0.5)
    killed: list[int] = []

    def kill() -> None:
        theirs = [process for _, parent, process in client.starts() if parent == doomed.pid]
        if theirs and not killed:
            doomed.send_signal(signal.SIGKILL)
            killed.extend(theirs)

    until(lambda: "Registered to" in (grid.workers[0].log.parent / "doomed.log").read_text())
    watching = Watching(kill)
    run = client.run(watching)
    assert outcomes(run) == ["BUILT"] * 6
    assert killed
    assert len(client.starts()) <= 6 + 1
    assert [text for text in watching.heard if "was lost" in text]
    until(lambda: not alive(killed[-1]))
    assert [client.shown(f"n{i}") for i in range(6)] == [f"{i + 1}\n" for i in range(6)]


def test_an_interrupt_ends_what_runs_elsewhere(client: Client) -> None:
    client.write(1, seconds=600)

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        client.run(Watching(interrupt))
    ((_, _, process),) = client.starts()
    until(lambda: not alive(process))
    assert not list(client.folder.glob("artifacts/.stagegraph/work/*"))


def test_a_failure_and_a_timeout_are_said_as_here(client: Client) -> None:
    client.write(1, words="words")
    (client.folder / "words").mkdir()
    (client.folder / "words" / "other.txt").write_text("")
    run = client.run()
    assert outcomes(run) == ["FAILED"]
    assert "no file named 'words.txt' there" in run.outcomes[0].problems[0]
    assert run.outcomes[0].log
    assert run.outcomes[0].log.read_text() == "adding 1\n"
    client.write(1, seconds=600)
    text = (client.folder / "pipeline.yaml").read_text().replace('"uses"', '"timeout": 1, "uses"')
    (client.folder / "pipeline.yaml").write_text(text)
    run = client.run()
    assert outcomes(run) == ["FAILED"]
    assert "longer than its timeout of 1 s" in run.outcomes[0].problems[0]
    until(lambda: not alive(client.starts()[-1][2]))


def test_resources_and_labels_choose_the_worker(client: Client, grid: Grid) -> None:
    gifted = grid.start("gifted", "--resources", "GPU=1 big=1 MEMORY=4e9")
    client.write(4, chain=False)
    text = json.loads((client.folder / "pipeline.yaml").read_text())
    for name, takes in {
        "n0": {"labels": ["GPU=1"]},
        "n1": {"labels": ["big"]},
        "n2": {"memory": "1 GiB", "labels": ["GPU=1"]},
    }.items():
        text["stages"][name]["resources"] = takes
    (client.folder / "pipeline.yaml").write_text(json.dumps(text))
    run = client.run()
    assert outcomes(run) == ["BUILT"] * 4
    parents = {value: parent for value, parent, _ in client.starts()}
    assert {parents[value] for value in (1, 2, 3)} == {gifted.process.pid}
    gifted.process.kill()


def test_secrets_stay_here(client: Client, monkeypatch) -> None:
    monkeypatch.setenv("PASSWORD", "opensesame")
    client.write(2, chain=False, secret="${secret.PASSWORD}")  # noqa: S106 - no secret
    run = client.run()
    assert outcomes(run) == ["BUILT"] * 2
    assert {parent for _, parent, _ in client.starts()} == {os.getpid()}


@pytest.mark.slow  # Dask's client tries for a quarter of a minute to reach the scheduler again
def test_a_scheduler_that_is_not_there_or_dies_ends_the_run_with_a_word(
    client: Client, grid: Grid, monkeypatch
) -> None:
    client.write(1)
    monkeypatch.setattr("stagegraph.execution.cluster.CONNECT_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
    with pytest.raises(PlanError, match="cannot be reached"):
        client.run(scheduler=address)
    command = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", address, "--no-dashboard"]
    scheduler = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    monkeypatch.setattr("stagegraph.execution.cluster.CONNECT_SECONDS", 15)
    until(lambda: not socket.socket().connect_ex(("127.0.0.1", int(address.rpartition(":")[2]))))
    monkeypatch.setattr("stagegraph.execution.cluster.warn", lambda text: scheduler.kill())  # no worker is connected
    with pytest.raises(PlanError, match="is gone"):
        client.run(scheduler=address)
    assert scheduler.wait()


# -- one node on several workers -------------------------------------------------------------------------------------


def write_squares(client: Client, numbers: Sequence[int], **given: Any) -> None:
    (client.folder / "squares.py").write_text(SQUARES)
    (client.folder / "numbers").mkdir(exist_ok=True)
    for i, number in enumerate(numbers):
        (client.folder / "numbers" / f"{i}.txt").write_text(str(number))
    params = {"notes": str(client.notes), "numbers": "numbers", **given}
    entry = {"uses": "./squares.py:Squares", "with": params}
    (client.folder / "pipeline.yaml").write_text(json.dumps({"version": 1, "name": "adding", "stages": {"n0": entry}}))


def squares(client: Client) -> list[int]:
    found: list[int] = json.loads((client.folder / "artifacts" / "adding" / "n0" / "out.json").read_text())
    return found


def test_pieces_of_a_node_are_made_by_all_workers_each_once(client: Client, grid: Grid) -> None:
    write_squares(client, range(8), seconds=0.3)
    watching = Watching()
    (there,) = client.run(watching).outcomes
    assert (there.status, squares(client)) == ("BUILT", [number * number for number in range(8)])
    starts = client.starts()
    assert sorted(value for value, _, _ in starts) == [*range(8)]
    assert {parent for _, parent, _ in starts} == {worker.process.pid for worker in grid.workers}
    assert "n0 8/8 pieces" in watching.heard
    shutil.rmtree(client.folder / "artifacts")
    shutil.rmtree(client.remote)
    write_squares(client, range(8))
    (here,) = client.run(executor="local").outcomes
    assert here.record
    assert there.record
    for name in ("key", "outputs", "parts"):
        assert here.record[name] == there.record[name]  # type: ignore[literal-required]
    assert here.record["parts"]["square"]["made"] == 8


def test_a_piece_that_fails_is_named_and_ends_the_others(client: Client) -> None:
    write_squares(client, [-1, *range(200, 207)], seconds=1)  # of which no worker has any from another test
    (outcome,) = client.run().outcomes
    assert outcome.status == "FAILED"
    assert outcome.problems == ("file 0.txt: -1 has no square here",)
    assert outcome.log
    assert outcome.log.read_text() == "-1 is too small\n"
    assert len(client.starts()) < 7


@pytest.fixture
def spreading() -> Spreading:
    """The pieces of a node that asks for a GPU, with a cluster that takes whatever it is given."""
    request: Any = {"key": "0" * 64, "sources": {}, "sizes": {}, "layout": {}, "labels": ["GPU"]}
    found = Spreading(
        request,
        str,
        fetch=lambda _: [],
        lend=lambda _: [],
        tell=lambda _done, _total: None,
        cancelled=lambda: False,
        meanwhile=contextlib.nullcontext,
    )
    workers = {"tcp://a:1": {"resources": {"big": 1}}, "tcp://b:1": {"resources": {"GPU": 1}}}
    found._client = SimpleNamespace(
        scheduler_info=lambda n_workers: {"workers": workers}, submit=lambda *_given, **how: how["key"]
    )
    return found


PIECE: Any = {"kind": "square", "name": "file 1", "what": 1, "files": {}}


def test_a_piece_that_no_worker_may_make_fails_by_name(spreading: Spreading) -> None:
    spreading._refused["tcp://b:1"] = "tcp://b:1: its code differs: local.squares"
    said: Any = spreading._made([PIECE])
    (problem,) = said["problems"]
    assert problem == "file 1: no worker can make it: tcp://b:1: its code differs: local.squares; others offer no GPU"


def test_of_an_input_whose_files_a_piece_names_it_is_given_these() -> None:
    files = {"bundle/a": ["a" * 64, 1], "bundle/b/c": ["b" * 64, 2]}
    layout = {"bundle": [({}, "bundle", files)], "params": [({}, "params.json", {"params.json": ["c" * 64, 3]})]}
    request: Any = {"key": "0" * 64, "sources": {}, "sizes": {}, "layout": layout}
    assert request_of(request, PIECE)["layout"] == layout
    some = request_of(request, {**PIECE, "files": {"bundle": ["b/c"]}})["layout"]
    assert some == {**layout, "bundle": [({}, "bundle", {"bundle/b/c": files["bundle/b/c"]})]}


def test_parts_whose_digests_name_no_object_are_not_fetched(spreading: Spreading, monkeypatch) -> None:
    monkeypatch.setattr(spreading, "_fetch", lambda _: pytest.fail("it was fetched"))
    entry = {"schema": 1, "kind": "square", "digest": "../../../x", "size": 1, "facts": {}}
    made: Any = {"event": "made", "result": 0, "parts": {"part:x": entry}, "cpu_seconds": 0.0, "peak_bytes": 0}
    again = spreading._again(0, PIECE, made)
    assert again
    assert again["problems"] == ["file 1: its worker reports invalid parts"]


def test_pieces_that_lack_the_same_are_each_asked_once_more(spreading: Spreading) -> None:
    lacks: Any = {"event": "lacks", "digests": ["a" * 64]}
    assert [spreading._again(index, PIECE, lacks) for index in (0, 1)] == [None, None]
    again = spreading._again(0, PIECE, lacks)
    assert again
    assert again["problems"] == ["file 1: its worker does not find its inputs in the remote"]


def test_an_interrupt_ends_pieces_that_are_made_elsewhere(client: Client) -> None:
    write_squares(client, range(100, 104), slow="3.txt")

    def interrupt() -> None:  # at the first piece that is done
        until(lambda: 103 in [value for value, _, _ in client.starts()])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        client.run(Watching(interrupt))
    (slow,) = [process for value, _, process in client.starts() if value == 103]
    until(lambda: not alive(slow))


@pytest.mark.slow
def test_a_worker_that_is_killed_amid_a_piece_costs_that_piece(client: Client, grid: Grid) -> None:
    """It may be the one that has the node, too: then pieces are sent out again, and those that are made are known."""
    started = [grid.start(f"amid-{i}", "--resources", "amid=1").process for i in range(2)]
    write_squares(client, range(300, 306), slow="3.txt")
    document = json.loads((client.folder / "pipeline.yaml").read_text())
    document["stages"]["n0"]["resources"] = {"labels": ["amid"]}  # so that it is one of these that dies
    (client.folder / "pipeline.yaml").write_text(json.dumps(document))
    for i in range(2):
        until(lambda i=i: "Registered to" in (grid.workers[0].log.parent / f"amid-{i}.log").read_text())
    killed: list[int] = []

    def kill() -> None:
        if not killed:
            until(lambda: 303 in [value for value, _, _ in client.starts()])
            killed.append(next(parent for value, parent, _ in client.starts() if value == 303))
            os.kill(killed[0], signal.SIGKILL)

    (there,) = client.run(Watching(kill)).outcomes
    assert (there.status, squares(client)) == ("BUILT", [number * number for number in range(300, 306)])
    assert {parent for _, parent, _ in client.starts()} == {process.pid for process in started}
    (again,) = [parent for value, parent, _ in client.starts() if value == 303 and parent != killed[0]]
    assert alive(again)
    for process in started:
        process.kill()
    shutil.rmtree(client.folder / "artifacts")
    shutil.rmtree(client.remote)
    (here,) = client.run(executor="local").outcomes
    assert here.record
    assert there.record
    assert (here.record["key"], here.record["outputs"]) == (there.record["key"], there.record["outputs"])


def test_what_a_worker_offers_is_taken_by_one_after_the_other() -> None:
    budget, order, over = Budget(1000), list[str](), threading.Event()

    def take(name: str, mebibytes: int) -> None:
        with budget.taken(mebibytes, over.is_set):
            order.append(name)

    with budget.taken(600, over.is_set):
        beside = threading.Thread(target=take, args=("beside", 400))
        beside.start()
        beside.join()
        waits = threading.Thread(target=take, args=("waits", 600))
        waits.start()
        assert order == ["beside"]
        with budget.lent(600, over.is_set):  # as while its pieces are made
            waits.join()
        ends = threading.Thread(target=take, args=("ends", 600))
        ends.start()
        over.set()  # whoever waits need not any more
        ends.join()
    take("all, and more", 2000)
    assert order == ["beside", "waits", "ends", "all, and more"]


@pytest.mark.slow
def test_pieces_take_no_more_memory_than_their_worker_offers(client: Client, grid: Grid) -> None:
    """Two threads, and room for one piece: each begins once the one before has ended."""
    roomy = grid.start("roomy", "--nthreads", "2", "--resources", f"roomy=1 MEMORY={1 << 30}").process
    write_squares(client, range(600, 604), seconds=0.5)
    document = json.loads((client.folder / "pipeline.yaml").read_text())
    document["stages"]["n0"]["resources"] = {"labels": ["roomy"], "memory": "600 MiB"}
    (client.folder / "pipeline.yaml").write_text(json.dumps(document))
    until(lambda: "Registered to" in (grid.workers[0].log.parent / "roomy.log").read_text())
    (outcome,) = client.run().outcomes
    roomy.kill()
    assert (outcome.status, squares(client)) == ("BUILT", [number * number for number in range(600, 604)])
    began = sorted(int(path.name.split("-")[3]) for path in client.notes.iterdir())
    assert all(after - before >= 500_000_000 for before, after in itertools.pairwise(began))


@pytest.mark.slow
def test_a_worker_with_other_code_makes_no_piece(client: Client, grid: Grid) -> None:
    write_squares(client, range(400, 406), seconds=0.2)
    text = SQUARES.replace("import json, os", "import stages.sizes\nimport json, os")
    (client.folder / "squares.py").write_text(text)
    (outcome,) = client.run().outcomes
    assert (outcome.status, squares(client)) == ("BUILT", [number * number for number in range(400, 406)])
    assert {parent for _, parent, _ in client.starts()} == {grid.workers[0].process.pid}
    assert sorted(value for value, _, _ in client.starts()) == [*range(400, 406)]


@pytest.mark.slow
def test_a_worker_that_lacks_what_a_piece_reads_is_given_it(client: Client, grid: Grid, monkeypatch) -> None:
    """The worker that has the node has the files too, and nobody else: the remote has lost them meanwhile."""
    request = Cluster.request

    def elsewhere(self: Cluster, task: Any) -> dict[str, Any]:
        found = request(self, task)
        for source in found["sources"].values():
            source["files"] = {name: f"/nowhere/{name}" for name in source["files"]}
        return found

    monkeypatch.setattr(Cluster, "request", elsewhere)
    write_squares(client, range(500, 508), seconds=0.3, forget=str(client.remote / "objects"))
    (outcome,) = client.run().outcomes
    assert (outcome.status, squares(client)) == ("BUILT", [number * number for number in range(500, 508)])
    assert {parent for _, parent, _ in client.starts()} == {worker.process.pid for worker in grid.workers}


@pytest.mark.slow
@pytest.mark.parametrize("dies", [False, True])
def test_weights_quantized_by_several_workers_are_those_quantized_here(client: Client, grid: Grid, dies: bool) -> None:
    """Also where one of them is killed while it converts some."""
    second = grid.start(f"second-{dies}").process
    write_qwen(client.folder / "model", hidden=256, ff=256, layers=3)
    needs = ["config-parse", "param-register"]
    scheme = {"scheme": "q4f32_1", "target": "llvm"}
    entries = {
        "config-parse": {"with": {"checkpoint": "model"}},
        "param-register": {"needs": needs[:1], "with": scheme},
        "quantize": {"needs": needs, "with": {"checkpoint": "model", "batch": 1, **scheme}},
    }
    (client.folder / "pipeline.yaml").write_text(json.dumps({"version": 1, "name": "adding", "stages": entries}))
    until(lambda: "Registered to" in (grid.workers[0].log.parent / f"second-{dies}.log").read_text())
    left: list[int] = []  # of the pieces, when it was killed

    def kill() -> None:
        made = re.fullmatch(r"quantize (\d+)/(\d+) pieces", watching.heard[-1])
        if dies and made and not left:
            left.append(int(made[2]) - int(made[1]))
            second.kill()

    watching = Watching(kill)
    there = client.run(watching)
    assert outcomes(there) == ["BUILT"] * 3
    assert [text for text in watching.heard if re.fullmatch(r"quantize (\d)/\1 pieces", text) and "1/1" not in text]
    assert not dies or left[0] > 1
    second.terminate()
    shutil.rmtree(client.folder / "artifacts")
    shutil.rmtree(client.remote)
    here = client.run(executor="local")
    assert outcomes(here) == ["BUILT"] * 3
    for a, b in zip(there.outcomes, here.outcomes, strict=True):
        assert a.record
        assert b.record
        assert (a.record["key"], a.record["outputs"], a.record["views"]) == (
            b.record["key"],
            b.record["outputs"],
            b.record["views"],
        )
        assert dies or a.record["parts"].get("tensor") == b.record["parts"].get("tensor")


# -- the files for SLURM and Kubernetes ------------------------------------------------------------------------------

FILES = Path(__file__).parents[2] / "examples" / "cluster"


@pytest.fixture
def machine(tmp_path: Path, grid: Grid) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts a command as a machine of the cluster would: ``dask`` and ``srun`` are found, certificates are mounted."""
    for name, runs in {"dask": f'"{sys.executable}" -m dask "$@"', "srun": '"$@"'}.items():
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\nexec {runs}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "tls").mkdir()
    for name, kind in {
        "ca.pem": "ca",
        "head.pem": "cert",
        "head.key": "key",
        "worker.pem": "cert",
        "worker.key": "key",
    }.items():
        shutil.copy(grid.tls[kind], tmp_path / "tls" / name)
    started: list[subprocess.Popen[bytes]] = []

    def start(command: Sequence[str], **environment: str) -> subprocess.Popen[bytes]:
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        given = {**os.environ, "PATH": path, **environment}
        started.append(subprocess.Popen(command, cwd=tmp_path, env=given, start_new_session=True))
        return started[-1]

    yield start
    for process in reversed(started):
        process.terminate()
        process.wait()


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def needing_memory(client: Client) -> None:
    """Write a pipeline of one node, which goes to a worker that offers memory, if there is one."""
    client.write(1)
    text = json.loads((client.folder / "pipeline.yaml").read_text())
    text["stages"]["n0"]["resources"] = {"memory": "2 GiB"}
    (client.folder / "pipeline.yaml").write_text(json.dumps(text))


def test_the_file_for_slurm_starts_a_worker(client: Client, grid: Grid, machine, tmp_path: Path) -> None:
    """With what SLURM sets for a task of two processors with 1 GiB each: it offers 2 GiB."""
    script = FILES / "slurm.sh"
    sbatch = [line.split()[1].partition("=") for line in script.read_text().splitlines() if line.startswith("#SBATCH")]
    asked = {option: value for option, _, value in sbatch}
    assert {"--ntasks", "--cpus-per-task", "--mem-per-cpu"} <= asked.keys()  # the variables below are set for these
    task = {"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "2", "SLURM_MEM_PER_CPU": "1024", "SLURM_TMPDIR": str(tmp_path)}
    worker = machine(["bash", str(script), grid.address], TLS=str(tmp_path / "tls"), **task)
    needing_memory(client)
    offering = f"{2 << 30}"
    until(lambda: offering in offers(grid))
    assert outcomes(client.run()) == ["BUILT"]
    ((_, parent, _),) = client.starts()
    assert parent_of(parent) == worker.pid  # Dask's nanny, which the script has become
    assert (tmp_path / "stagegraph-7").is_dir()


def offers(grid: Grid) -> set[str]:
    """Return how much memory each worker of the grid offers."""
    from distributed import Client as Dask
    from distributed.security import Security

    files = {"tls_ca_file": grid.tls["ca"], "tls_client_cert": grid.tls["cert"], "tls_client_key": grid.tls["key"]}
    with Dask(grid.address, security=Security(require_encryption=True, **files), set_as_default=False) as dask:
        workers = dask.scheduler_info(n_workers=-1)["workers"].values()
    return {f"{worker['resources'].get('MEMORY', 0):.0f}" for worker in workers}


def kubernetes() -> dict[tuple[str, str], Any]:
    """Return the objects of the file for Kubernetes by kind and name."""
    found = list(yaml.safe_load_all((FILES / "kubernetes.yaml").read_text()))
    return {(each["kind"], each["metadata"]["name"]): each for each in found}


def command_of(container: Any, folders: dict[str, Path], **replaced: str) -> tuple[list[str], dict[str, str]]:
    """Return what a container runs, and its environment, with other folders in the place of what it mounts."""
    sizes = {f"limits.{name}": amount for name, amount in container["resources"]["limits"].items()}
    environment = {
        each["name"]: each["value"] if "value" in each else sizes[each["valueFrom"]["resourceFieldRef"]["resource"]]
        for each in container.get("env", ())
    }
    environment = {
        name: re.sub(r"^(\d+)Gi$", lambda m: str(int(m[1]) << 30), text) for name, text in environment.items()
    }
    words = [
        re.sub(r"\$\((\w+)\)", lambda m: environment[m[1]], word) for word in container["command"] + container["args"]
    ]

    def here(text: str) -> str:
        for mount in container["volumeMounts"]:
            text = re.sub(rf"(^|=){mount['mountPath']}/", rf"\g<1>{folders[mount['name']]}/", text)
        for old, new in replaced.items():
            text = text.replace(old, new)
        return text

    return [here(word) for word in words], {name: here(f"{text}/")[:-1] for name, text in environment.items()}


def test_what_the_file_for_kubernetes_starts_runs_nodes(client: Client, machine, tmp_path: Path) -> None:
    """Its scheduler and one of its workers, as processes of this machine."""
    objects = kubernetes()
    head, worker = (
        objects["Deployment", f"stagegraph-{name}"]["spec"]["template"]["spec"] for name in ("scheduler", "worker")
    )
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    folders = {"tls": tmp_path / "tls", "scratch": tmp_path / "scratch"}
    for pod in (head, worker):
        (container,) = pod["containers"]
        command, environment = command_of(
            container, folders, **{"0.0.0.0:8786": address, "stagegraph-scheduler:8786": address}
        )
        machine(command, **environment)
    needing_memory(client)
    assert outcomes(client.run(executor="dask", scheduler=f"tls://{address}")) == ["BUILT"]
    assert (tmp_path / "scratch" / "store" / ".stagegraph" / "objects").is_dir()


def test_the_parts_of_the_file_for_kubernetes_find_each_other() -> None:
    objects = kubernetes()
    service = objects["Service", "stagegraph-scheduler"]["spec"]
    pods = {}
    for (kind, name), found in objects.items():
        if kind == "Deployment":
            assert found["apiVersion"] == "apps/v1"
            template = found["spec"]["template"]
            assert found["spec"]["selector"]["matchLabels"] == template["metadata"]["labels"]
            pods[name] = template["spec"]
            (container,) = template["spec"]["containers"]
            volumes = {volume["name"] for volume in template["spec"]["volumes"]}
            assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    assert (
        service["selector"] == objects["Deployment", "stagegraph-scheduler"]["spec"]["template"]["metadata"]["labels"]
    )
    (port,), (head,) = service["ports"], pods["stagegraph-scheduler"]["containers"]
    assert port["targetPort"] == head["ports"][0]["name"]
    (worker,) = pods["stagegraph-worker"]["containers"]
    assert worker["command"][-1] == f"tls://stagegraph-scheduler:{port['port']}"
    assert head["image"] == worker["image"]
    assert DIRECTORY in {each["name"] for each in worker["env"]}


# -- what is configured ----------------------------------------------------------------------------------------------

TEAM = {"team": {"url": "/tmp/team", "mode": "both"}}


@pytest.mark.parametrize(
    ("executor", "remotes", "given", "said"),
    [
        ({}, TEAM, ("dask", ""), "needs the address of its scheduler"),
        ({}, TEAM, ("", "tcp://10.0.0.1:8786"), "without TLS can run anything"),
        ({}, TEAM, ("", "10.0.0.1:8786"), "expected tls://HOST:PORT"),
        ({}, TEAM, ("local", "tcp://127.0.0.1:1"), "use one of them"),
        ({}, {"team": {"url": "/tmp/team"}}, ("", "tcp://127.0.0.1:1"), "there is no remote with mode both"),
        ({"remote": "other"}, TEAM, ("", "tcp://127.0.0.1:1"), "there is no remote 'other' with mode both"),
    ],
)
def test_what_a_cluster_lacks_is_said(executor, remotes, given, said, tmp_path, monkeypatch) -> None:
    (tmp_path / "config.yaml").write_text(json.dumps({"remotes": remotes, "executor": executor}))
    monkeypatch.setenv("STAGEGRAPH_CONFIG", str(tmp_path / "config.yaml"))
    with pytest.raises(PlanError, match=said):
        load_settings().cluster(*given)


def test_a_place_that_is_typed_wrongly_is_refused_where_nothing_is_left_to_do(client: Client) -> None:
    client.write(1)
    assert outcomes(client.run(executor="local")) == ["BUILT"]
    with pytest.raises(PlanError, match="expected tls://HOST:PORT"):
        client.run(executor="dask", scheduler="foo")


def test_an_executor_is_read_and_its_mistakes_are_all_said(tmp_path, monkeypatch) -> None:
    config = tmp_path / "config.yaml"
    monkeypatch.setenv("STAGEGRAPH_CONFIG", str(config))
    tls = {"ca": "ca.pem", "cert": "~/me.pem"}
    executor = {"kind": "dask", "scheduler": "tls://head:8786", "remote": "team", "tls": tls}
    config.write_text(json.dumps({"remotes": TEAM, "executor": executor}))
    found = load_settings().cluster()
    assert found
    assert (found.scheduler, found.remote.name) == ("tls://head:8786", "team")
    assert found.tls == {"ca": str(tmp_path / "ca.pem"), "cert": str(Path("~/me.pem").expanduser())}
    assert load_settings().cluster("local") is None
    config.write_text(json.dumps({"executor": {"kind": "ray", "insecure": 1, "port": 1, "scheduler": []}}))
    with pytest.raises(SpecError) as error:
        load_settings()
    assert len(error.value.problems) == 4


@pytest.mark.parametrize(
    ("name", "digest"), [("../out", "a" * 64), ("/tmp/out", "a" * 64), ("x", "../" * 10 + "x"), ("x", None)]
)
def test_a_worker_chooses_neither_where_files_are_put_nor_what_it_is_given(tmp_path: Path, name: str, digest) -> None:
    asked: list[str] = []
    storage = SimpleNamespace(
        take=lambda digest, size, target: asked.append(target), give=lambda digest, path: asked.append(digest)
    )
    store = SimpleNamespace(path=lambda digest: tmp_path / digest)
    cluster = SimpleNamespace(_through=lambda: storage, workspace=SimpleNamespace(store=store), _remote="remote 'x'")
    said: list[dict] = []
    layout = {"in": [({}, "in", {"x": ["b" * 64, 1]})]}
    prepared = SimpleNamespace(sources={})
    task = SimpleNamespace(layout=layout, prepared=prepared, sandbox=SimpleNamespace(out=tmp_path / "sandbox"))
    slot = SimpleNamespace(task=task, deliver=said.append)
    Cluster.collect(cluster, slot, {"outputs": {"out": {name: (digest, 1)}}, "views": {}})
    assert [event["event"] for event in said] == ["gone"]
    assert not asked
    Cluster.supply(cluster, slot, ["b" * 64, "../secret"])
    assert asked == ["b" * 64]
