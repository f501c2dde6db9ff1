"""What ``status`` and ``run --dry-run`` foretell, what ``run`` selects, and how a failed run goes on."""

from __future__ import annotations

import shlex
import subprocess
import textwrap

import pytest

from stagegraph import Pipeline, Reporter
from stagegraph.query.forecast import makespan
from tests.support.demo import Demo

FLAKY = '''
    """Fails until it was tried often enough."""
    from __future__ import annotations
    import os
    from dataclasses import dataclass
    from pathlib import Path
    from fakes.counting import count
    from stagegraph.stage import Context, Out, Stage, StageError, param

    class Trouble(Stage):
        """Flaky."""
        id = "trouble"

        @dataclass(frozen=True)
        class Params:
            """Parameters."""
            kind: str = param("how", default="2")

        outputs = {"out": Out("out.txt", "a file")}

        def run(self, ctx: Context) -> None:
            count("trouble")
            if Path(os.environ["COUNT_FILE"]).read_text().count("trouble") <= int(ctx.params.kind):
                raise StageError("not yet")
            (ctx.out / "out.txt").write_text("done")
'''


def statuses(demo: Demo, *argv: str) -> dict[str, str]:
    return {n["node"]: n["status"] for n in demo("status", str(demo.pipeline), "--json", *argv).json["nodes"]}


def test_status_names_what_changed_and_predicts_from_the_history(demo: Demo) -> None:
    never = demo("status", str(demo.pipeline))
    assert "predicted time: unknown, no timing history" in never.out
    demo.run()
    idle = demo("status", str(demo.pipeline))
    assert "all 4 nodes are up to date" in idle.out
    assert "s ago" in idle.out
    demo.edit("line", '" ".join', '"  ".join')
    plan = demo("status", str(demo.pipeline), "--json").json
    by_name = {n["node"]: n for n in plan["nodes"]}
    assert {name: n["status"] for name, n in by_name.items()} == {
        "read": "HIT", "shape[line]": "STALE", "shape[column]": "HIT", "join": "UNKNOWN",
    }  # fmt: skip
    assert plan["predicted_seconds"] == pytest.approx(by_name["shape[line]"]["seconds"])
    assert plan["predicted_seconds_at_most"] > plan["predicted_seconds"]
    assert by_name["read"]["peak_bytes"] > 1 << 20
    assert not plan["idle"]


@pytest.mark.parametrize("columns", [40, 60, 80])
def test_no_reason_is_cut_however_narrow_the_terminal(demo: Demo, monkeypatch, columns: int) -> None:
    demo.run()
    monkeypatch.setenv("COLUMNS", str(columns))
    glue = "a glue of many words that no column of this table can hold in one line"
    for argv in (["status"], ["run", "--dry-run"], ["run"]):
        said = demo(argv[0], str(demo.pipeline), *argv[1:], "--set", f"vars.glue={glue}").out
        assert all(word in said for word in f"glue: - -> {glue}".split()), argv
    *_, row = demo("runs", str(demo.pipeline), "--run", "@~0").out.partition("join ")
    assert all(word in row for word in f"glue: - -> {glue}".split())


def test_a_new_instance_is_predicted_from_its_like(demo: Demo) -> None:
    demo.run("--set", "vars.shapes=[line]")
    plan = demo("status", str(demo.pipeline), "--json").json
    assert plan["unpredicted"] == []
    assert plan["predicted_seconds"] > 0


def test_bytes_to_restore_are_foretold_and_check_sees_them(demo: Demo) -> None:
    demo.run()
    demo.path("join", "joined.txt").unlink()
    size = len("column=some\nwords\nhere-line=some words here3")
    dry = demo("run", str(demo.pipeline), "--dry-run", "--json").json
    assert dry["restore_bytes"] == size
    assert f"would restore {size} B" in demo("run", str(demo.pipeline), "--dry-run").out
    assert [n["reasons"] for n in dry["nodes"] if n["node"] == "join"] == [["restores 1 file"]]
    assert demo("status", str(demo.pipeline), "--check").code == 4
    demo.run()
    assert demo("status", str(demo.pipeline), "--check").code == 0


def test_a_dry_run_foretells_what_the_run_does(demo: Demo) -> None:
    demo.run()
    demo.counts  # noqa: B018
    for argv in (["--stage", "join", "--force"], ["--set", "vars.glue=+"]):
        plan = demo("run", str(demo.pipeline), "--dry-run", "--json", *argv).json
        done = demo("run", str(demo.pipeline), "--json", *argv).json
        foretold = {n["node"]: n["reasons"] for n in plan["nodes"] if n["status"] != "HIT"}
        executed = {n["node"]: n["reasons"] for n in done["nodes"] if n["outcome"] in {"BUILT", "UNCHANGED"}}
        assert foretold == executed
        assert demo.counts == ["join"]


def test_until_stops_and_from_starts(demo: Demo) -> None:
    assert demo.run("--until", "shape[line]").code == 0
    assert demo.counts == ["read", "shape[line]"]
    demo.edit("read", 'count("read")', 'count("read"); print(1)')
    demo.source.write_text("new words\n")
    demo.run("--from", "read", "--until", "shape")
    assert demo.counts == ["read", "shape[column]", "shape[line]"]
    refused = demo.run("--stage", "join", "--until", "read")
    assert (refused.code, demo.counts) == (2, [])
    assert "nothing is selected" in refused.err


def test_a_node_runs_only_if_what_it_reads_changed_whatever_else_did(demo: Demo) -> None:
    """A selection is no order to run: editing what only others read executes nothing."""
    demo.run()
    demo.counts  # noqa: B018
    demo.edit("column", '"\\n".join', '"\\n\\n".join')
    assert demo.run("--stage", "shape[line]").code == 0
    assert demo.counts == []


