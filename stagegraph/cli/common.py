"""Helpers that verbs share: common arguments, and sizes, times and paths formatted for people."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

from stagegraph.cli.streams import CONTROLS
from stagegraph.errors import PlanError

DEFAULT_FILE = "pipeline.yaml"


def add_file(parser: argparse.ArgumentParser, *, settings: bool = True) -> None:
    """Add the pipeline file and, unless no variable counts for the verb, ``--set``."""
    parser.add_argument("file", nargs="?", metavar="FILE", help=f"pipeline file (default: the nearest {DEFAULT_FILE})")
    if settings:
        add_set(parser)
    else:
        parser.set_defaults(overrides=[])


def locate() -> str:
    """Return the pipeline file of the working directory: the nearest one, here or in a folder above."""
    here = Path.cwd()
    found = next((folder for folder in (here, *here.parents) if (folder / DEFAULT_FILE).is_file()), here)
    return os.path.relpath(found / DEFAULT_FILE)


def add_set(parser: argparse.ArgumentParser) -> None:
    """Add ``--set``."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="NAME=VALUE",
        help="a variable for this command, or STAGE.PARAMETER=VALUE",
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add ``--json``."""
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout")


def add_selection(parser: argparse.ArgumentParser) -> None:
    """Add the options that select nodes by name or pattern."""
    for option, target, help_ in (
        ("--stage", "stage", "nodes and what they need, as graph-build.*.decode"),
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


def date_text(stamp: str) -> str:
    """Return a time of a record for people: ``2026-11-30 11:39``, in UTC as it is; "-" where there is none."""
    return stamp[:16].replace("T", " ") or "-"


def shown(path: Path) -> str:
    """Return a path as people want it: relative where it lies below the current directory."""
    try:
        return str(path.absolute().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def write_text(file: Path, text: str) -> None:
    """Write a file that the user named, and say so; :class:`PlanError` where that is impossible."""
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise PlanError(f"{file}: {error.strerror}; name a file that can be written") from None
    print(f"wrote {shown(file)}")


def print_json(document: Any) -> None:
    """Print one machine-readable document on stdout."""
    import json

    text = json.dumps(document, indent=1, ensure_ascii=False)
    print(CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text))
