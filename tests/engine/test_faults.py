"""Failures, crashes, kills, damage and rivals: nothing is lost, nothing needs a manual step."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stagegraph import registry
from tests.engine.conftest import Demo

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
        f"registry.SHIPPED = {registry.SHIPPED!r}; main(sys.argv[1:])"
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
    for _ in range(200):
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
    result = troubled.run("-j", "1", "--set", "vars.kind=memory")
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


def test_two_runs_at_once_execute_each_key_once_and_status_works_meanwhile(troubled: Demo) -> None:
    both = [start(troubled, "--set", "vars.kind=short") for _ in range(2)]
    wait_for(troubled, "trouble")
    assert troubled("status", str(troubled.pipeline)).code == 0
    assert [p.wait(timeout=30) for p in both] == [0, 0]
    for process in both:
        process.communicate()
    assert troubled.counts == ["read", "trouble"]


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


def test_a_source_that_changes_under_a_stage_fails_and_is_not_stored(demo: Demo) -> None:
    demo.edit(
        "read", 'count("read")', 'count("read"); next(iter(ctx.source("text").files.values())).write_text("new text")'
    )
    result = demo.run()
    assert result.code == 1
    assert "changed while it was being read" in json.dumps(result.json)
    assert not demo.path("read").exists()


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