def test_reasons_stand_next_to_what_executes(demo: Demo) -> None:
    demo.run()
    again = demo("run", str(demo.pipeline), "--set", "vars.glue=+")
    assert "join: running (glue: - -> +)" in again.err
    assert "(glue: - -> +)" in again.err.splitlines()[-1]
    demo.edit("read", "text.upper() if", "text.swapcase() if")
    skipped = demo("run", str(demo.pipeline), "--set", "vars.glue=+")
    assert "early cutoff skipped 3 downstream nodes" in skipped.out


def test_going_back_in_the_history_of_the_files_restores(demo: Demo) -> None:
    """An earlier commit of the pipeline, its stages and its sources is restored without executing anything."""

    def git(*argv: str) -> None:
        settings = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "init.defaultBranch=main"]
        subprocess.run(["git", *settings, *argv], cwd=demo.folder, check=True, capture_output=True)

    (demo.folder / ".gitignore").write_text("artifacts\ncount\n__pycache__\n")
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    demo.run()
    first = demo.path("join", "joined.txt").read_text()
    demo.pipeline.write_text(demo.pipeline.read_text().replace('glue: "-"', 'glue: "+"'))
    demo.source.write_text("entirely different\n")
    demo.edit("line", '" ".join', '"  ".join')
    demo.run()
    assert demo.path("join", "joined.txt").read_text() != first
    demo.counts  # noqa: B018
    git("checkout", ".")
    back = demo.run()
    assert demo.counts == []
    assert demo.path("join", "joined.txt").read_text() == first
    assert {n["reason"] for n in back.json["nodes"]} == {"back to an earlier result"}


def test_a_failed_run_ends_with_the_command_that_resumes_it(demo: Demo) -> None:
    demo.source.write_text("FAIL\n")
    failed = demo("run", str(demo.pipeline), "--until", "join", "-j", "1", "--set", "vars.glue=a b", "--quiet")
    assert failed.code == 1
    assert failed.out == ""
    *_, last = failed.err.splitlines()
    resume = shlex.split(last.removeprefix("resume: pipeline "))
    assert resume == ["run", str(demo.pipeline), "--until", "join", "-j", "1", "--set", "vars.glue=a b"]
    demo.source.write_text("fine\n")
    assert demo(*resume).code == 0


def test_resuming_a_forced_run_forces_what_is_left(demo: Demo) -> None:
    demo.run()
    demo.edit("join", 'count("join")', 'count("join"); 1 / 0')
    failed = demo("run", str(demo.pipeline), "--force")
    assert failed.err.splitlines()[-1] == f"resume: pipeline run {demo.pipeline} --stage join --force"


def test_retries(demo: Demo) -> None:
    (demo.package / "trouble.py").write_text(textwrap.dedent(FLAKY).lstrip())
    demo.pipeline.write_text("version: 1\nname: demo\nstages: {trouble: {}}\n")
    done = demo("run", str(demo.pipeline), "--retries", "2")
    assert done.code == 0
    assert demo.counts == ["trouble"] * 3
    assert "trouble: failed, retry 2: not yet" in done.err
    demo.run("--force")
    assert demo.run("--retries", "-1").code == 2
    demo.pipeline.write_text("version: 1\nname: demo\nstages: {trouble: {with: {kind: '5'}}}\n")
    demo.counts  # noqa: B018
    assert demo.run("--retries", "1").code == 1
    assert demo.counts == ["trouble"] * 2


def test_a_pipeline_from_python(demo: Demo) -> None:
    heard: list[str] = []

    class Listener(Reporter):
        def finished(self, outcome) -> None:
            heard.append(outcome.node.name)

    with Pipeline(demo.pipeline, {"glue": "+", "shapes": ["line"]}) as pipeline:
        assert pipeline.nodes == ["read", "shape[line]", "join"]
        assert [step.decision.status for step in pipeline.plan().steps] == ["NEVER", "UNKNOWN", "UNKNOWN"]
        run = pipeline.run(pipeline.select(stage=["shape"]), reporter=Listener())
        assert run.ok
        assert heard == ["read", "shape[line]"]
        assert [o.status for o in pipeline.run().outcomes] == ["HIT", "HIT", "BUILT"]
        assert pipeline.plan().idle


def test_predicted_time_respects_order_processors_and_exclusive_nodes(demo: Demo) -> None:
    demo.pipeline.write_text(demo.pipeline.read_text().replace("join: {", "join: {resources: {exclusive: true}, "))
    with Pipeline(demo.pipeline) as pipeline:
        steps = pipeline.plan().steps
        for step, seconds in zip(steps, (1.0, 2.0, 4.0, 8.0), strict=True):
            step.seconds = seconds
        assert makespan(steps, lambda _: True, 1) == 15.0
        assert makespan(steps, lambda _: True, 2) == 13.0
        assert makespan(steps, lambda step: step.node.name != "read", 2) == 12.0


def test_the_name_of_a_file_says_how_the_graph_is_written(demo: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(demo.folder)
    begins = {"dag.svg": "<svg", "dag.mmd": "flowchart LR", "dag.dot": "digraph", "dag.txt": "read"}
    for name, first in begins.items():
        done = demo("graph", "-o", name)
        assert (done.code, done.out) == (0, f"wrote {name}\n")
        assert (demo.folder / name).read_text().startswith(first)
    demo("graph", "-o", "dag.png", "--format", "dot")
    assert (demo.folder / "dag.png").read_text() == (demo.folder / "dag.dot").read_text()
