"""``pipeline log NODE``: what a node prints as it runs, or printed when it last ran or failed."""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING

from stagegraph.api import Pipeline
from stagegraph.cli.common import add_file, shown
from stagegraph.errors import PlanError

if TYPE_CHECKING:
    from pathlib import Path

    from stagegraph.workspace import Workspace

EXAMPLE = "pipeline log 'compile[cuda]' --follow"
POLL_SECONDS = 0.2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("node", metavar="NODE", help="a node's name, as graph-build[llvm,decode]")
    add_file(parser)
    parser.add_argument("-f", "--follow", action="store_true", help="of one node that runs: print on until it ends")


def run(args: argparse.Namespace) -> int:
    """Run the verb."""
    with Pipeline(args.file, args.overrides) as pipeline:
        nodes = pipeline.dag.select(args.node)
        if args.follow and len(nodes) > 1:
            raise PlanError(f"--follow follows one node: name one of {', '.join(node.name for node in nodes)}")
        unrun: list[str] = []
        for node in nodes:
            kind, key = _latest(pipeline.workspace, pipeline.workspace.last(pipeline.name, node.name))
            path = pipeline.workspace.log_path(key) if key else None
            if path is None or not path.exists():
                unrun.append(f"{node.name} has no log yet: it has never run")
                continue
            said = path.read_bytes()
            nothing = "" if said or kind == "running" else "\n(it printed nothing)"
            print(f"==> {node.name} ({kind}; {shown(path)}){nothing}", flush=True)
            _write(said)
            if args.follow and kind == "running":
                _follow(pipeline.workspace, key, path, len(said))
        if unrun:
            raise PlanError(*unrun)
    return 0


def _latest(workspace: Workspace, last: dict[str, str]) -> tuple[str, str]:
    """Return how the last execution stands, and its key."""
    running = last.get("running", "")
    if running and workspace.is_running(running):
        return "running", running
    return ("failed", last["failed"]) if last.get("failed") else ("finished", last.get("key", ""))


def _follow(workspace: Workspace, key: str, path: Path, position: int) -> None:
    """Print what is added to a log until the execution ends."""
    running = True
    while running:
        time.sleep(POLL_SECONDS)
        running = workspace.is_running(key)
        with path.open("rb") as file:
            file.seek(position)
            added = file.read()
        position += len(added)
        _write(added)


def _write(said: bytes) -> None:
    sys.stdout.buffer.write(said)
    sys.stdout.buffer.flush()
