"""``pipeline status``: lists each node as up to date, stale (and why), never built, or unknown below a stale one."""

from __future__ import annotations

import argparse

from stagegraph.api import Pipeline
from stagegraph.cli.common import add_file, add_json, print_json
from stagegraph.cli.plan_table import plan_lines
from stagegraph.errors import EXIT_OK, EXIT_WORK_TO_DO

EXAMPLE = "pipeline status --check || echo 'there is work to do'"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_file(parser)
    parser.add_argument("--check", action="store_true", help="exit with 4 if a run would have work to do, else 0")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Run the verb."""
    with Pipeline(args.file, args.overrides) as pipeline:
        plan = pipeline.plan()
        if args.json:
            print_json({"pipeline": pipeline.name, "idle": plan.idle, **plan.document()})
        else:
            print("\n".join(plan_lines(plan, costs=True)))
    return EXIT_WORK_TO_DO if args.check and not plan.idle else EXIT_OK
