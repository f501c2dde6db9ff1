"""``pipeline gc``: remove earlier results from the store; never what ``artifacts/`` shows or a run under way needs."""

from __future__ import annotations

import argparse
import re
from collections import Counter

from stagegraph.api import Pipeline
from stagegraph.cli.common import add_file, add_json, print_json, size_text
from stagegraph.errors import PlanError

EXAMPLE = "pipeline gc --keep-runs 5 --max-size 50GB --dry-run"
UNITS = {"": 1, "B": 1} | {f"{p}B": 1000**i for i, p in enumerate("kMGT", 1)}
UNITS |= {f"{p}iB": 1024**i for i, p in enumerate("KMGT", 1)} | {"KB": 1000}
PLURAL = {"result": "earlier results", "part": "memoised parts", "object": "objects that nothing names"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_file(parser)
    add = parser.add_argument
    add("--keep-runs", type=int, default=10, metavar="N", help="keep the results of the last N runs (default: 10)")
    add("--max-size", metavar="SIZE", help="then remove the oldest until the store is no larger, as 50GB or 20GiB")
    add("--dry-run", action="store_true", help="say what would go, and remove nothing")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Run the verb."""
    limit = _bytes(args.max_size) if args.max_size is not None else None
    if args.keep_runs < 0:
        raise PlanError(f"--keep-runs {args.keep_runs}: expected 0 or more")
    with Pipeline(args.file, args.overrides) as pipeline:
        sweep = pipeline.gc(keep_runs=args.keep_runs, max_size=limit, dry_run=args.dry_run)
    if args.json:
        print_json({"dry_run": args.dry_run, **sweep.document()})
        return 0
    if args.dry_run:
        for item in sweep.items:
            print(f"{item.kind:<7} {item.name.removeprefix('part:')[:16]}  {item.when or '-':<20}  {item.what}")
    counts = Counter(item.kind for item in sweep.items)
    what = ", ".join(f"{count} {PLURAL[kind]}" for kind, count in counts.items()) or "nothing"
    said = "would remove" if args.dry_run else "removed"
    print(f"{said} {what}: {size_text(sweep.freed)}; {size_text(sweep.left)} are left")
    for note in sweep.notes:
        print(note)
    return 0


def _bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]*)", text)
    if found is None or found[2] not in UNITS:
        raise PlanError(f"--max-size {text}: expected a size such as 50GB, 20GiB or a number of bytes")
    return int(float(found[1]) * UNITS[found[2]])
