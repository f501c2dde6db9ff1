"""Lays text out in the terminal's width: tables (of Markdown too) with cells wrapped or cut, and folded long lines."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Collection, Iterator, Sequence
from typing import TextIO

from stagegraph.cli.streams import visible

PIPE_COLUMNS = 120  # the width of a table where there is no terminal: stable, whoever runs it
MIN_FLEXIBLE, MIN_NAME = 20, 12  # columns
GAP = "  "
SGR = re.compile(r"\x1b\[\d*m")
HANG = 4  # columns that the rest of a folded line is indented by
# A cell of a table -> its colour on a terminal (SGR code).
COLOURS = {
    "HIT": 32, "BUILT": 36, "UNCHANGED": 32, "STALE": 33, "NEVER": 35, "UNKNOWN": 90, "FAILED": 31, "SKIPPED": 90,
    "ok": 32, "failed": 31, "interrupted": 33,
}  # fmt: skip


class Brief(str):
    """A table cell that may be shortened or dropped where there is no room; other cells are wrapped in full."""

    __slots__ = ()


def coloured() -> bool:
    """Say whether stdout takes colours: a terminal that is not told otherwise (``NO_COLOR``)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def terminal_width(piped: int = PIPE_COLUMNS) -> int:
    """Return what ``shutil.get_terminal_size`` would, without all that shutil imports; ``piped`` for no terminal."""
    columns = os.environ.get("COLUMNS", "")
    if columns.isdigit() and int(columns):
        return int(columns)
    try:
        return os.get_terminal_size(1).columns or piped
    except OSError:
        return piped


def table(header: Sequence[str], rows: Sequence[Sequence[str]], flexible: int, width: int | None = None) -> str:
    """Lay out a table in the terminal's width.

    Where it is too wide, the ``flexible`` column becomes narrower; where that is not enough its cells go below their
    rows and names too long for the first column above theirs; only then are the last columns left out.
    """
    width = width or terminal_width()
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(_columns, column)) for column in columns]
    below: tuple[str, ...] = ("",) * (len(rows) + 1)

    def excess() -> int:
        return sum(widths) + len(GAP) * (len(widths) - 1) - width

    if excess() > 0:
        widths[flexible] = max(widths[flexible] - excess(), min(widths[flexible], MIN_FLEXIBLE))
    if excess() > 0 and flexible:
        below = ("", *columns.pop(flexible)[1:])
        widths.pop(flexible)
    if excess() > 0:
        widths[0] = max(widths[0] - excess(), min(widths[0], MIN_NAME))
    while excess() > 0 and len(columns) > 2:
        columns.pop()
        widths.pop()
    lines: list[str] = []
    for cells, rest in zip(zip(*columns, strict=True), below, strict=True):
        long = bool(flexible) and _columns(cells[0]) > widths[0]
        lines += fold(cells[0], width) if long else ()
        lines += _row(("", *cells[1:]) if long else cells, widths)
        if rest and not isinstance(rest, Brief):
            lines += fold(f"  {' '.join(rest.split())}", width)
    return "\n".join(lines)


def _row(cells: Sequence[str], widths: Sequence[int], right: Collection[int] = ()) -> Iterator[str]:
    """Yield the lines of one row; a word like HIT or ok, after the first cell, has its colour."""
    cells = [type(cell)(visible(" ".join(cell.split()))) for cell in cells]
    parts = [[cut(c, w)] if isinstance(c, Brief) else list(fold(c, w, 0)) for c, w in zip(cells, widths, strict=True)]
    status = next((i for i, cell in enumerate(cells) if i and cell in COLOURS), None) if coloured() else None
    for line in range(max(map(len, parts))):
        shown = [part[line] if line < len(part) else "" for part in parts]
        padded = [_pad(text, w, right=i in right) for i, (text, w) in enumerate(zip(shown, widths, strict=True))]
        if status is not None and line == 0:
            word = cells[status]
            padded[status] = padded[status].replace(word, f"\x1b[{COLOURS[word]}m{word}\x1b[0m")
        yield GAP.join(padded).rstrip()


