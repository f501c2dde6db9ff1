"""``pipeline log NODE``: what a node printed when it last ran, or when it last failed."""

from __future__ import annotations

import argparse
import sys

from stagegraph.api import Pipeline
from stagegraph.cli.common import add_file, shown
from stagegraph.errors import PlanError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("node", metavar="NODE", help="a node's name, as graph-build[llvm,decode]")
    add_file(parser)


def run(args: argparse.Namespace) -> int:
    """Run the verb."""
    with Pipeline(args.file, args.overrides) as work:
        unrun: list[str] = []
        for node in work.dag.select(args.node):
            last = work.workspace.last(work.name, node.name)
            key = last.get("failed") or last.get("key")
            path = work.workspace.log_path(key) if key else None
            if path is None or not path.exists():
                unrun.append(f"{node.name} has no log yet: it has never run")
                continue
            said = path.read_bytes()
            kind = "failed" if last.get("failed") else "finished"
            print(f"==> {node.name} ({kind}; {shown(path)})" + ("" if said else "\n(it printed nothing)"), flush=True)
            sys.stdout.buffer.write(said)
            sys.stdout.buffer.flush()
        if unrun:
            raise PlanError(*unrun)
    return 0
