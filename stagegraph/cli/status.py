"""``pipeline status``: every node: up to date, stale and why, never built, or unknown below a stale one."""

from __future__ import annotations

import argparse

from stagegraph.cli.common import add_file, opened, print_json, seconds_text, size_text, table
from stagegraph.errors import EXIT_OK, EXIT_WORK_TO_DO
from stagegraph.plan import HIT
from stagegraph.workspace import record_size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_file(parser)
    parser.add_argument("--check", action="store_true", help="exit with 4 if a run would have work to do")
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout")


def run(args: argparse.Namespace) -> int:
    """Run the verb."""
    with opened(args.file, args.overrides) as work:
        decisions = work.planner.plan(work.dag.nodes)
        name = work.dag.pipeline.name
        rows = []
        for d in decisions:
            record = d.record or d.previous or work.workspace.last_record(name, d.node.name)
            if d.record and not work.workspace.is_shown(name, d.node.name, d.key, d.record):
                d.reasons = ["a run restores its files under artifacts/"]
            rows.append((d, record))
        if args.json:
            print_json({
                "pipeline": name,
                "nodes": [
                    {
                        "node": d.node.name,
                        "status": d.status,
                        "reasons": d.reasons,
                        "key": d.key,
                        "seconds": r["seconds"] if r else None,
                        "bytes": record_size(r) if r else None,
                        "peak_bytes": r["peak_bytes"] if r else None,
                    }
                    for d, r in rows
                ],
            })  # fmt: skip
        else:
            cells = [
                (
                    d.node.name,
                    d.status,
                    d.reason or (r or {}).get("summary", ""),
                    seconds_text(r["seconds"]) if r else "-",
                    size_text(record_size(r)) if r else "-",
                    size_text(r["peak_bytes"]) if r else "-",
                )
                for d, r in rows
            ]
            print(table(("node", "status", "reason", "time", "size", "memory"), cells, flexible=2))
        to_do = sum(d.status != HIT or bool(d.reasons) for d in decisions)
    return EXIT_WORK_TO_DO if args.check and to_do else EXIT_OK
