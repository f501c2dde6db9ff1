"""``pipeline gc``: remove earlier results from the store; never what ``artifacts/`` shows or a run under way needs."""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from typing import TYPE_CHECKING

from stagegraph.api import Pipeline
from stagegraph.cli.common import add_file, add_json, print_json, size_text
from stagegraph.cli.layout import table
from stagegraph.errors import EXIT_OK, PlanError

if TYPE_CHECKING:
    from stagegraph.query.contents import Sweep

EXAMPLE = "pipeline gc --keep-runs 5 --max-size 50GB --dry-run"
UNITS = {"B": 1} | {f"{p}B": 1000**i for i, p in enumerate("kMGT", 1)}
UNITS |= {f"{p}iB": 1024**i for i, p in enumerate("KMGT", 1)} | {"KB": 1000}
PLURAL = {
    "result": "earlier results",
    "other": "other results of a key",
    "part": "memoised parts",
    "object": "objects that nothing names",
}
PLURAL["leftover"] = "things left behind"
LISTED = 40  # what goes, for people


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_file(parser)
    add = parser.add_argument
    add("--keep-runs", type=int, default=10, metavar="N", help="keep the results of the last N runs (default: 10)")
    add("--max-size", metavar="SIZE", help="then remove the oldest until the store is within this size: 50GB, 20GiB")
    add("-y", "--yes", action="store_true", help="do not ask for confirmation (without a terminal gc never does)")
    add("--dry-run", action="store_true", help="list what would be removed, and remove nothing")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Run the verb."""
    limit = _bytes(args.max_size) if args.max_size is not None else None
    if args.keep_runs < 0:
        raise PlanError(f"--keep-runs {args.keep_runs}: expected 0 or more")
    what = {"keep_runs": args.keep_runs, "max_size": limit}
    asks = not (args.yes or args.json or args.dry_run) and sys.stdin.isatty() and sys.stdout.isatty()
    with Pipeline(args.file, args.overrides) as pipeline:
        sweep = pipeline.gc(**what, dry_run=args.dry_run or asks)
        if args.json:
            print_json({"dry_run": args.dry_run, **sweep.document()})
            return EXIT_OK
        _print(sweep)
        if asks and sweep.items:
            if input(f"remove {_counted(sweep)}, {size_text(sweep.freed)}? [y/N] ").strip().lower() not in {"y", "yes"}:
                print("nothing was removed")
                return EXIT_OK
            sweep = pipeline.gc(**what, agreed=sweep)
    verb = "would remove" if args.dry_run else "removed"
    print(f"{verb} {_counted(sweep)}: {size_text(sweep.freed)}; {size_text(sweep.left)} are left")
    for note in sweep.notes:
        print(note)
    return EXIT_OK


def _print(sweep: Sweep) -> None:
    """List what goes: the node or what else it is, its size and when it was made."""
    rows = [
        (item.what, size_text(size), item.when or "-", item.name.removeprefix("part:")[:16])
        for item, size in zip(sweep.items, sweep.sizes, strict=True)
        if item.kind != "leftover"
    ]
    if rows:
        print(table(("what", "frees", "made", "key"), rows[:LISTED], flexible=0))
    if len(rows) > LISTED:
        print(f"and {len(rows) - LISTED} more; --json lists all")


def _counted(sweep: Sweep) -> str:
    counts = Counter(item.kind for item in sweep.items)
    return ", ".join(f"{count} {PLURAL[kind]}" for kind, count in counts.items()) or "nothing"


def _bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]+)", text)
    if found is None or found[2] not in UNITS:
        raise PlanError(f"--max-size {text}: expected a size with its unit, such as 50GB, 20GiB or 500MB")
    return int(float(found[1]) * UNITS[found[2]])
