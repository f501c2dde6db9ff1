"""Results that machines share: one makes them, another takes them; whatever a remote does, no run breaks."""

from __future__ import annotations

import json
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from hashlib import sha256
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from benchmarks import scale
from stagegraph import Pipeline
from stagegraph.cli import main as cli
from stagegraph.errors import PipelineError
from stagegraph.execution.executor import Options
from stagegraph.execution.outcome import Outcome, Run
from stagegraph.execution.reporter import Reporter
from stagegraph.execution.scheduler import Scheduler
from stagegraph.remote import storage, web
from stagegraph.remote.settings import Remote, load_settings
from stagegraph.remote.shared import Fetched, Shared
from stagegraph.remote.storage import StoppedError, Storage

obstore = pytest.importorskip("obstore")
pytest.importorskip("cryptography")
NODES = 4
LAST = f"n{NODES - 1}"


class Machine:
    """A folder with a pipeline and a store of its own, and a user with a configuration."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.config = folder / "config" / "config.yaml"
        self._monkeypatch = monkeypatch
        self.config.parent.mkdir(parents=True)
        scale.write(folder, "chain", NODES)

    def configure(self, url: object, mode: str = "both", **trusted: str) -> None:
        self.config.write_text(json.dumps({"remotes": {"team": {"url": str(url), "mode": mode}}, "trusted": trusted}))

    def verb(self, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
        self._monkeypatch.setenv("STAGEGRAPH_CONFIG", str(self.config))
        self._monkeypatch.chdir(self.folder)
        code = cli.dispatch(list(words))
        said = capsys.readouterr()
        return code, said.out, said.err

    def key(self, capsys: pytest.CaptureFixture[str]) -> str:
        return self.verb(capsys, "remote", "key")[1].strip()

    def run(self) -> Run:
        self._monkeypatch.setenv("STAGEGRAPH_CONFIG", str(self.config))
        with Pipeline(self.folder / "pipeline.yaml") as pipeline:
            return pipeline.run()

    def shown(self) -> str:
        return (self.folder / "artifacts" / "chain" / LAST / "out.txt").read_text()


@pytest.fixture
def machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Machine]:
    return lambda name: Machine(tmp_path / name, monkeypatch)


@pytest.fixture
def filled(tmp_path: Path, machines, capsys) -> tuple[Path, Machine, str]:
    """A remote with the results of one machine, that machine, and its public key."""
    here = machines("here")
    here.configure(tmp_path / "remote")
    assert outcomes(here.run()) == ["BUILT"] * NODES
    return tmp_path / "remote", here, here.key(capsys)


def outcomes(run: Run) -> list[str]:
    return [outcome.status for outcome in run.outcomes]


def reasons(run: Run) -> set[str]:
    return {outcome.reason for outcome in run.outcomes}


def test_another_machine_takes_what_one_made(filled, machines) -> None:
    remote, here, public = filled
    there = machines("there")
    there.configure(remote, "read", here=public)
    run = there.run()
    assert (outcomes(run), reasons(run)) == (["HIT"] * NODES, {"from remote 'team'"})
    assert there.shown() == here.shown()
    assert reasons(there.run()) == {""}
    assert not list((there.folder / "artifacts" / ".stagegraph" / "work").glob("*"))
    with Pipeline(there.folder / "pipeline.yaml") as pipeline:
        found = pipeline.lineage(LAST)
    assert len(found.origins) == NODES


def test_who_is_not_trusted_is_not_believed(filled, machines, caplog) -> None:
    remote, _, public = filled
    there = machines("there")
    there.configure(remote, "read")
    assert outcomes(there.run()) == ["BUILT"] * NODES
    other = "0" * 64
    there = machines("third")
    there.configure(remote, "read", other=other)
    for record in list(remote.glob("records/*/*/*")):  # put under the trusted name
        record.rename(record.with_name(other[:16]))
    assert outcomes(there.run()) == ["BUILT"] * NODES
    assert len([text for text in caplog.messages if "signed by a key that is not trusted" in text]) == NODES
    assert public


@pytest.mark.parametrize("damage", ["flip", "truncate", "grow", "remove"])
@pytest.mark.parametrize("what", ["objects", "records"])
def test_what_is_damaged_is_not_there(filled, machines, caplog, what: str, damage: str) -> None:
    remote, here, public = filled
    for path in sorted(remote.glob(f"{what}/*/*" if what == "objects" else f"{what}/*/*/*")):
        content = path.read_bytes()
        path.chmod(0o644)
        middle = len(content) // 2
        path.write_bytes(
            {
                "flip": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
                "truncate": content[:-1],
                "grow": content + b" x",
                "remove": b"",
            }[damage]
        )
        if damage == "remove":
            path.unlink()
    there = machines("there")
    there.configure(remote, "read", here=public)
    assert outcomes(there.run()) == ["BUILT"] * NODES
    assert there.shown() == here.shown()
    said = [text for text in caplog.messages if "; ignored" in text]
    assert len(said) == (0 if (what, damage) == ("records", "remove") else NODES)


def test_a_record_of_another_key_and_files_that_leave_their_folder_are_refused(filled, machines, monkeypatch) -> None:
    remote, here, public = filled
    records = sorted(remote.glob("records/*/*/*"))
    first = records[0].read_bytes()
    for record in records[1:]:
        record.write_bytes(first)
    there = machines("there")
    there.configure(remote, "read", here=public)
    assert outcomes(there.run()).count("HIT") <= 1
    from stagegraph.digest import digest_json
    from stagegraph.remote.shared import Signer, _believed

    monkeypatch.setenv("STAGEGRAPH_CONFIG", str(here.config))
    signer = Signer(here.config.with_name("signing.key"))
    record = json.loads(first)["record"]
    assert _believed(json.dumps(signer.sign(record)).encode(), record["key"], public) is not None
    files = record["outputs"]["out"]["files"]
    for odd in ("../" * 16 + "etc", "", 7):
        record["views"] = {"page": [odd, 1]}
        assert _believed(json.dumps(signer.sign(record)).encode(), record["key"], public) is None
    record["views"] = {}
    record["outputs"]["out"]["files"] = {"../../escaped": next(iter(files.values()))}
    record["outputs"]["out"]["digest"] = digest_json({"../../escaped": next(iter(files.values()))[0]})
    assert _believed(json.dumps(signer.sign(record)).encode(), record["key"], public) is None


def limited(machine: Machine, memory: str) -> None:
    file = machine.folder / "pipeline.yaml"
    file.write_text(file.read_text().replace("with: {", f"resources: {{memory: {memory}}}, with: {{"))


def test_memory_is_asked_for_only_where_a_node_runs(filled, machines) -> None:
    remote, here, public = filled
    there = machines("there")
    there.configure(remote, "read", here=public)
    limited(there, "900 TiB")
    assert outcomes(there.run()) == ["HIT"] * NODES
    shutil.rmtree(remote / "records")
    there = machines("third")
    there.configure(remote, "read", here=public)
    limited(there, "900 TiB")
    run = there.run()
    assert outcomes(run) == ["FAILED", *["SKIPPED"] * (NODES - 1)]
    assert "its resources.memory is 921600 GiB" in run.outcomes[0].problems[0]
    assert here.shown()


def test_after_a_failure_nothing_more_is_started_under_fail_fast(tmp_path: Path, machines, monkeypatch) -> None:
    """Neither what a remote turns out not to have only then."""
    machine = machines("here")
    machine.configure(tmp_path / "empty", "read")
    scale.write(machine.folder, "wide", NODES)
    stage = machine.folder / "trivial.py"
    stage.write_text(
        stage.read_text().replace("        before =", "        assert self.id == 'step'\n        before =")
    )
    late: list[Future[None]] = []

    def fetch(_shared: Shared, _key: str) -> Future[None]:
        future: Future[None] = Future()
        late.append(future)
        if len(late) <= 2:  # the first node, and one of those that read it
            future.set_result(None)
        return future

    class Answers(Reporter):
        def finished(self, outcome: Outcome) -> None:
            if outcome.status == "FAILED":
                for future in late[2:]:
                    future.set_result(None)

    monkeypatch.setattr(Shared, "fetch", fetch)
    monkeypatch.setenv("STAGEGRAPH_CONFIG", str(machine.config))
    with Pipeline(machine.folder / "pipeline.yaml") as pipeline:
        run = pipeline.run(fail_fast=True, reporter=Answers())
    assert outcomes(run) == ["BUILT", "FAILED", "SKIPPED", "SKIPPED"]


@pytest.mark.parametrize("came", [True, False])
def test_a_node_whose_input_is_made_again_meanwhile_waits_for_it(machines, came: bool) -> None:
    """What a remote answers then, a result or nothing, is of an input that is not there any more."""
    here = machines("here")
    here.run()
    with Pipeline(here.folder / "pipeline.yaml") as pipeline:
        first, second = (pipeline.dag.by_name[name] for name in ("n0", "n1"))
        scheduler = Scheduler(pipeline.planner, pipeline.workspace, Reporter(), Options())
        scheduler.run([first, second])
        asked = pipeline.planner.decide(second, scheduler._record_of)
        assert asked.record is not None
        fetched = Fetched(asked.record, {}, "team") if came else None
        scheduler._fetching.take = lambda _: None  # type: ignore[method-assign]
        for node in (second, first):  # as when an object of the first was found damaged
            del scheduler.outcomes[node]
        scheduler._waiting.undo(first)
        scheduler._take_fetched([([asked], fetched)])
        assert list(scheduler._waiting) == [first, second]
        scheduler._settle()
        assert [scheduler.outcomes[node].status for node in (first, second)] == ["HIT", "HIT"]


def test_a_transfer_stops_when_the_run_is_abandoned(filled, tmp_path: Path) -> None:
    remote, _, _ = filled
    path = next(remote.glob("objects/*/*"))
    stop = threading.Event()
    storage = Storage(Remote("team", remote.as_uri(), reads=True, writes=False), stop)
    name = str(path.relative_to(remote))
    storage.download(name, tmp_path / "whole", path.name, path.stat().st_size)
    assert (tmp_path / "whole").read_bytes() == path.read_bytes()
    stop.set()
    with pytest.raises(StoppedError):
        storage.download(name, tmp_path / "part", path.name, path.stat().st_size)


def test_a_remote_that_is_away_costs_a_warning(machines, caplog) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        here = machines("here")
        here.configure(f"s3://bucket/store?endpoint=http://127.0.0.1:{nobody.getsockname()[1]}", "read")
        here.configure(f"http://127.0.0.1:{nobody.getsockname()[1]}/store", "read")
        assert outcomes(here.run()) == ["BUILT"] * NODES
    (said,) = caplog.messages
    assert said.startswith("warning: remote 'team' (http://127.0.0.1:")
    assert "not used again in this run" in said


def test_a_remote_that_takes_nothing_costs_a_warning(tmp_path: Path, machines, caplog) -> None:
    (tmp_path / "file").write_text("no folder")
    here = machines("here")
    here.configure(tmp_path / "file" / "remote", "write")
    assert outcomes(here.run()) == ["BUILT"] * NODES
    assert len(caplog.messages) == 1


@pytest.fixture
def http(filled) -> Iterator[str]:
    handler = partial(SimpleHTTPRequestHandler, directory=str(filled[0]))
    handler.func.log_message = lambda *_: None  # type: ignore[attr-defined]
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def s3(tmp_path: Path, monkeypatch) -> Iterator[str]:
    localbucket = pytest.importorskip("localbucket")

    class Handler(localbucket.S3Handler):
        data_root = tmp_path / "buckets"

        def log_message(self, *_: object) -> None:
            pass

    (Handler.data_root / "results").mkdir(parents=True)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name, value in {
        "AWS_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "AWS_ACCESS_KEY_ID": "somebody",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    yield "s3://results/stagegraph"
    server.shutdown()


def test_a_bucket_takes_and_gives_results(s3: str, machines, capsys) -> None:
    here, there = machines("here"), machines("there")
    here.configure(s3)
    assert outcomes(here.run()) == ["BUILT"] * NODES
    there.configure(s3, "read", here=here.key(capsys))
    assert reasons(there.run()) == {"from remote 'team'"}


def test_a_file_in_a_bucket_is_a_source_and_goes_on_where_it_broke_off(s3: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    content = bytes(range(256)) * 100
    obstore.put(storage._open("s3://results", storage.ANSWER), "some/big.txt", content)
    url = f"s3://results/some/big.txt#sha256={sha256(content).hexdigest()}"
    part = web._path(url).with_name(".big.txt.part")
    part.parent.mkdir(parents=True)
    part.write_bytes(content[:1000])
    assert web.get(url, {}).read_bytes() == content
    assert web.here(url, {}) == web._path(url)
    with pytest.raises(OSError, match="cannot be fetched"):
        web.get(url.replace("big", "none"), {})


def test_a_plain_web_server_gives_results(filled, http: str, machines) -> None:
    there = machines("there")
    there.configure(http, "read", here=filled[2])
    assert reasons(there.run()) == {"from remote 'team'"}


def test_pull_push_and_remote(filled, machines, capsys) -> None:
    remote, here, public = filled
    shutil.rmtree(remote)
    assert "4 of 4 nodes have a result here; 4 objects" in here.verb(capsys, "push")[1]
    assert "0 objects" in here.verb(capsys, "push")[1]
    there = machines("there")
    with pytest.raises(PipelineError, match=r"no remote gives results; say where some are in .*config\.yaml"):
        there.verb(capsys, "pull")
    there.configure(remote, "read", here=public)
    shutil.rmtree(next(remote.glob("objects/*")))
    code, out, _ = there.verb(capsys, "pull", "--json")
    said = json.loads(out)
    assert (code, said["taken"]) == (0, said["here"])
    assert said["here"] < NODES
    assert {node["reason"] for node in said["nodes"] if node["outcome"] == "SKIPPED"} >= {"no remote has its result"}
    code, out, _ = there.verb(capsys, "remote")
    assert (code, "answers" in out, f"trusted: here {public}" in out) == (0, True, True)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("remotes: {a: {url: ftp://x}}", "expected a directory or one of s3://"),
        ("remotes: {a: {mode: read}}", "has no url"),
        ("remotes: {a: {url: /x, mode: some}}", "expected read or write or both"),
        ("remotes: {a: {url: https://x, mode: both}}", "expected mode read"),
        ("trusted: {a: 12}", "a public key of 64 hexadecimal digits"),
        ("remote: {}", "did you mean 'remotes'?"),
        ("remotes: [", "cannot be read as YAML"),
    ],
)
def test_mistakes_of_the_configuration_are_told_with_their_place(
    tmp_path: Path, monkeypatch, text: str, said: str
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    monkeypatch.setenv("STAGEGRAPH_CONFIG", str(path))
    with pytest.raises(PipelineError) as caught:
        load_settings()
    assert said in str(caught.value)
    assert str(caught.value).startswith(f"{path}:")
