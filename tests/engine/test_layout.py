"""Tables, Markdown's too, and long lines in the width of a terminal: nothing sticks out, nothing of weight is lost."""

from __future__ import annotations

import io
import random
import sys
import unicodedata

import pytest

from stagegraph.cli import layout, pager
from stagegraph.cli.layout import Brief

HEADER = ("node", "status", "reason", "time", "size", "memory", "built")
REASON = "quantization: q4f16_1 -> q4f32_1 (+2 more)"
NAME = "graph-build[a-target-of-a-long-name,batch_prefill]"
ROWS = [
    ("read", "HIT", Brief("qwen, 4 layers, 35 tensors, 2.6 MB"), "0.10 s", "7.2 KiB", "17.3 MiB", "49 s ago"),
    (NAME, "STALE", REASON, "1.81 s", "388.2 KiB", "198.7 MiB", "50 s ago"),
]


def columns(text: str) -> int:
    return sum(1 + (unicodedata.east_asian_width(c) in "WF") for c in text)


def squeezed(text: str) -> str:
    return "".join(text.split())


@pytest.mark.parametrize("width", [80, 100, 120, 200])
def test_a_table_keeps_its_columns_names_and_reasons(width: int) -> None:
    text = layout.table(HEADER, ROWS, flexible=2, width=width)
    assert max(map(columns, text.splitlines())) <= width
    assert NAME in text
    assert all(word in text for word in REASON.split())
    for cell in ("1.81 s", "388.2 KiB", "198.7 MiB", "50 s ago"):
        assert cell in text


def test_a_reason_goes_below_its_row_before_a_column_goes() -> None:
    rows = [(name[:20], *rest) for name, *rest in ROWS]
    assert layout.table(HEADER, rows, flexible=2, width=80).splitlines() == [
        "node                  status  time    size       memory     built",
        "read                  HIT     0.10 s  7.2 KiB    17.3 MiB   49 s ago",
        "graph-build[a-target  STALE   1.81 s  388.2 KiB  198.7 MiB  50 s ago",
        "  quantization: q4f16_1 -> q4f32_1 (+2 more)",
    ]


def test_a_reason_is_wrapped_where_a_summary_is_cut() -> None:
    rows = [row[:3] for row in ROWS[:1]] + [("join", "STALE", REASON)]
    assert layout.table(HEADER[:3], rows, flexible=2, width=40).splitlines() == [
        "node  status  reason",
        "read  HIT     qwen, 4 layers, 35 tensor…",
        "join  STALE   quantization: q4f16_1 ->",
        "              q4f32_1 (+2 more)",
    ]


def test_no_table_sticks_out_or_loses_a_name_or_a_reason() -> None:
    draw = random.Random(7)  # noqa: S311 - samples, no secrets
    words = ["x", "reason", "量化", "a-long-word-that-has-no-space-in-it", "q4f16_1", "->"]
    for _ in range(300):
        rows = [
            (f"node{i}" * draw.randint(1, 7), "STALE", " ".join(draw.choices(words, k=draw.randint(1, 12))), "1.00 s")
            for i in range(3)
        ]
        width = draw.randint(40, 130)
        text = layout.table(("node", "status", "reason", "time"), rows, flexible=2, width=width)
        assert max(map(columns, text.splitlines())) <= width
        for name, _, reason, _ in rows:
            assert name in text
            column = squeezed(text)
            assert all(squeezed(word) in column or columns(word) > layout.MIN_FLEXIBLE for word in reason.split())


def test_markdown_tables_are_laid_out_and_all_else_is_left() -> None:
    text = "# A | B\n\n| memory | bytes |\n|---|---:|\n| weights | 809,472 |\n| a \\| b | 1 |\n\nafter | that\n"
    assert layout.markdown(text, 80) == (
        "# A | B\n\nmemory     bytes\nweights  809,472\na | b          1\n\nafter | that\n"
    )
    assert layout.markdown("| | |\n| --- | --- |\n| family | qwen |", 80) == "family  qwen"
    kernels = "| kernel | seconds to compile |\n|---|---:|\n| a_kernel_of_a_long_name | 4.77 |"
    assert layout.markdown(kernels, 35).splitlines() == [
        "kernel                   seconds to",
        "                            compile",
        "a_kernel_of_a_long_name        4.77",
    ]
    wide = "| function | arguments | result |\n|---|---|---|\n| f | " + "states: float32 " * 9 + "| object |"
    assert max(map(len, layout.markdown(wide, 60).splitlines())) <= 60


@pytest.mark.parametrize("width", [30, 47, 80])
def test_folded_lines_are_indented_and_whole(width: int) -> None:
    line = "    T.reads(weight[v_i // T.int64(32), v_j // T.int64(8)], scale[v_i, v_j]) " + "x" * 90
    parts = list(layout.fold(line, width))
    assert max(map(len, parts)) <= width
    assert squeezed("".join(parts)) == squeezed(line)
    assert all(part.startswith(" " * 8) for part in parts[1:])
    assert list(layout.fold("name      shape       stored as      made of", 40)) == [
        "name      shape       stored as", "    made of",
    ]  # fmt: skip


def test_colours_take_no_room(monkeypatch) -> None:
    monkeypatch.setattr(layout, "coloured", lambda: True)
    text = layout.table(HEADER[:2], [("join", "HIT")], flexible=0, width=80)
    assert "\x1b[32mHIT\x1b[0m" in text
    assert list(layout.fold(text.splitlines()[1], 9)) == [text.splitlines()[1]]


def test_in_a_pipe_a_text_stays_as_it_is(monkeypatch, capfd) -> None:
    text = "| a | b |\n|---|---|\n| 1 | " + "long " * 60 + "|\n"
    pager.page(text, "card.md")
    assert capfd.readouterr().out == text
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "60")
    pager.page(text, "card.md")
    assert "|" not in capfd.readouterr().out


def test_a_message_is_folded_on_the_terminal_that_it_goes_to(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", "20")
    assert layout.prose("error: one two three four", Terminal()) == "error: one two three\n    four"
    assert layout.prose("error: one two three four", io.StringIO()) == "error: one two three four"
