"""What a run executes, and what it leaves alone."""

from __future__ import annotations

import json
import os
import time

import pytest

from tests.support.demo import Demo

ALL = ["join", "read", "shape[column]", "shape[line]"]


def test_second_run_executes_nothing(demo: Demo) -> None:
    first = demo.run()
    assert first.code == 0
    assert demo.counts == ALL
    assert set(first.outcomes.values()) == {"BUILT"}
    assert demo.path("join", "joined.txt").read_text() == "column=some\nwords\nhere-line=some words here3"
    second = demo.run()
    assert second.code == 0
    assert set(second.outcomes.values()) == {"HIT"}
    assert demo.counts == []


def test_parameter_change_runs_only_what_reads_it_and_going_back_runs_nothing(demo: Demo) -> None:
    demo.run()
    assert demo.counts == ALL
    changed = demo.run("--set", "vars.glue=+")
    assert demo.counts == ["join"]
    (join,) = [n for n in changed.json["nodes"] if n["node"] == "join"]
    assert join["reason"] == "glue: - -> +"
    back = demo.run()
    assert demo.counts == []
    assert [n["reason"] for n in back.json["nodes"] if n["node"] == "join"] == ["back to an earlier result"]
    assert "-line" in demo.path("join", "joined.txt").read_text()


def test_touch_runs_nothing_and_refreshes_the_stat_cache(demo: Demo, monkeypatch) -> None:
    os.utime(demo.source, (1_000_000, 1_000_000))
    demo.run()
    demo.counts  # noqa: B018
    os.utime(demo.source, (2_000_000, 2_000_000))
    time.sleep(0.06)  # a stat this young is not trusted: the file may change again within one tick of its clock
    demo.run()
    assert demo.counts == []
    read = []
    monkeypatch.setattr("stagegraph.planning.sources.digest_file", read.append)
    assert demo.run().code == 0
    assert read == []


def test_early_cutoff_stops_where_the_output_is_the_same(demo: Demo) -> None:
    demo.run()
    demo.counts  # noqa: B018
    demo.edit("read", "text.upper() if", "text.swapcase() if")
    again = demo.run()
    assert demo.counts == ["read"]
    assert again.outcomes["read"] == "UNCHANGED"
    assert again.outcomes["join"] == "HIT"


def test_comments_docstrings_and_unhashed_parameters_move_nothing(demo: Demo) -> None:
    demo.run()
    demo.counts  # noqa: B018
    demo.edit("line", '"""Lay out in a line."""', '"""Other words."""  # a comment')
    demo.pipeline.write_text(
        demo.pipeline.read_text().replace('text: "${vars.text}"', 'text: "${vars.text}", note: other')
    )
    demo.run()
    assert demo.counts == []


