"""What people see, as it stands on a narrow and on a wide terminal: each screen is a file in tests/data/screens.

A screen that was changed on purpose is written with ``STAGEGRAPH_WRITE_SCREENS=1 pytest tests/engine/test_screens.py``,
and looked at.
"""

from __future__ import annotations

import io
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from stagegraph.cli import summary
from stagegraph.cli.live import LiveReporter
from stagegraph.cli.remaining import Remaining
from stagegraph.execution.outcome import Outcome
from tests.support.demo import Demo

SCREENS = Path(__file__).parents[1] / "data" / "screens"
# What no two runs share: times, of three digits each, and the spinner.
VARYING = [
    (re.compile(r"\d+(\.\d+)? s\b"), "0.00 s"),
    (re.compile(r"\d:\d\d:\d\d"), "0:00:00"),
    (re.compile(r"[⠀-⣿]"), "*"),
]
VERBS = {
    "help": ["help"],
    "status-before": ["status", "pipeline.yaml"],
    "run": ["run", "pipeline.yaml"],
    "run-again": ["run", "pipeline.yaml", "--verbose"],
    "graph": ["graph", "pipeline.yaml"],
}


def check(name: str, width: int, text: str) -> None:
    for pattern, instead in VARYING:
        text = pattern.sub(instead, text)
    text = "\n".join(line.rstrip() for line in text.splitlines()) + "\n"
    assert max(map(len, text.splitlines())) <= width
    file = SCREENS / f"{name}.{width}.txt"
    if os.environ.get("STAGEGRAPH_WRITE_SCREENS"):
        file.write_text(text)
    assert text == file.read_text()


@pytest.mark.parametrize("width", [80, 200])
def test_the_screens_of_verbs(demo: Demo, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.chdir(demo.folder)
    monkeypatch.setenv("COLUMNS", str(width))
    demo.source.write_text("some odd words that are many " * 3)
    for name, argv in VERBS.items():
        done = demo(*argv)
        assert done.code == 0, done.err
        check(name, width, done.out)


@pytest.mark.parametrize("width", [80, 200])
def test_the_screen_of_a_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], width: int) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    names = ("read", "convert[one]", "convert[two]", "prove[one]", "prove[two]")
    nodes: list[Any] = [SimpleNamespace(name=name) for name in names]
    times = {"read": 1.0, "convert[one]": 4.0, "convert[two]": 4.0, "prove[one]": 9.0, "prove[two]": 9.0}
    seen = io.StringIO()
    with LiveReporter(len(nodes), Remaining(lambda: times, jobs=2)) as reporter:
        reporter.started(nodes[0], "never built")
        record: Any = {"summary": "a book of 4,242 pages, " * 4 + "and a cover"}
        reporter.finished(Outcome(nodes[0], "BUILT", "never built", record=record, seconds=1.0))
        for node in nodes[1:4]:
            reporter.started(node, "never built")
        reporter.waiting(nodes[4], "2.0 GiB of memory")
        reporter.progress(nodes[1], 300 << 20, 700 << 20, "B", "140 MB/s")
        reporter.progress(nodes[2], 3, 12, "kernels", "a_kernel_of_some_length_that_was_written_by_hand_0a1b2c3d")
        reporter.progress(nodes[3], 1488, 0, "pages read", "")
        problems = ("the book has no page 7, " * 4 + "and none after it",)
        reporter.finished(Outcome(nodes[2], "FAILED", "", seconds=2.0, problems=problems))
        Console(file=seen, width=width).print(reporter._bars.get_renderable())
    check("live", width, capsys.readouterr().err + seen.getvalue())


def test_what_was_done_before_the_first_node_began_takes_no_time() -> None:
    left = Remaining(lambda: {"old": 100.0, "new": 4.0}, jobs=1)
    left.finished("old")
    left.started("new")
    assert left.text() == "about 4 s left"
    left.finished("new")
    assert left.text() == ""


def test_the_summary_of_many_nodes_has_a_row_for_an_entry() -> None:
    def outcome(entry: str, number: int, status: str, *, attests: bool = False) -> Any:
        stage = SimpleNamespace(outputs={"out": SimpleNamespace(attests=attests)})
        node = SimpleNamespace(name=f"{entry}[{number}]", spec=SimpleNamespace(entry=entry), stage=stage)
        return Outcome(node, status, "", seconds=2.0)

    done = [outcome("convert", number, "BUILT") for number in range(70)]
    done += [outcome("prove", number, "BUILT", attests=True) for number in range(2)]
    done += [outcome("convert", 70, "FAILED")]
    rows = list(summary._rows(done, verbose=False))
    assert rows[0] == ("convert", "BUILT", "70 nodes; -v lists each", "2 m 20 s", "0 B")
    assert [row[0] for row in rows[1:]] == ["prove[0]", "prove[1]", "convert[70]"]
    assert len(list(summary._rows(done, verbose=True))) == len(done)
    assert len(list(summary._rows(done[20:], verbose=False))) == len(done[20:])
