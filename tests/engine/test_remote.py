"""Results that machines share: one makes them, another takes them; whatever a remote does, no run breaks."""

from __future__ import annotations

import asyncio
import errno
import getpass
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from functools import partial
from hashlib import sha256
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

from benchmarks import scale
from stagegraph import Pipeline
from stagegraph.cli import main as cli
from stagegraph.errors import PipelineError
from stagegraph.execution.executor import Options
from stagegraph.execution.outcome import Outcome, Run
from stagegraph.execution.reporter import Reporter
from stagegraph.execution.scheduler import Scheduler
from stagegraph.remote import buckets, directory, web
from stagegraph.remote.errors import MismatchError, RemoteError, StoppedError
from stagegraph.remote.settings import load_settings
from stagegraph.remote.shared import Fetched, Shared
from stagegraph.remote.storage import Storage, object_path
from stagegraph.spec.model import Remote
from stagegraph.store.leftovers import leftovers
from stagegraph.store.partial import partial_file
from stagegraph.store.workspace import Workspace

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


def test_an_object_that_was_here_before_is_read_before_it_is_shown(filled, machines, caplog) -> None:
    """It has rotted without a change of its stat: only what came just now is known to be right."""
    remote, here, public = filled
    there = machines("there")
    there.configure(remote, "read", here=public)
    digest = blake3(here.shown().encode()).hexdigest()
    workspace = Workspace(there.folder / "artifacts")
    workspace.create()
    rotten = workspace.store.path(digest)
    rotten.parent.mkdir(parents=True)
    rotten.write_bytes(here.shown().encode()[::-1])
    workspace.store.remember(digest)
    workspace.close()
    assert outcomes(there.run()) == ["HIT"] * (NODES - 1) + ["BUILT"]
    assert there.shown() == here.shown()


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


@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_an_object_that_was_found_damaged_is_mended_by_whoever_makes_it_again(filled, machines, damage: str) -> None:
    remote, _, public = filled
    whole = {path: path.read_bytes() for path in remote.glob("objects/*/*")}
    for path, content in whole.items():
        path.chmod(0o644)
        path.write_bytes(content[:-1] if damage == "truncate" else bytes([content[0] ^ 1]) + content[1:])
    there = machines("there")
    there.configure(remote, "both", here=public)
    assert outcomes(there.run()) == ["BUILT"] * NODES
    assert {path: path.read_bytes() for path in remote.glob("objects/*/*")} == whole
    third = machines("third")
    third.configure(remote, "read", here=public)
    assert reasons(third.run()) == {"from remote 'team'"}


