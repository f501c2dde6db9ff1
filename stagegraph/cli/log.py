"""``pipeline log NODE``: shows what a node prints while it runs, or printed when it last ran or failed."""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING

from stagegraph.api import Pipeline
from stagegraph.cli.common import add_file, add_json, print_json, shown
from stagegraph.cli.streams import visible
from stagegraph.errors import PlanError
from stagegraph.query.artifact import tell_behind
from stagegraph.store.journal import EXECUTED, FAILED

if TYPE_CHECKING:
    from pathlib import Path

    from stagegraph.planning.dag import Node
    from stagegraph.store.workspace import Workspace

EXAMPLE = "pipeline log compile.cuda --follow"
POLL_SECONDS = 0.2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("node", metavar="NODE", help="a node, or NODE@RUN for its log as of a run")
    add_file(parser)
    parser.add_argument("-f", "--follow", action="store_true", help="follow the log of a running node until it ends")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Run the verb."""
    with Pipeline(args.file, args.overrides) as pipeline:
        name, _, past = args.node.partition("@")
        nodes = pipeline.dag.select(name)
        if past and (args.follow or pipeline.varied):
            raise PlanError(f"{args.node} is a past log, whatever runs now or --set says; leave one of the two out")
        if args.follow and len(nodes) > 1:
            raise PlanError(f"--follow follows one node: name one of {', '.join(node.name for node in nodes)}")
        unrun: list[str] = []
        logs: list[dict[str, str]] = []
        for node in nodes:
            kind, key = _as_of(pipeline, node, past) if past else _latest(pipeline, node)
            path = pipeline.workspace.log_path(key) if key else None
            if path is None or not path.exists():
                reason = "no log with these settings" if pipeline.varied else "no log yet: it has never run"
                reason = f"no log as of run {past}" if past else reason
                unrun.append(f"{node.name} has {reason}")
                continue
            text = path.read_bytes()
            if args.json:
                logs.append({"node": node.name, "state": kind, "log": str(path), "text": text.decode(errors="replace")})
                continue
            nothing = "" if text or kind == "running" else "\n(it printed nothing)"
            print(f"==> {node.name} ({kind}; {shown(path)}){nothing}", flush=True)
            _write(text)
            if args.follow and kind == "running":
                _follow(pipeline.workspace, key, path, len(text))
        if args.json and logs:
            print_json({"pipeline": pipeline.name, "logs": logs})
        if unrun and not (args.json and logs):
            raise PlanError(*unrun)
    return 0


def _as_of(pipeline: Pipeline, node: Node, past: str) -> tuple[str, str]:
    """Return how an execution ended by a run, and its key."""
    from stagegraph.query.history import find_run

    runs = pipeline.runs()
    for run in reversed(runs[: find_run(runs, past) + 1]):
        for entry in run.nodes:
            if entry["node"] == node.name and entry["outcome"] in {*EXECUTED, FAILED}:
                return f"{entry['outcome']} in run {run.id[:8]}", str(entry["key"])
    return "", ""


def _latest(pipeline: Pipeline, node: Node) -> tuple[str, str]:
    """Return the state of what runs, or failed last, or else of the result that a node's name means, and its key; with
    ``--set``, of the key under these settings.
    """
    last = pipeline.workspace.last(pipeline.name, node.name)
    running = last.get("running", "")
    wanted = pipeline.key(node) or "" if pipeline.varied else ""
    if running and wanted in {"", running} and pipeline.workspace.is_running(running):
        return "running", running
    if pipeline.varied:
        return ("finished" if pipeline.workspace.record(wanted) else "failed"), wanted
    if last.get("failed"):
        return "failed", last["failed"]
    tell_behind(pipeline, [node.name])
    return "finished", pipeline.key(node) or ""


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


def _write(data: bytes) -> None:
    if sys.stdout.isatty():
        print(visible(data.decode(errors="replace")), end="", flush=True)
    else:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