def test_an_edit_that_python_takes_for_none_is_run(demo: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytecode is taken for that of a source of the same size and second; whatever keeps times can make one."""
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    demo.run()
    path = demo.package / "line.py"
    was = path.stat()
    demo.edit("line", '" ".join', '"-".join')
    os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))
    demo.run()
    assert demo.path("shape.line", "laid", "deep", "text").read_text() == "some-words-here"


def test_a_row_of_a_table_concerns_only_the_nodes_that_use_it(demo: Demo) -> None:
    demo.run()
    demo.counts  # noqa: B018
    demo.edit("line", '" ".join', '"  ".join')
    result = demo.run()
    assert demo.counts == ["join", "shape[line]"]
    reasons = {n["node"]: n["reason"] for n in result.json["nodes"]}
    assert reasons["shape[line]"] == "code fakes.line changed"
    assert reasons["join"] == "input laid changed"
    demo.edit("shapes", '"line": "fakes.line:lay"', '"line": "fakes.line:lay", "none": "fakes.line:lay"')
    demo.run()
    assert demo.counts == []


def test_deleted_and_edited_outputs_are_restored_and_said_so(demo: Demo) -> None:
    demo.run()
    demo.counts  # noqa: B018
    good = demo.path("join", "joined.txt").read_text()
    demo.path("join", "joined.txt").unlink()
    demo.path("read", "words.txt").chmod(0o644)
    demo.path("read", "words.txt").write_text("edited")
    demo.path("read", "stray.txt").write_text("not mine")
    result = demo.run()
    assert demo.counts == []
    reasons = {n["node"]: n["reason"] for n in result.json["nodes"]}
    assert reasons["join"] == "restored joined.txt"
    assert reasons["read"].startswith("restored words.txt")
    assert demo.path("join", "joined.txt").read_text() == good
    assert demo.path("read", "words.txt").read_text() == "some words here\n"
    assert not demo.path("read", "stray.txt").exists()


def test_stage_selection_runs_what_it_needs(demo: Demo) -> None:
    demo.run("--stage", "shape[line]")
    assert demo.counts == ["read", "shape[line]"]
    demo.run("--stage", "shape[*]")
    assert demo.counts == ["shape[column]"]
    demo.run("--from", "shape")
    assert demo.counts == ["join"]


def test_only_refuses_to_run_anything_else(demo: Demo) -> None:
    refused = demo.run("--stage", "join", "--only")
    assert refused.code == 2
    assert "error: read is never (never built) and --only does not run it" in refused.err
    assert "shape[line] is unknown" in refused.err
    assert demo.counts == []
    demo.run()
    demo.counts  # noqa: B018
    demo.edit("join", 'count("join")', 'count("join"); print(1)')
    assert demo.run("--stage", "join", "--only").code == 0
    assert demo.counts == ["join"]
    assert demo.run("--only").code == 2


def test_force_reruns_the_selection_and_says_whether_it_is_identical(demo: Demo) -> None:
    demo.run()
    demo.counts  # noqa: B018
    result = demo.run("--stage", "join", "--force")
    assert demo.counts == ["join"]
    (join,) = [n for n in result.json["nodes"] if n["node"] == "join"]
    assert (join["outcome"], join["reason"]) == ("UNCHANGED", "forced; the result is identical")


def test_dry_run_says_what_would_run_and_runs_nothing(demo: Demo) -> None:
    result = demo.run("--dry-run")
    assert demo.counts == []
    assert {n["node"]: n["status"] for n in result.json["nodes"]} == {
        "read": "NEVER", "shape[line]": "UNKNOWN", "shape[column]": "UNKNOWN", "join": "UNKNOWN",
    }  # fmt: skip
    text = demo("run", str(demo.pipeline), "--dry-run")
    assert "would run 1 of 4 nodes, and up to 3 below them; nothing was run" in text.out


def test_status_and_check(demo: Demo) -> None:
    assert demo("status", str(demo.pipeline), "--check").code == 4
    demo.run()
    assert demo("status", str(demo.pipeline), "--check").code == 0
    demo.source.write_text("other words\n")
    status = demo("status", str(demo.pipeline), "--json").json
    states = {n["node"]: (n["status"], n["reasons"]) for n in status["nodes"]}
    assert states["read"] == ("STALE", ["text a.txt changed"])
    assert states["join"] == ("UNKNOWN", ["after shape[line]"])


def test_views_warnings_facts_and_logs_are_kept(demo: Demo) -> None:
    demo.source.write_text("odd words\n")
    demo.run()
    again = demo("run", str(demo.pipeline))
    assert "warning: read: the text is odd" in again.out
    page = demo("show", "read", str(demo.pipeline)).out
    assert "2 words" in page
    assert "a page" in page
    assert demo("show", "read", str(demo.pipeline), "--view", "page").out == "a page\n"
    assert "no view 'pag'; did you mean 'page'?" in demo("show", "read", str(demo.pipeline), "--view", "pag").err
    assert "read was here" in demo("log", "read", str(demo.pipeline)).out


def test_a_record_tells_how_it_was_made(demo: Demo) -> None:
    demo.run()
    record = demo("show", "read", str(demo.pipeline), "--json").json["read"]
    assert record["document"]["params"] == {"upper": False}
    assert list(record["document"]["sources"]["text"]) == ["a.txt"]
    assert record["cpu_seconds"] >= 0
    assert record["peak_bytes"] > 1 << 20
    assert record["host"]
    assert record["started"].startswith("20")
    assert json.loads(json.dumps(record)) == record


def test_graph_formats(demo: Demo) -> None:
    text = demo("graph", str(demo.pipeline)).out
    assert "join         " in text
    assert "<- shape x2" in text
    assert "flowchart LR" in demo("graph", str(demo.pipeline), "--format", "mermaid").out
    assert '"read" -> "shape";' in demo("graph", str(demo.pipeline), "--format", "dot", "--entries").out