def fold(text: str, width: int, hang: int = HANG) -> Iterator[str]:
    """Yield a line in as many as it takes: broken at a gap between columns, else at a space, else anywhere.

    Those after the first are indented by ``hang`` more than it is.
    """
    indent = len(text) - len(text.lstrip(" "))
    after = " " * min(indent + hang, width // 2)
    while _columns(text) > width:
        end = _fitting(text, width)
        at = text.rfind(GAP, indent, end + 1)
        if at <= end // 2:
            at = text.rfind(" ", indent, end + 1)
        if at <= indent:
            at = end
        yield text[:at].rstrip()
        text, indent = after + text[at:].lstrip(" "), len(after)
    yield text


def folded(text: str, width: int) -> str:
    """Fold every line of a text that is wider than ``width``."""
    return "\n".join(part for line in text.split("\n") for part in fold(line, width))


def prose(text: str, stream: TextIO | None = None) -> str:
    """Fold sentences to the width of the terminal that ``stream`` (stdout) is; where it is none they stay whole."""
    return folded(text, terminal_width()) if (stream or sys.stdout).isatty() else text


def markdown(text: str, width: int) -> str:
    """Lay out the tables of a Markdown text in columns; all else is as it was."""
    return re.sub(r"(?m)^\|.*\n\|[ :|-]+\|$(\n\|.*)*", lambda found: _markdown_table(found[0], width), text)


def _markdown_table(text: str, width: int) -> str:
    lines = [
        [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]]
        for line in text.split("\n")
    ]
    header, rule, *rows = lines
    rows = [(row + [""] * len(header))[: len(header)] for row in [header, *rows] if any(row)]
    right = {i for i, dashes in enumerate(rule) if dashes.endswith(":")}
    columns, room = list(zip(*rows, strict=True)), width - len(GAP) * (len(header) - 1)
    words = [max(_columns(word) for cell in column for word in cell.split() or [""]) for column in columns]
    ways = [_shares(columns, room, least) for least in (words, [1] * len(columns))]  # words kept whole, or broken
    laid = [[line for row in rows for line in _row(row, widths, right)] for widths in ways]
    shorter = min(laid, key=len)
    return "\n".join(shorter)


def _shares(columns: Sequence[Sequence[str]], room: int, least: Sequence[int]) -> list[int]:
    """Return a width for each column: the widest shrink first, down to ``least`` and, if need be, below it."""
    widths = [max(map(_columns, column)) for column in columns]
    for bounds in (least, [1] * len(columns)):
        while sum(widths) > room and (yielding := [i for i, width in enumerate(widths) if width > bounds[i]]):
            widths[max(yielding, key=lambda i: widths[i])] -= 1
    return widths


def cut(text: str, width: int) -> str:
    """Return as much of a line as fits, with "…" in place of the rest."""
    return text if _columns(text) <= width else text[: _fitting(text, width - 1)] + "…"


def _pad(text: str, width: int, *, right: bool) -> str:
    space = " " * (width - _columns(text))
    return space + text if right else text + space


def _columns(text: str) -> int:
    """Return how many columns of a terminal a text takes: colours none, Chinese characters two."""
    text = SGR.sub("", text)
    return len(text) if text.isascii() else sum(map(_character, text))


def _character(character: str) -> int:
    import unicodedata

    wide = unicodedata.east_asian_width(character) in "WF"
    return 0 if unicodedata.combining(character) else 2 if wide else 1


def _fitting(text: str, width: int) -> int:
    """Return how many characters of a text fit, at least one."""
    used = 0
    for i, character in enumerate(text):
        used += 1 if character.isascii() else _character(character)
        if used > width:
            return max(i, 1)
    return len(text)
