"""Failures, crashes, kills, damage and rivals: nothing is lost, nothing needs a manual step."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import diskcache
import pytest

from stagegraph import registry
from tests.support.demo import Demo

TROUBLE = """\
version: 1
name: demo
vars: {kind: none, text: words}
stages:
  read: {with: {text: "${vars.text}"}}
  trouble: {timeout: 20s, with: {kind: "${vars.kind}"}}
"""


@pytest.fixture
def troubled(demo: Demo) -> Demo:
    demo.pipeline.write_text(TROUBLE)
    return demo


def command(demo: Demo, *argv: str) -> list[str]:
    """The same command line in a process of its own."""
    code = (
        "import sys; from stagegraph import registry; from stagegraph.cli.main import main;"
        f"provider = registry.Provider(stages={registry.shipped().stages!r});"
        "registry.shipped = lambda: provider; main(sys.argv[1:])"
    )
    return [sys.executable, "-c", code, "run", str(demo.pipeline), "--json", *argv]


def start(demo: Demo, *argv: str) -> subprocess.Popen[bytes]:
    env = {**os.environ, "PYTHONPATH": f"{demo.package.parent}{os.pathsep}{Path(__file__).parents[2]}"}
    return subprocess.Popen(
        command(demo, *argv),
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - background shells ignore it
    )


def wait_for(demo: Demo, name: str) -> None:
    for _ in range(2000):  # a busy machine is slow, not wrong
        if demo.counter.exists() and name in demo.counter.read_text():
            return
        time.sleep(0.05)
    raise AssertionError(f"{name} never started")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("segfault", "killed by SIGSEGV; a crash in native code"),
        ("killed", "killed by SIGKILL; usually out of memory"),
        ("bug", "KeyError: 'oops'"),
        ("link", "output out.txt is a link or a special file"),
        ("number", "TypeError: expected text, found int: 5"),
        ("set", "TypeError: Object of type set is not JSON serializable"),
        ("escape", "ValueError: view name '../escape' must be"),
        ("orphan", "killed by SIGSEGV"),
        ("stray", "wrote stray.txt, which is none of its declared outputs"),
        ("nothing", "did not write its output 'out' (out.txt)"),
    ],
)
def test_a_failure_is_named_kept_and_never_cached(troubled: Demo, kind: str, said: str) -> None:
    for _ in range(2):
        result = troubled.run("--set", f"vars.kind={kind}")
        assert result.code == 1
        assert result.outcomes["read"] in {"BUILT", "HIT"}
        (node,) = [n for n in result.json["nodes"] if n["node"] == "trouble"]
        assert node["outcome"] == "FAILED"
        assert said in " ".join(node["problems"])
        assert "trouble" in troubled.counts
    assert (troubled.folder / "artifacts/.stagegraph/failed/demo/trouble").is_dir()
    assert "(failed;" in troubled("log", "trouble", str(troubled.pipeline)).out
    assert troubled.run().code == 0


def test_a_stage_error_is_one_clear_message_and_consumers_are_skipped(demo: Demo) -> None:
    demo.source.write_text("FAIL\n")
    result = demo.run()
    assert result.code == 1
    assert result.outcomes == {
        "read": "FAILED",
        "shape[line]": "SKIPPED",
        "shape[column]": "SKIPPED",
        "join": "SKIPPED",
    }
    text = demo("run", str(demo.pipeline))
    assert "error: read: the text says FAIL" in text.err
    assert "Traceback" not in text.err


def test_timeout(troubled: Demo) -> None:
    troubled.pipeline.write_text(TROUBLE.replace("20s", "1s"))
    result = troubled.run("--set", "vars.kind=sleep")
    assert "took longer than its timeout of 1 s" in json.dumps(result.json)
    assert result.code == 1


def test_fail_fast_starts_nothing_more(demo: Demo) -> None:
    demo.pipeline.write_text(TROUBLE.replace("  read:", "  shape: {needs: [read], with: {shape: line}}\n  read:"))
    result = demo.run("--fail-fast", "-j", "1", "--set", "vars.kind=bug", "--stage", "trouble", "--stage", "shape")
    assert result.code == 1
    assert result.outcomes["shape"] == "SKIPPED" or result.outcomes["trouble"] == "SKIPPED"


def test_peak_memory_is_of_the_node(troubled: Demo) -> None:
    first, _, second = TROUBLE.partition("  read:")
    read, _, trouble = second.partition("  trouble:")
    troubled.pipeline.write_text(
        f"{first}  trouble:{trouble}  read:{read}"
    )  # the hungry one first, one worker for both
    result = troubled.run("-j", "1", "--set", "vars.kind=memory")
    assert [n["node"] for n in result.json["nodes"]] == ["trouble", "read"]
    peaks = {n["node"]: n["peak_bytes"] for n in result.json["nodes"]}
    assert peaks["trouble"] > 200 << 20
    assert peaks["read"] < 150 << 20


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_killed_in_the_middle_the_next_run_resumes(troubled: Demo, how: signal.Signals) -> None:
    process = start(troubled, "--set", "vars.kind=sleep")
    wait_for(troubled, "trouble")
    process.send_signal(how)
    _, err = process.communicate(timeout=20)
    if how != signal.SIGKILL:
        assert process.returncode == 130
        assert b"interrupted; run again" in err
        assert b"Traceback" not in err
    troubled.counts  # noqa: B018
    assert troubled.run("--set", "vars.kind=sleep", "--dry-run").code == 0
    result = troubled.run()
    assert result.code == 0
    assert "trouble" in troubled.counts
    assert not list((troubled.folder / "artifacts/.stagegraph/work").iterdir())


def children(pid: int) -> set[int]:
    found = {int(child) for file in Path(f"/proc/{pid}/task").glob("*/children") for child in file.read_text().split()}
    return found.union(*map(children, found))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("kind", ["sleep", "command"])
def test_the_workers_of_a_killed_run_and_what_they_started_end_with_it(troubled: Demo, kind: str) -> None:
    process = start(troubled, "--set", f"vars.kind={kind}")
    wait_for(troubled, "trouble")
    while kind == "command" and not troubled.folder.joinpath("started").exists():
        assert process.poll() is None
        time.sleep(0.05)
    workers = children(process.pid)
    assert workers
    assert all(map(alive, workers))
    process.kill()
    process.communicate()
    for _ in range(200):  # a third of what the stage sleeps
        if not any(map(alive, workers)):
            return
        time.sleep(0.1)
    pytest.fail(f"{[pid for pid in workers if alive(pid)]} work on for nobody")


def test_what_a_killed_run_left_of_the_first_node_to_rerun_goes_too(demo: Demo) -> None:
    demo.run()
    key = demo("show", "read", str(demo.pipeline), "--json").json["read"]["key"]
    work = demo.folder / "artifacts/.stagegraph/work"
    (work / key / "1" / "out").mkdir(parents=True)
    (work / key / "1" / "out" / "half.txt").write_text("half")
    assert demo.run("--stage", "read", "--force").code == 0
    assert not list(work.iterdir())


def test_two_runs_at_once_execute_each_key_once_and_status_works_meanwhile(troubled: Demo) -> None:
    both = [start(troubled, "--set", "vars.kind=short") for _ in range(2)]
    wait_for(troubled, "trouble")
    assert troubled("status", str(troubled.pipeline)).code == 0
    assert [p.wait(timeout=30) for p in both] == [0, 0]
    for process in both:
        process.communicate()
    assert troubled.counts == ["read", "trouble"]


def test_a_locked_index_is_waited_for_and_that_is_said(
    demo: Demo, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from stagegraph.store import index

    demo.run()
    monkeypatch.setattr(index, "SAID_AFTER", 0.2)
    database = demo.folder / "artifacts" / ".stagegraph" / "index" / "cache.db"
    holder = sqlite3.connect(database, check_same_thread=False, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    opened = index.Index(database.parent)
    release = threading.Timer(1.0, holder.rollback)
    release.start()
    opened.set("memo:a", 1)
    release.join()
    holder.close()
    assert opened.get("memo:a") == 1
    opened.close()
    assert caplog.text.count("another process keeps the index") == 1
    assert "at most 60 s" in caplog.text


def test_a_damaged_object_is_quarantined_reported_and_rebuilt(demo: Demo) -> None:
    demo.run()
    demo.counts  # noqa: B018
    record = demo("show", "read", str(demo.pipeline), "--json").json["read"]
    digest = record["outputs"]["words"]["files"]["words.txt"][0]
    stored = demo.folder / "artifacts/.stagegraph/objects" / digest[:2] / digest
    times = stored.stat()
    stored.chmod(0o644)
    stored.write_bytes(b"S" + stored.read_bytes()[1:])
    os.utime(stored, ns=(times.st_atime_ns, times.st_mtime_ns))
    stored.chmod(0o444)
    assert demo("fsck", str(demo.pipeline)).code == 3
    result = demo.run()
    assert demo.counts == ["read"]
    assert result.code == 0
    assert [n["reason"] for n in result.json["nodes"] if n["node"] == "read"] == ["stored words.txt was missing"]
    assert demo("fsck", str(demo.pipeline)).out.endswith("all intact\n")
    assert demo.path("read", "words.txt").read_text() == "some words here\n"


def test_a_damaged_object_is_noticed_without_fsck(demo: Demo) -> None:
    demo.run()
    demo.counts  # noqa: B018
    for stored in (demo.folder / "artifacts/.stagegraph/objects").glob("*/*"):
        stored.chmod(0o644)
        stored.write_bytes(b"")
    assert demo.run().code == 0
    assert demo.counts == ["join", "read", "shape[column]", "shape[line]"]
    assert demo.path("join", "joined.txt").read_text().endswith("3")


@pytest.mark.parametrize("damage", [b"", b"garbage" * 1000])
def test_an_index_that_cannot_be_read_is_set_aside(demo: Demo, damage: bytes) -> None:
    demo.run()
    folder = demo.folder / "artifacts/.stagegraph/index"
    for extra in folder.glob("cache.db-*"):
        extra.unlink()
    (folder / "cache.db").write_bytes(damage)
    assert demo.run().code == 0
    assert demo.run().outcomes["join"] == "HIT"


def test_an_index_of_the_format_before_is_set_aside(demo: Demo) -> None:
    folder = demo.folder / "artifacts/.stagegraph/index"
    with diskcache.Cache(str(folder), disk=diskcache.JSONDisk, disk_compress_level=1) as cache:
        cache.set("rec:1", {})
    assert demo.run().code == 0
    assert demo.run().outcomes["join"] == "HIT"
    assert list(folder.parent.glob("index.damaged-*"))


def test_a_source_that_changes_under_a_stage_fails_and_is_not_stored(demo: Demo) -> None:
    demo.edit(
        "read", 'count("read")', 'count("read"); next(iter(ctx.source("text").files.values())).write_text("new text")'
    )
    result = demo.run()
    assert result.code == 1
    assert "changed while it was being read" in json.dumps(result.json)
    assert not demo.path("read").exists()


@pytest.mark.parametrize("then", ["raise ValueError('odd')", "import os; os.kill(os.getpid(), 7)"])
def test_a_stage_that_fails_of_a_source_that_changed_is_no_bug(demo: Demo, then: str) -> None:
    """Such as a file that is truncated under a mapping (SIGBUS), or no longer what an earlier stage has accepted."""
    change = 'next(iter(ctx.source("text").files.values())).write_text("new text")'
    demo.edit("read", 'count("read")', f'count("read"); {change}; {then}')
    result = demo.run()
    assert result.code == 1
    (read,) = [node for node in result.json["nodes"] if node["node"] == "read"]
    assert "a.txt: changed while it was being read; run again" in read["problems"][0]
    assert read["problems"][1:]
    assert "bug" not in result.err


def test_a_source_that_gets_other_rights_and_another_name_under_a_stage_is_what_it_was(demo: Demo) -> None:
    touched = 'count("read"); path = next(iter(ctx.source("text").files.values())); '
    demo.edit("read", 'count("read")', touched + 'path.chmod(0o600); path.with_name("linked").hardlink_to(path)')
    assert demo.run().outcomes["read"] == "BUILT"
    assert demo.run().outcomes["read"] == "HIT"


def test_a_missing_source_is_a_plan_error_with_its_place(demo: Demo) -> None:
    result = demo.run("--set", "vars.text=nowhere")
    assert result.code == 2
    assert "read.text: there is no file or directory" in result.err
    assert demo.counts == []


def test_unknown_names_get_a_suggestion(demo: Demo) -> None:
    assert "no node is named 'shap'; did you mean 'shape'?" in demo.run("--stage", "shap").err
    assert "no verb 'rum'; did you mean 'run'?" in demo("rum").err


def test_what_is_not_read_needs_not_be_there(demo: Demo) -> None:
    demo.pipeline.write_text(demo.pipeline.read_text().replace("needs: [shape, read]", "needs: [shape]"))
    result = demo.run()
    assert result.code == 2
    assert "join reads read.count on port 'count': add 'read' to its needs" in result.err


def test_code_edited_during_a_run_is_not_stored_under_the_old_key(troubled: Demo) -> None:
    process = start(troubled, "-j", "1", "--stage", "trouble", "--set", "vars.kind=short")
    wait_for(troubled, "trouble")
    troubled.edit("trouble", '"done" if', '"edited" if')
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 1
    assert b"trouble.py: changed while it was being read; run again" in out
    assert troubled.run("--stage", "trouble", "--set", "vars.kind=short").code == 0
    assert troubled.path("trouble", "out.txt").read_text() == "edited"


def test_what_outlives_a_killed_run_cannot_write_into_the_next(troubled: Demo, monkeypatch) -> None:
    monkeypatch.setenv("LINGER", "1")
    process = start(troubled, "--set", "vars.kind=late")
    wait_for(troubled, "trouble")
    time.sleep(0.3)
    process.kill()
    process.communicate()
    monkeypatch.delenv("LINGER")
    assert troubled.run("--set", "vars.kind=late").code == 0
    assert sorted(p.name for p in troubled.path("trouble").iterdir()) == ["out.txt"]


@pytest.mark.parametrize("limit", [0, 1 << 30], ids=["linked", "copied"])
def test_a_stage_that_writes_into_its_input_spoils_nothing_unseen(demo: Demo, limit: int, monkeypatch) -> None:
    monkeypatch.setattr("stagegraph.store.objects.HARDLINK_FROM", limit)
    demo.pipeline.write_text(demo.pipeline.read_text().partition("  shape:")[0] + "  deface: {needs: [read]}\n")
    demo.run()
    demo.counts  # noqa: B018
    again = demo.run()
    assert demo.path("read", "words.txt").read_text() == "some words here\n"
    assert demo.counts == (["read"] if limit == 0 else [])
    assert again.code == 0


def test_links_and_files_in_the_way_are_replaced_never_followed(demo: Demo) -> None:
    demo.run()
    demo.counts  # noqa: B018
    precious = demo.folder / "precious"
    (precious / "deep").mkdir(parents=True)
    (precious / "deep" / "text").write_text("mine")
    shutil.rmtree(demo.path("shape.line"))
    demo.path("shape.line").symlink_to(precious)
    shutil.rmtree(demo.path("shape.column", "laid"))
    demo.path("shape.column", "laid").symlink_to(precious)
    shutil.rmtree(demo.path("join"))
    demo.path("join").write_text("in the way")
    assert demo("status", str(demo.pipeline), "--check").code == 4
    assert demo.run().code == 0
    assert demo.counts == []
    assert (precious / "deep" / "text").read_text() == "mine"
    assert demo.path("join", "joined.txt").exists()
    assert demo("status", str(demo.pipeline), "--check").code == 0


def test_a_folder_that_was_moved_and_linked_back_loses_nothing(demo: Demo) -> None:
    demo.run()
    moved = demo.folder / "moved"
    demo.path("shape.line").rename(moved)
    demo.path("shape.line").symlink_to(moved)
    (moved / "mine").write_text("mine")
    before = {path.relative_to(moved) for path in moved.rglob("*")}
    assert demo.run().code == 0
    assert {path.relative_to(moved) for path in moved.rglob("*")} == before
    shown = demo.path("shape.line")
    assert not shown.is_symlink()
    assert {path.relative_to(shown) for path in shown.rglob("*")} == before - {Path("mine")}


def test_nodes_with_one_key_run_once(demo: Demo) -> None:
    demo.pipeline.write_text(
        demo.pipeline.read_text().replace("  join:", "  again: {uses: read, with: {text: words}}\n  join:")
    )
    result = demo.run("--stage", "read", "--stage", "again")
    assert demo.counts == ["read"]
    assert sorted(result.outcomes.values()) == ["BUILT", "HIT"]


def test_a_full_disk_does_not_cost_the_index(demo: Demo, monkeypatch, caplog) -> None:
    before = demo.source.read_text()
    demo.run()
    time.sleep(0.1)  # a source this young is digested again
    demo.run()
    demo.counts  # noqa: B018

    def full(*_args: object, **_kwargs: object) -> None:
        error = sqlite3.OperationalError("database or disk is full")
        error.sqlite_errorcode = sqlite3.SQLITE_FULL
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("diskcache.Cache.__init__", full)
        assert demo("status", str(demo.pipeline)).code == 0  # looking writes nothing
        demo.source.write_text("other words\n")
        assert set(demo.run().outcomes.values()) <= {"BUILT", "UNCHANGED"}  # the index is a cache: it costs no node
        assert "disk is full" in caplog.text
    demo.source.write_text(before)
    assert set(demo.run().outcomes.values()) == {"HIT"}


def test_a_damaged_page_of_the_index_heals(demo: Demo) -> None:
    demo.run()
    path = demo.folder / "artifacts/.stagegraph/index/cache.db"
    content = bytearray(path.read_bytes())
    size = int.from_bytes(content[16:18], "big") or 65536
    content[size:] = b"\x55" * (len(content) - size)  # every page but the first
    for extra in path.parent.glob("cache.db-*"):
        extra.unlink()
    path.write_bytes(content)
    assert demo.run().code == 0
    assert demo.run().outcomes["join"] == "HIT"


def test_problems_are_json_too(demo: Demo) -> None:
    result = demo.run("--set", "vars.text=nowhere")
    assert result.json["ok"] is False
    assert "there is no file or directory" in result.json["problems"][0]


def test_a_stage_module_that_does_not_load_is_said_with_its_place(demo: Demo) -> None:
    (demo.package / "join.py").write_text("def (:\n")
    result = demo("status", str(demo.pipeline))
    assert result.code == 2
    assert "stage 'join' cannot be loaded: SyntaxError" in result.err
    assert "Traceback" not in result.err


def test_an_optional_input_may_be_left_out(demo: Demo) -> None:
    demo.edit("join", '"how many")}', '"how many", optional=True)}')
    demo.edit("join", 'ctx.input("count").read_text()', '(" counted" if ctx.has_input("count") else " not counted")')
    assert demo.run().code == 0
    assert demo.path("join", "joined.txt").read_text().endswith(" counted")
    assert "not" not in demo.path("join", "joined.txt").read_text()
    demo.pipeline.write_text(demo.pipeline.read_text().replace("needs: [shape, read]", "needs: [shape]"))
    assert demo.run().code == 0
    assert demo.path("join", "joined.txt").read_text().endswith(" not counted")


def test_a_group_that_shares_a_store_can_write_what_it_writes_again(demo: Demo) -> None:
    """Under umask 002; objects and records are replaced, and the database is SQLite's, which grants no group."""
    before = os.umask(0o002)
    try:
        demo.run()
    finally:
        os.umask(before)
    root = demo.path().parent / ".stagegraph"
    written = [path for name in ("logs", "locks", "running") for path in (root / name).rglob("*")]
    assert len(written) > 5
    assert [path for path in (*written, root, root / "journal.jsonl") if not path.stat().st_mode & stat.S_IWGRP] == []
