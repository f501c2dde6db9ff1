"""What the verbs share: their common arguments; sizes, times, tables and colours as people see them."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MIN_FLEXIBLE = 24  # characters
# A cell of a table -> its colour on a terminal (SGR code).
COLOURS = {
    "HIT": 32, "BUILT": 36, "UNCHANGED": 32, "STALE": 33, "NEVER": 35, "UNKNOWN": 90, "FAILED": 31, "SKIPPED": 90,
    "ok": 32, "failed": 31, "interrupted": 33,
}  # fmt: skip


def add_file(parser: argparse.ArgumentParser) -> None:
    """Add the pipeline file and ``--set``."""
    parser.add_argument(
        "file", nargs="?", default="pipeline.yaml", metavar="FILE", help="pipeline file (default: ./pipeline.yaml)"
    )
    add_set(parser)


def add_set(parser: argparse.ArgumentParser) -> None:
    """Add ``--set``."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="vars.NAME=VALUE",
        help="override a variable for this command",
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add ``--json``."""
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout")


def add_selection(parser: argparse.ArgumentParser) -> None:
    """Add the options that select nodes by name or pattern."""
    for option, target, help_ in (
        ("--stage", "stage", "nodes and what they need, as graph-build[*,decode]"),
        ("--from", "start", "these nodes and everything below them (and what they need)"),
        ("--until", "until", "of all that, nothing below these nodes"),
    ):
        parser.add_argument(option, action="append", default=[], dest=target, metavar="NAME", help=help_)


def size_text(count: int) -> str:
    """Return a size in bytes for people: ``3.2 MiB``."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError("unreachable")


def seconds_text(seconds: float) -> str:
    """Return a duration for people: ``0.42 s``, ``3 m 05 s``."""
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"
    return f"{int(seconds // 60)} m {int(seconds % 60):02} s"


def age_text(stamp: str) -> str:
    """Return how long ago a time of a record was: ``5 m ago``, ``3 d ago``."""
    import calendar

    seconds = max(0, int(time.time() - calendar.timegm(time.strptime(stamp, "%Y-%m-%dT%H:%M:%SZ"))))
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length} {unit} ago"
    return f"{seconds} s ago"


def coloured() -> bool:
    """Say whether stdout takes colours: a terminal that is not told otherwise (``NO_COLOR``)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def shown(path: Path) -> str:
    """Return a path as people want it: relative where it lies below the current directory."""
    try:
        return str(path.absolute().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _terminal_width() -> int:
    """Return what ``shutil.get_terminal_size`` would, without all that shutil imports."""
    columns = os.environ.get("COLUMNS", "")
    if columns.isdigit() and int(columns):
        return int(columns)
    try:
        return os.get_terminal_size(1).columns or 120
    except OSError:
        return 120


def table(header: Sequence[str], rows: Sequence[Sequence[str]], flexible: int, width: int | None = None) -> str:
    """Lay out a table in the terminal's width.

    The ``flexible`` column is shortened where the others leave no room; last columns go before it becomes unreadable.
    """
    width = width or _terminal_width()
    columns = list(zip(header, *rows, strict=True))
    widths = [max(len(cell) for cell in column) for column in columns]

    def room() -> int:
        return width - sum(widths) + widths[flexible] - 2 * (len(widths) - 1)

    while room() < min(widths[flexible], MIN_FLEXIBLE) and len(widths) > max(flexible + 1, 3):
        columns.pop()
        widths.pop()
    widths[flexible] = min(widths[flexible], max(room(), 12))
    paint = _paint if coloured() else str.rstrip
    lines = zip(*columns, strict=True)
    return "\n".join(
        paint("  ".join(_fit(cell, w) for cell, w in zip(line, widths, strict=True)).rstrip()) for line in lines
    )


def _paint(line: str) -> str:
    """Colour the first cell that is an outcome or a status; words of other cells stay plain."""
    for word in line.split("  "):
        if word.strip() in COLOURS:
            return line.replace(word, f"\x1b[{COLOURS[word.strip()]}m{word}\x1b[0m", 1)
    return line


def _fit(cell: str, width: int) -> str:
    cell = " ".join(cell.split())
    return cell.ljust(width) if len(cell) <= width else cell[: width - 1] + "…"


def print_json(document: Any) -> None:
    """Print one machine-readable document on stdout."""
    import json

    print(json.dumps(document, indent=1, ensure_ascii=False))
