"""Past runs, logs of running nodes, lineage, export and drawings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest

from stagegraph import Pipeline, registry
from tests.engine.test_faults import start, wait_for
from tests.support.demo import Demo

TROUBLE = """\
version: 1
name: demo
vars: {kind: none}
stages: {trouble: {with: {kind: "${vars.kind}"}}}
"""


def test_runs_are_listed_with_what_each_did(demo: Demo) -> None:
    assert demo("runs", str(demo.pipeline)).out == "no run has executed anything yet\n"
    demo.run()
    demo.run()  # finds everything in place and leaves no trace
    demo.run("--set", "vars.glue=+")
    demo.source.write_text("FAIL\n")
    assert demo.run().code == 1
    runs = demo("runs", str(demo.pipeline), "--json").json["runs"]
    assert [(run["state"], len(run["nodes"])) for run in runs] == [("failed", 4), ("ok", 1), ("ok", 4)]
    assert runs[1]["command"] == ["run", str(demo.pipeline), "--set", "vars.glue=+"]
    text = demo("runs", str(demo.pipeline)).out.splitlines()
    assert len(text) == 4
    assert text[1].split()[:2] == [runs[0]["id"][:8], "failed"]
    one = demo("runs", str(demo.pipeline), "--run", runs[0]["id"][:6]).out
    assert "error: read: the text says FAIL" in one
    assert "glue: - -> +" in demo("runs", str(demo.pipeline), "--run", "@~1").out
    assert "no run begins with 'zz'" in demo("runs", str(demo.pipeline), "--run", "zz").err


def test_an_interrupted_run_is_in_the_history(demo: Demo) -> None:
    demo.pipeline.write_text(TROUBLE.replace("stages: {", "stages: {read: {with: {text: words}}, "))
    process = start(demo, "--set", "vars.kind=sleep", "-j", "2")
    wait_for(demo, "trouble")
    with Pipeline(demo.pipeline) as pipeline:
        for _ in range(200):
            if (pipeline.workspace.index.get("last:demo/read") or {}).get("key"):
                break
            time.sleep(0.05)
    time.sleep(0.5)  # until the outcome is noted, too
    process.send_signal(2)
    assert process.wait(20) == 130
    (run,) = demo("runs", str(demo.pipeline), "--json").json["runs"]
    assert run["state"] == "interrupted"
    assert [(n["node"], n["outcome"]) for n in run["nodes"]] == [("read", "BUILT")]


def test_the_log_of_a_running_node_is_followed_to_its_end(demo: Demo) -> None:
    demo.pipeline.write_text(TROUBLE)
    demo.edit("trouble", 'count("trouble")', 'print("began", flush=True); count("trouble")')
    demo.edit("trouble", "time.sleep(1.0)", 'time.sleep(5.0); print("ended", flush=True)')
    process = start(demo, "--set", "vars.kind=short")
    wait_for(demo, "trouble")
    code = (
        "import sys; from stagegraph import registry; from stagegraph.cli.main import main;"
        f"provider = registry.Provider(stages={registry.shipped().stages!r});"
        "registry.shipped = lambda: provider; main(sys.argv[1:])"
    )
    env = {**os.environ, "PYTHONPATH": f"{demo.package.parent}{os.pathsep}{Path(__file__).parents[2]}"}
    follow = [sys.executable, "-c", code, "log", "trouble", str(demo.pipeline), "--follow"]
    said = subprocess.run(follow, env=env, capture_output=True, text=True, check=True, timeout=30).stdout
    assert process.wait(20) == 0
    assert "(running; " in said
    assert said.splitlines()[1:] == ["began", "ended"]
    assert "(finished; " in demo("log", "trouble", str(demo.pipeline), "--follow").out


def test_follow_wants_one_node(demo: Demo) -> None:
    assert "name one of shape[line], shape[column]" in demo("log", "shape", str(demo.pipeline), "-f").err


def test_lineage_goes_back_to_sources_parameters_code_and_tools(demo: Demo) -> None:
    demo.run()
    found = demo("lineage", "join:joined.txt", str(demo.pipeline), "--format", "json").json
    labels = [origin["label"] for origin in found["executions"]]
    assert labels[0] == "join"
    assert labels[-1] == "read"
    assert set(labels) == {"join", "shape[line]", "shape[column]", "read"}
    by_label = {origin["label"]: origin for origin in found["executions"]}
    assert by_label["read"]["sources"]["text"].keys() == {"a.txt"}
    assert by_label["join"]["params"] == {"glue": "-"}
    assert "fakes.line" in by_label["shape[line]"]["code"]["modules"]
    assert by_label["read"]["key"] in by_label["join"]["from"]
    text = demo("lineage", "join", str(demo.pipeline)).out
    assert "source  text: a.txt" in text
    assert "param   glue = -" in text
    mermaid = demo("lineage", "join", str(demo.pipeline), "--format", "mermaid").out
    assert mermaid.startswith("flowchart LR\n")
    assert mermaid.count(" --> ") == 6


def test_lineage_of_a_copied_file_follows_only_its_maker(demo: Demo) -> None:
    demo.edit(
        "join",
        '(ctx.out / "joined.txt").write_text(ctx.params.glue.join(parts)',
        '(ctx.out / "joined.txt").write_text("".join(parts)[:0]',
    )  # what is left is a copy of count.txt
    demo.run()
    found = demo("lineage", "join:joined.txt", str(demo.pipeline), "--json").json
    assert found["copied"] == {"joined.txt": "read:count.txt"}
    assert [origin["label"] for origin in found["executions"]] == ["read"]


def test_lineage_tells_what_happened_not_what_would(demo: Demo) -> None:
    """After an early cutoff the result stays the one that the earlier execution upstream went into."""
    demo.run()
    key = demo("show", "read", str(demo.pipeline), "--json").json["read"]["key"]
    demo.edit("read", "text.upper() if", "text.swapcase() if")
    demo.run()
    now = demo("show", "read", str(demo.pipeline), "--json").json["read"]["key"]
    found = demo("lineage", "join", str(demo.pipeline), "--json").json
    keys = {origin["key"] for origin in found["executions"]}
    assert key in keys
    assert now not in keys


@pytest.mark.parametrize("entries", [[], ["--entries"]])
def test_a_drawing(demo: Demo, entries: list[str]) -> None:
    drawn = ElementTree.fromstring(demo("graph", str(demo.pipeline), "--format", "svg", *entries).out)  # noqa: S314
    names = [text.text for text in drawn.iter("{http://www.w3.org/2000/svg}text")]
    shapes = ["shape", "2 nodes"] if entries else ["shape[line]", "shape[column]"]
    assert sorted(names) == sorted(["read", *shapes, "join"])
    paths = list(drawn.iter("{http://www.w3.org/2000/svg}path"))
    edges = [path for path in paths if path.get("fill") == "none"]
    assert len(edges) == (2 if entries else 4)
    assert len(paths) == 2 * len(edges), "each has a head"


def test_every_json_is_one_document(demo: Demo) -> None:
    demo.run()
    for verb in (["status"], ["explain", "join"], ["show", "join"], ["runs"], ["lineage", "join"], ["du"], ["gc"]):
        json.loads(demo(verb[0], *verb[1:], str(demo.pipeline), "--json").out)
