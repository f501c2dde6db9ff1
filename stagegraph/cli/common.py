"""What the verbs share: the FILE and ``--set`` arguments, opening a pipeline with its workspace, sizes and tables."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stagegraph.dag import Dag
from stagegraph.plan import Planner
from stagegraph.spec import load
from stagegraph.workspace import Workspace

MIN_FLEXIBLE = 24  # characters


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


@dataclass
class Opened:
    """A pipeline file ready to be planned."""

    dag: Dag
    workspace: Workspace
    planner: Planner


@contextmanager
def opened(file: str, overrides: Sequence[str]) -> Iterator[Opened]:
    """Read a pipeline and open the ``artifacts/`` beside it."""
    pipeline = load(Path(file), overrides)
    dag = Dag(pipeline)
    workspace = Workspace(pipeline.root / "artifacts")
    try:
        yield Opened(dag, workspace, Planner(dag, workspace))
    finally:
        workspace.close()


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


def shown(path: Path) -> str:
    """Return a path as people want it: relative where it lies below the current directory."""
    try:
        return str(path.absolute().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], flexible: int, width: int | None = None) -> str:
    """Lay out a table in the terminal's width.

    The ``flexible`` column is shortened where the others leave no room; last columns go before it becomes unreadable.
    """
    width = width or shutil.get_terminal_size((120, 24)).columns
    columns = list(zip(header, *rows, strict=True))
    widths = [max(len(cell) for cell in column) for column in columns]

    def room() -> int:
        return width - sum(widths) + widths[flexible] - 2 * (len(widths) - 1)

    while room() < min(widths[flexible], MIN_FLEXIBLE) and len(widths) > max(flexible + 1, 3):
        columns.pop()
        widths.pop()
    widths[flexible] = max(min(widths[flexible], room()), 12)
    lines = zip(*columns, strict=True)
    return "\n".join("  ".join(_fit(cell, w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def _fit(cell: str, width: int) -> str:
    cell = " ".join(cell.split())
    return cell.ljust(width) if len(cell) <= width else cell[: width - 1] + "…"


def print_json(document: Any) -> None:
    """Print one machine-readable document on stdout."""
    import json

    print(json.dumps(document, indent=1, ensure_ascii=False))
