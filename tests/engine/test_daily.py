"""One stage at a debugger, runs on every change, clean, failures that stay visible, and one end before the next."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stagegraph import Pipeline
from stagegraph.execution.waiting import depth_first
from stagegraph.planning.dag import Dag
from stagegraph.spec.load import load
from tests.support.demo import Demo

REPOSITORY = Path(__file__).parents[2]


def test_one_stage_runs_in_this_process_and_nothing_is_kept(demo: Demo) -> None:
    demo.edit("join", 'count("join")', 'count(f"join in {os.getpid()}")')
    demo.edit("join", "from __future__ import annotations", "from __future__ import annotations\nimport os")
    file = str(demo.pipeline)
    done = demo("run", file, "--debug", "join")
    assert done.code == 0, done.err
    assert f"join in {os.getpid()}".split()[-1] in demo.counts, "in this process"
    assert "join ran here" in done.out
    kept = demo.path().parent / ".stagegraph" / "failed" / "demo" / "join" / "out" / "joined.txt"
    assert "line=some words here" in kept.read_text()
    assert not demo.path("join").exists()
    assert demo("show", "join", file).code == 2, "there is no result of it"
    assert demo.run().outcomes == {"read": "HIT", "shape[line]": "HIT", "shape[column]": "HIT", "join": "BUILT"}


def test_what_a_stage_raises_at_a_debugger_has_its_traceback(demo: Demo) -> None:
    demo.edit("join", 'count("join")', 'raise KeyError("oops")')
    done = demo("run", str(demo.pipeline), "--debug", "join")
    assert done.code == 1
    assert 'raise KeyError("oops")' in done.err
    assert "Traceback" in done.err
    several = demo("run", str(demo.pipeline), "--debug", "shape")
    assert "--debug runs one node, and shape means shape.line, shape.column" in several.err


def test_a_failure_stays_visible_until_a_result_takes_its_place(demo: Demo) -> None:
    demo.run()
    whole = demo.source.read_text()
    demo.source.write_text("FAIL")
    demo.run()
    file = str(demo.pipeline)
    status = demo("status", file).out
    assert "STALE, FAILED" in status
    assert "failed when last run: read; `pipeline log read` says why" in status
    assert {n["node"]: n["failed"] for n in demo("status", file, "--json").json["nodes"]}["read"] is True
    assert "failed when it ran again since: pipeline log read" in demo("show", "read", file).out
    demo.source.write_text(whole)
    demo.run()
    assert "FAILED" not in demo("status", file).out
    assert "failed" not in demo("show", "read", file).out


def test_a_first_failure_is_named_where_the_result_is_asked_for(demo: Demo) -> None:
    demo.source.write_text("FAIL")
    demo.run()
    assert (
        "read has no result, as it failed when it last ran; `pipeline log read` says why"
        in demo("show", "read", str(demo.pipeline)).err
    )


def test_what_an_instance_that_failed_wrote_is_no_leftover(demo: Demo) -> None:
    demo.edit("shape", "from fakes.shapes import lay", 'from fakes.shapes import lay\n        raise ValueError("no")')
    demo.run()
    failed = demo.path().parent / ".stagegraph" / "failed" / "demo" / "shape.line"
    assert failed.is_dir()
    demo("gc", "--yes", str(demo.pipeline))
    assert failed.is_dir()


def test_clean_takes_what_is_shown_and_with_the_store_everything(demo: Demo) -> None:
    demo.run()
    file = str(demo.pipeline)
    assert demo("clean", file).code == 0
    assert not demo.path().exists()
    assert set(demo.run().outcomes.values()) == {"HIT"}
    assert demo.path("join", "joined.txt").exists()
    refused = demo("clean", file, "--store")
    assert (refused.code, "-y says yes" in refused.err) == (2, True)
    assert demo("clean", file, "--store", "-y").code == 0
    assert not demo.path().parent.exists()
    assert set(demo.run().outcomes.values()) == {"BUILT"}
    demo("clean", file, "--store", "-y")
    assert "nothing to remove" in demo("clean", file).out


def test_clean_leaves_what_no_run_put_there(demo: Demo) -> None:
    file, notes = str(demo.pipeline), demo.path() / "notes.txt"
    notes.parent.mkdir(parents=True)
    notes.write_text("mine")
    assert "is no store: nothing to remove" in demo("clean", file, "--store", "-y").out
    demo.run()
    assert "left there, as it is of no node: " in demo("clean", file).out
    assert [*demo.path().iterdir()] == [notes]
    demo.run()
    with Pipeline(demo.pipeline) as pipeline:  # a store that somebody else has filled
        for odd in ("../words", "demo/..", "demo/.", "./words", "demo/a/../../.."):
            pipeline.workspace.index.set(f"last:{odd}", {"key": "0" * 64})
    result = demo("clean", file, "--store", "-y")
    assert result.code == 0
    assert "notes.txt" in result.out
    assert [*(demo.folder / "words").iterdir()]
    assert [*demo.path().parent.rglob("*")] == [demo.path(), notes]
    notes.unlink()
    demo.run()
    demo("clean", file, "--store", "-y")
    assert not demo.path().parent.exists()


def test_why_not_is_another_word_for_explain(demo: Demo) -> None:
    demo.run()
    file = str(demo.pipeline)
    assert demo("why-not", "join", file).out == demo("explain", "join", file).out != ""


MATRIX = """\
version: 1
name: matrix
defaults: {foreach: {t: [a, b]}}
stages:
  first: {uses: shell, with: {cmd: "echo 1${each.t} > ${out.o}", outputs: {o: o}}}
  second: {uses: shell, with: {cmd: "echo 2${each.t} > ${out.o}", inputs: {i: first.o}, outputs: {o: o}}}
  third: {uses: shell, with: {cmd: "echo 3${each.t} > ${out.o}", inputs: {i: second.o}, outputs: {o: o}}}
