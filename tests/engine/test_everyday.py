"""Runs by tag and by date, logs of past runs, differences in numbers, and what a run is summed up in."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace
from typing import Any

import pytest

from stagegraph.cli.remaining import Remaining
from stagegraph.query.history import Durations, PastRun, find_run
from tests.support.demo import Demo


def past(started: str, tag: str = "") -> PastRun:
    return PastRun("ab" * 32, "demo", started, 1.0, "ok", (), (), tag)


def test_runs_are_named_by_tag_and_date(demo: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    assert demo.run("--tag", "before").code == 0
    assert demo.run("--set", "glue=+").code == 0
    assert demo.run("--set", "glue=+", "--tag", "same").code == 0  # it did nothing, and has its name all the same
    file = str(demo.pipeline)
    assert demo("show", "join@before:joined.txt", file).out != demo("show", "join@same:joined.txt", file).out
    assert demo("show", "join@same:joined.txt", file).out == demo("show", "join@~0:joined.txt", file).out
    monkeypatch.setenv("COLUMNS", "120")
    table = demo("runs", file).out
    assert "before" in table
    assert re.search(r"\d{4}-\d\d-\d\d \d\d:\d\d", table)
    monkeypatch.setenv("COLUMNS", "80")
    assert re.search(r"(?m)^\w{8} +ok +run .* ago +before$", demo("runs", file).out)
    today = json.loads(demo("runs", file, "--json").out)["runs"][0]["started"][:10]
    assert demo("show", f"join@{today}:joined.txt", file).out == demo("show", "join@~0:joined.txt", file).out
    assert "no run is as old as 2001-01-01" in demo("show", "join@2001-01-01", file).err
    assert "--tag 1x: expected a letter" in demo("run", file, "--tag", "1x").err


def test_a_date_is_the_last_run_by_the_end_of_that_day() -> None:
    runs = [past("2026-11-01T10:00:00Z"), past("2026-11-03T09:00:00Z", "a"), past("2026-11-03T23:59:59Z", "a")]
    assert [find_run(runs, name) for name in ("2026-11-01", "2026-11-02", "2026-11-03", "@2026-12-24")] == [0, 0, 2, 2]
    assert find_run(runs, "a") == 2


def test_the_log_of_a_past_run_is_that_runs(demo: Demo) -> None:
    demo.edit("read", "read was here", "read was here first")
    demo.run()
    demo.edit("read", "read was here first", "read was here again")
    demo.run()
    file = str(demo.pipeline)
    assert "first" in demo("log", "read@~1", file).out
    assert "again" in demo("log", "read@~0", file).out
    demo.source.write_text("FAIL")
    demo.run()
    assert "==> read (FAILED in run" in demo("log", "read@~0", file).out
    assert "is a past log" in demo("log", "read@~1", file, "--follow").err


def test_differences_in_numbers_and_by_kind(demo: Demo) -> None:
    demo.run()
    demo.run("--set", "glue=+")
    file = str(demo.pipeline)
    lines = demo("diff", "@~1", "@~0", file, "--stat").out.splitlines()
    assert len(lines) == 2
    assert re.search(r"the outputs differ; 1 param, ", lines[0])
    only = demo("diff", "join@~1", "join@~0", file, "--only", "param").out
    assert "param  glue: - -> +" in only
    assert "file" not in only
    assert "unknown kind; did you mean 'param'?" in demo("diff", "@~1", "@~0", file, "--only", "parm").err


def test_a_run_is_summed_up_in_what_changed(demo: Demo) -> None:
    file = str(demo.pipeline)
    demo.run()
    assert re.fullmatch(r"4 HIT in \S+ s\n", demo("run", file).out)
    changed = demo("run", file, "--set", "glue=+").out
    assert changed.splitlines()[1].startswith("join  BUILT")
    assert "shape" not in changed
    assert "shape[line]" in demo("run", file, "-v").out
    demo.source.write_text("FAIL")
    failed = demo("run", file).out
    assert "SKIPPED as read failed: shape[line], shape[column], join" in failed
    assert "1 FAILED, 3 SKIPPED in" in failed


def test_what_passed_with_a_reservation_is_no_success(demo: Demo) -> None:
    fact = 'ctx.fact("language", "en")'
    demo.edit("read", fact, f'{fact}; ctx.fact("reservation", "NOT RUN (no x)")')
    for _ in range(2):
        said = demo("run", str(demo.pipeline)).out
        assert re.search(r"3 (BUILT|HIT), 1 NOT RUN in", said), said


@pytest.mark.parametrize("columns", ["80", "200"])
def test_the_summary_fits_the_screen(demo: Demo, monkeypatch: pytest.MonkeyPatch, columns: str) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    demo.edit("read", 'f"{len(text.split())} words"', '"a long word " * 30')
    assert max(map(len, demo("run", str(demo.pipeline)).out.splitlines())) <= int(columns)


def test_the_time_left_is_what_is_predicted_less_what_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    left = Remaining(lambda: {"a": 10.0, "b": 20.0}, jobs=1)
    assert left.text() == ""
    left.started("a")
    assert left.text() == "about 30 s left"
    now[0] += 5
    assert left.text() == "about 25 s left"
    left.progress("a", 1, 4, "pages")  # at its own pace
    assert left.text() == "about 35 s left"
    left.progress("a", 4, 4, "pages")  # and it goes on with something else
    assert left.text() == "about 25 s left"
    left.progress("a", 0, 0, "words")
    now[0] += 2
    left.progress("a", 1, 3, "words")  # in these two seconds
    assert left.text() == "about 24 s left"
    left.finished("a")
    assert left.text() == "about 20 s left"
    unknown = Remaining(lambda: {"a": None, "b": 1.0}, jobs=2)
    unknown.started("b")
    assert unknown.text() == ""
    unknown.finished("a")
    assert unknown.text() == "about 1 s left"


def test_a_node_is_predicted_by_itself_by_its_entry_or_by_its_stage() -> None:
    def node(name: str, seconds: float) -> dict[str, Any]:
        return {"node": name, "stage": "shell", "seconds": seconds, "outcome": "BUILT"}

    ran = [node("build[a]", 8.0), node("build[b]", 6.0), node("tidy", 1.0)]
    journal: Any = SimpleNamespace(entries=lambda: [{"pipeline": "p", "nodes": ran}])
    known = Durations(journal)
    assert known.predict("p", "build[a]", "shell") == 8.0
    assert known.predict("p", "build[c]", "shell") == 7.0
    assert known.predict("p", "other", "shell") == 6.0
    assert known.predict("p", "other", "none") is None