def pushing(machine: Machine, before: str = "") -> subprocess.Popen[str]:
    """Push from a process of its own, which does something before."""
    code = f"{before}\nfrom stagegraph.cli.main import main; import sys; sys.argv[1:] = ['push']; main()"
    environment = os.environ | {"STAGEGRAPH_CONFIG": str(machine.config)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen([sys.executable, "-c", code], cwd=machine.folder, env=environment, text=True, **pipes)


KILLED = """
import os, shutil, signal
from stagegraph.remote import directory
copied, copy = [], shutil.copyfile
def half(source, target):
    copied.append(target)
    if len(copied) == 3:
        target.write_bytes(source.read_bytes()[:1])
        os.kill(os.getpid(), signal.SIGKILL)
    return copy(source, target)
directory.shutil.copyfile = half
"""


@pytest.mark.parametrize("after", ["again", "at once"])
def test_a_push_that_is_killed_goes_on_and_nobody_takes_half_of_it(
    tmp_path: Path, machines, capsys, after: str
) -> None:
    here, there = machines("here"), machines("there")
    here.configure(tmp_path / "empty", "none")
    assert outcomes(here.run()) == ["BUILT"] * NODES
    here.configure(tmp_path / "remote", "write")
    first = pushing(here, KILLED)
    first.communicate()
    assert first.returncode < 0
    there.configure(tmp_path / "remote", "read", here=here.key(capsys))
    taken = there.run()
    assert set(outcomes(taken)) == {"HIT", "BUILT"} or outcomes(taken) == ["BUILT"] * NODES
    assert there.shown() == here.shown()
    pushes = [pushing(here) for _ in range(1 if after == "again" else 2)]
    for push in pushes:
        said, _ = push.communicate()
        assert push.returncode == 0, said
    third = machines("third")
    third.configure(tmp_path / "remote", "read", here=here.key(capsys))
    assert reasons(third.run()) == {"from remote 'team'"}
    assert third.shown() == here.shown()


@pytest.mark.parametrize("days", [-400, 400])
def test_whose_clock_is_wrong_is_believed_all_the_same(filled, machines, monkeypatch, days: int) -> None:
    remote, here, public = filled
    there, now, clock = machines("there"), time.time, time.gmtime
    there.configure(remote, "read", here=public)
    monkeypatch.setattr(time, "time", lambda: now() + days * 86_400)
    monkeypatch.setattr(time, "gmtime", lambda at=None: clock(time.time() if at is None else at))
    assert reasons(there.run()) == {"from remote 'team'"}
    with Pipeline(there.folder / "pipeline.yaml") as pipeline:
        swept = pipeline.gc(keep_runs=1)
    assert not [item for item in swept.items if item.kind in {"result", "object"}]
    assert (reasons(there.run()), there.shown()) == ({""}, here.shown())


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
    storage.take(path.name, path.stat().st_size, tmp_path / "whole")
    assert (tmp_path / "whole").read_bytes() == path.read_bytes()
    stop.set()
    with pytest.raises(StoppedError):
        storage.take(path.name, path.stat().st_size, tmp_path / "part")


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


def test_a_file_is_put_into_a_directory_whole_or_not_at_all(tmp_path: Path, monkeypatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "the disk is full")

    folder = directory.Directory((tmp_path / "remote").as_uri())
    source = tmp_path / "source"
    source.write_bytes(b"whole")
    with monkeypatch.context() as patch:
        patch.setattr(directory, "fsync_file", full)
        for data in (source, b"whole"):
            with pytest.raises(RemoteError, match="disk is full"):
                folder.put("objects/ab/abcd", data)
    with monkeypatch.context() as patch:
        patch.setattr(os, "sendfile", full)
        with pytest.raises(RemoteError, match=rf"{tmp_path}/remote/objects/.*full"):  # not the source's disk
            folder.put("objects/ab/abcd", source)
    assert not [path for path in (tmp_path / "remote").rglob("*") if path.is_file()]
    folder.put("objects/ab/abcd", source)
    assert (folder.size("objects/ab/abcd"), folder.size("objects/ab/other")) == (5, None)
    assert b"".join(folder.read("objects/ab/abcd", 2, quick=False)) == b"ole"


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
    obstore.put(buckets._open("s3://results", buckets.ANSWER), "some/big.txt", content)
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
    assert "4 of 4 nodes have a result here; sent 4 objects" in here.verb(capsys, "push")[1]
    assert "the remotes have all of it already" in here.verb(capsys, "push")[1]
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
        ("remotes: {a: {url: 's3://me:secret@bucket/x'}}", "has a password in it"),
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


def listing(machine: Machine, **remotes: object) -> None:
    """Let the pipeline file of a machine list remotes."""
    file = machine.folder / "pipeline.yaml"
    text = [line for line in file.read_text().splitlines() if not line.startswith("remotes:")]
    file.write_text("\n".join([*text, f"remotes: {json.dumps(remotes)}", ""]))


def test_a_pipeline_file_lists_remotes_and_its_keys_do_not_count_them(filled, machines, tmp_path: Path, capsys) -> None:
    remote, _, public = filled
    there = machines("there")
    there.config.write_text(json.dumps({"trusted": {"here": public}}))
    (there.folder / "shared").symlink_to(remote)
    listing(there, team={"url": "${vars.place}", "mode": "read"})
    file = there.folder / "pipeline.yaml"
    file.write_text("vars: {place: shared}\n" + file.read_text())
    assert reasons(there.run()) == {"from remote 'team'"}
    shutil.rmtree(there.folder / "artifacts" / ".stagegraph" / "records")
    assert there.verb(capsys, "pull", "--json")[0] == 0  # by the pipeline file as the index has it
    assert reasons(there.run()) == {""}
    code, out, _ = there.verb(capsys, "remote", "--json")
    (shown,) = json.loads(out)["remotes"]
    assert (code, shown["name"], shown["from"]) == (0, "team", "pipeline.yaml")
    assert shown["url"] == (there.folder / "shared").as_uri()


def test_whom_a_pipeline_file_names_is_not_thereby_believed(filled, machines) -> None:
    remote, _, public = filled
    there = machines("there")
    listing(there, team={"url": str(remote)})
    assert outcomes(there.run()) == ["BUILT"] * NODES
    file = there.folder / "pipeline.yaml"
    file.write_text(file.read_text() + f"trusted: {{here: '{public}'}}\n")
    with pytest.raises(PipelineError, match="unknown key 'trusted'"):
        there.run()


def test_the_users_remotes_come_before_those_of_the_pipeline_file(tmp_path: Path, machines, monkeypatch) -> None:
    machine = machines("here")
    monkeypatch.setenv("STAGEGRAPH_CONFIG", str(machine.config))
    machine.config.write_text(
        json.dumps({"remotes": {"team": {"url": "/mine", "mode": "none"}, "disk": {"url": "/d"}}})
    )
    listing(machine, far={"url": "s3://far/", "mode": "both"}, team={"url": "s3://team", "mode": "both"})
    with Pipeline(machine.folder / "pipeline.yaml") as pipeline:
        found = load_settings(pipeline.dag.pipeline.remotes).remotes
    assert [(r.name, r.url, r.reads, r.writes) for r in found] == [
        ("team", "file:///mine", False, False),
        ("disk", "file:///d", True, False),
        ("far", "s3://far", True, True),
    ]


def test_a_remote_has_no_secret_in_the_pipeline_file(machines, monkeypatch) -> None:
    machine = machines("here")
    monkeypatch.setenv("PASSWORD", "opensesame")
    listing(machine, a={"url": "s3://${secret.PASSWORD}/x"}, b={"url": "s3://me:opensesame@x"}, c={"mode": "both"})
    with pytest.raises(PipelineError) as caught:
        machine.run()
    said = "\n".join(caught.value.problems)
    assert ("a secret cannot stand here" in said, "has a password in it" in said, "has no url" in said) == (True,) * 3
    assert "opensesame" not in said


# -- transfers that break off, and SFTP ------------------------------------------------------------------------------


class Cutting(SimpleHTTPRequestHandler):
    """Serves ranges, and cuts a connection after so many bytes of a file; ``plain``: knows no ranges."""

    plain = False
    most = 1 << 20
    asked: list[str]

    def do_GET(self) -> None:
        begin = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-")
        self.asked.append(begin)
        content = Path(self.translate_path(self.path)).read_bytes()
        start = 0 if self.plain else int(begin)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        with suppress(OSError):  # who asked has hung up
            self.wfile.write(content[start : start + self.most])
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def big(tmp_path: Path) -> tuple[Path, str, bytes]:
    """A folder that is a remote, and the digest and content of its one object, of 5 MiB and some."""
    content = bytes(range(256)) * 4 * 5200
    digest = blake3(content).hexdigest()
    path = tmp_path / "remote" / object_path(digest)
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    return tmp_path / "remote", digest, content


@contextmanager
def cutting(folder: Path, **settings: object) -> Iterator[tuple[Storage, list[str]]]:
    handler = type("Handler", (Cutting,), {"asked": [], **settings})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    yield Storage(Remote("team", url, reads=True, writes=False), threading.Event()), handler.asked
    server.shutdown()


def test_a_download_that_is_cut_goes_on_where_it_was(big, tmp_path: Path) -> None:
    folder, digest, content = big
    with cutting(folder) as (storage, asked):
        storage.take(digest, len(content), tmp_path / "whole")
    assert (tmp_path / "whole").read_bytes() == content
    starts = [int(start) for start in asked]
    assert starts == sorted(set(starts))  # nothing twice
    assert 0 < starts[1] <= 1 << 20


@pytest.mark.parametrize("before", ["right", "wrong", "longer"])
def test_what_an_earlier_run_fetched_is_gone_on_from_if_it_was_right(big, tmp_path: Path, before: str) -> None:
    folder, digest, content = big
    part = tmp_path / "part"
    part.write_bytes({"right": content[:3000], "wrong": b"x" * 3000, "longer": content + b"x"}[before])
    with cutting(folder, most=1 << 30) as (storage, asked):
        storage.take(digest, len(content), part)
    assert part.read_bytes() == content
    assert asked == {"right": ["3000"], "wrong": ["3000", "0"], "longer": ["0"]}[before]


def test_a_server_without_ranges_is_asked_for_all_again(big, tmp_path: Path) -> None:
    folder, digest, content = big
    (tmp_path / "part").write_bytes(content[:3000])
    with cutting(folder, plain=True, most=1 << 30) as (storage, _):
        storage.take(digest, len(content), tmp_path / "part")
    assert (tmp_path / "part").read_bytes() == content


def test_what_was_fetched_is_kept_for_the_next_run_and_gc_takes_it(big, tmp_path: Path) -> None:
    folder, digest, content = big

    def take(workspace: Workspace, storage: Storage) -> None:
        with partial_file(workspace.root, digest, tmp_path / "new") as file:
            assert file.parent == workspace.root / "partial"
            storage.take(digest, len(content), file)

    with cutting(folder, most=0) as (storage, _):  # says that it has it, and sends nothing
        workspace = Workspace(tmp_path / "artifacts")
        workspace.create()
        for kept in (b"", content[:3000]):
            part = workspace.root / "partial" / digest
            part.parent.mkdir(exist_ok=True)
            part.write_bytes(kept)
            with pytest.raises(RemoteError):
                take(workspace, storage)
            assert (part.read_bytes() if part.exists() else b"") == kept
    with partial_file(workspace.root, digest, tmp_path / "new") as mine:
        assert part not in leftovers(workspace)
        with partial_file(workspace.root, digest, tmp_path / "other") as other:  # somebody else at the same time
            assert (mine, other) == (part, tmp_path / "other")
            other.touch()
    assert (tmp_path / "new").read_bytes() == content[:3000]
    part.write_bytes(b"left")
    assert part in leftovers(workspace)
    workspace.close()


def test_an_upload_that_is_cut_leaves_nothing_and_begins_again(tmp_path: Path, s3: str, monkeypatch) -> None:
    """In parts, of which the second fails each time until the server is well."""
    import localbucket

    content = tmp_path / "content"
    content.write_bytes(bytes(range(256)) * 4 * (12 << 10))  # 12 MiB
    digest = blake3(content.read_bytes()).hexdigest()
    storage = Storage(Remote("team", s3, reads=True, writes=True), threading.Event())
    put = localbucket.S3Handler.do_PUT

    def cut(self) -> None:
        if "partNumber=2" in self.path:
            self.connection.shutdown(socket.SHUT_RDWR)
        else:
            put(self)

    monkeypatch.setattr(localbucket.S3Handler, "do_PUT", cut)
    with pytest.raises(RemoteError):
        storage.give(digest, content)
    assert not [path for path in (tmp_path / "buckets").rglob("*") if path.is_file() and path.stat().st_size > 1 << 20]
    assert not storage.has(object_path(digest))
    monkeypatch.setattr(localbucket.S3Handler, "do_PUT", put)
    assert storage.give(digest, content)
    storage.take(digest, content.stat().st_size, tmp_path / "back")


@contextmanager
def sshd(folder: Path, host_key: Path, authorized: Path) -> Iterator[int]:
    """An OpenSSH server on loopback, for the user who runs this test."""
    program = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
    if program is None:
        pytest.skip("no sshd here")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (folder / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {host_key}\nPidFile none\nStrictModes no\n"
        f"AuthorizedKeysFile {authorized}\nPasswordAuthentication no\nUsePAM no\n"
        "Subsystem sftp internal-sftp\n"
    )
    log = folder / "sshd.log"
    process = subprocess.Popen([program, "-D", "-E", str(log), "-f", str(folder / "sshd_config")])
    while process.poll() is None and socket.socket().connect_ex(("127.0.0.1", port)):
        time.sleep(0.02)
    if process.poll() is not None:
        pytest.skip(f"sshd does not start: {log.read_text()}")
    yield port
    process.kill()
    process.wait()


@contextmanager
def in_this_process(
    host_key: Path, authorized: Path, connections: list[Any], files: Callable[..., Any] | bool = True
) -> Iterator[int]:
    """An SSH server in a thread, which notes its connections; ``files`` makes its server of files."""
    import asyncssh

    class Server(asyncssh.SSHServer):
        def connection_made(self, conn) -> None:
            connections.append(conn)

    async def listen() -> Any:
        given = {"server_host_keys": [str(host_key)], "authorized_client_keys": str(authorized)}
        return await asyncssh.listen("127.0.0.1", 0, server_factory=Server, sftp_factory=files, **given)

    async def close() -> None:
        server.close()
        for connection in connections:
            connection.abort()
        await server.wait_closed()

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    server = asyncio.run_coroutine_threadsafe(listen(), loop).result()
    try:
        yield server.get_port()
    finally:
        asyncio.run_coroutine_threadsafe(close(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.fixture
def login(tmp_path: Path, monkeypatch) -> Callable[[int], str]:
    """A home with keys for an SSH server at a port of this machine; called, it knows the server, and is its URL."""
    asyncssh = pytest.importorskip("asyncssh")
    home = tmp_path / "home"
    (home / ".ssh").mkdir(parents=True, mode=0o700)
    host, user = (asyncssh.generate_private_key("ssh-ed25519") for _ in range(2))
    for key, path in ((host, tmp_path / "host_key"), (user, home / ".ssh" / "id_ed25519")):
        key.write_private_key(str(path))
        path.chmod(0o600)
    user.write_public_key(str(tmp_path / "authorized"))
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)

    def known(port: int) -> str:
        (home / ".ssh" / "known_hosts").write_text(f"[127.0.0.1]:{port} {host.export_public_key().decode()}")
        return f"sftp://{getpass.getuser()}@127.0.0.1:{port}{tmp_path}/remote"

    return known


@pytest.fixture(params=["asyncssh", "sshd"])
def sftp(request, tmp_path: Path, login) -> Iterator[str]:
    """The URL of a folder behind SSH: a server of asyncssh's, and OpenSSH's where there is one."""
    keys = tmp_path / "host_key", tmp_path / "authorized"
    with sshd(tmp_path, *keys) if request.param == "sshd" else in_this_process(*keys, []) as port:
        yield login(port)


def test_a_refused_file_costs_no_connection_and_a_cut_one_is_made_again(tmp_path: Path, login) -> None:
    import asyncssh

    class Refusing(asyncssh.SFTPServer):
        def open(self, path, pflags, attrs):
            if path.endswith(b"refused"):
                raise asyncssh.SFTPPermissionDenied("not for you")
            return super().open(path, pflags, attrs)

    connections: list[Any] = []
    with in_this_process(tmp_path / "host_key", tmp_path / "authorized", connections, Refusing) as port:
        storage = Storage(Remote("team", login(port), reads=True, writes=True), threading.Event())
        storage.write("records/given", b"text")
        (tmp_path / "remote" / "records" / "refused").write_bytes(b"text")
        with pytest.raises(RemoteError, match="not for you"):
            storage.read("records/refused")
        assert storage.read("records/given") == b"text"
        assert len(connections) == 1
        connections[0].get_extra_info("socket").shutdown(socket.SHUT_RDWR)
        with pytest.raises(RemoteError):
            storage.read("records/given")
        assert storage.read("records/given") == b"text"
        assert len(connections) == 2


def test_a_folder_behind_ssh_takes_and_gives_results(sftp: str, machines, capsys, tmp_path: Path) -> None:
    here, there = machines("here"), machines("there")
    here.configure(sftp)
    assert outcomes(here.run()) == ["BUILT"] * NODES
    there.configure(sftp, "read", here=here.key(capsys))
    assert reasons(there.run()) == {"from remote 'team'"}
    assert there.shown() == here.shown()
    assert "the remotes have all of it already" in here.verb(capsys, "push")[1]
    assert "answers" in here.verb(capsys, "remote")[1]
    assert not list((tmp_path / "remote").rglob(".*"))


def test_a_large_object_goes_on_behind_ssh_too(sftp: str, big, tmp_path: Path) -> None:
    folder, digest, content = big
    storage = Storage(Remote("team", sftp, reads=True, writes=True), threading.Event())
    (tmp_path / "part").write_bytes(content[:3000])
    storage.take(digest, len(content), tmp_path / "part")
    assert (tmp_path / "part").read_bytes() == content
    with pytest.raises(MismatchError):
        storage.take("0" * 64, 1, tmp_path / "none")
    shutil.rmtree(folder)
    assert storage.give(digest, tmp_path / "part")
    assert not storage.give(digest, tmp_path / "part")
    assert (folder / object_path(digest)).read_bytes() == content


def test_a_host_that_is_not_known_is_not_spoken_to(sftp: str, machines, caplog, monkeypatch, tmp_path: Path) -> None:
    (tmp_path / "home" / ".ssh" / "known_hosts").write_text("")
    here = machines("here")
    here.configure(sftp)
    assert outcomes(here.run()) == ["BUILT"] * NODES
    (said,) = caplog.messages
    assert "Host key is not trusted" in said


def test_sftp_without_its_package_is_refused_with_what_to_install(machines, monkeypatch) -> None:
    here = machines("here")
    here.configure("sftp://somewhere/results")
    monkeypatch.setitem(sys.modules, "asyncssh", None)
    with pytest.raises(PipelineError, match=r"pip install 'stagegraph\[sftp\]'"):
        here.run()