"""


def test_one_end_is_reached_before_the_next_is_begun(tmp_path: Path) -> None:
    (tmp_path / "pipeline.yaml").write_text(MATRIX)
    dag = Dag(load(tmp_path / "pipeline.yaml"))
    ordered = [node.name for node in depth_first(dag.nodes)]
    assert ordered == ["first[a]", "second[a]", "third[a]", "first[b]", "second[b]", "third[b]"]
    done = subprocess.run(
        [sys.executable, "-m", "stagegraph.cli.main", "run", "-j", "1"], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, check=True,
    )  # fmt: skip
    begun = [line.partition(":")[0] for line in done.stderr.splitlines() if ": running" in line]
    assert begun == ordered


WATCHED = """\
version: 1
name: watched
stages:
  copy: {uses: shell, with: {cmd: "cat ${in.text} > ${out.o}", sources: {text: text}, outputs: {o: o}}}
"""


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["pipelin.yaml"], "pipelin.yaml: no such file"),
        (["--stage", "cpy"], "no node is named 'cpy'; did you mean 'copy'?"),
    ],
)
def test_watch_does_not_wait_where_it_is_called_wrongly(tmp_path: Path, argv: list[str], said: str) -> None:
    (tmp_path / "pipeline.yaml").write_text(WATCHED)
    (tmp_path / "text").write_text("one")
    command = [sys.executable, "-m", "stagegraph.cli.main", "watch", *argv]
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr


def test_a_change_runs_again(tmp_path: Path) -> None:
    (tmp_path / "pipeline.yaml").write_text(WATCHED)
    (tmp_path / "text").write_text("one")
    said = tmp_path / "said"
    with said.open("w") as file:
        watching = subprocess.Popen(
            [sys.executable, "-m", "stagegraph.cli.main", "watch"], cwd=tmp_path, stdout=file, stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
    try:
        for number, text in enumerate(("two", "three"), 1):
            _wait(watching, said, "; Ctrl-C ends it", number)
            (tmp_path / "text").write_text(text)
        _wait(watching, said, "; Ctrl-C ends it", 3)
        assert (tmp_path / "artifacts" / "watched" / "copy" / "o").read_text() == "three"
    finally:
        watching.kill()
        watching.wait()


def _wait(process: subprocess.Popen[bytes], said: Path, text: str, count: int) -> None:
    while said.read_text().count(text) < count:
        assert process.poll() is None, said.read_text()
        time.sleep(0.05)
