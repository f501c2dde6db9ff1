"""``pipeline runs``: lists recorded runs, newest first; with a run's id, the outcome of each node and its reason."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import asdict
from typing import TYPE_CHECKING

from stagegraph.api import Pipeline
from stagegraph.cli.common import (
    DEFAULT_FILE,
    add_file,
    add_json,
    age_text,
    date_text,
    print_json,
    seconds_text,
    size_text,
)
from stagegraph.cli.layout import Brief, prose, table, terminal_width
from stagegraph.cli.streams import hanging
from stagegraph.errors import PlanError
from stagegraph.query.history import find_run
from stagegraph.store.journal import EXECUTED, FAILED

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stagegraph.query.history import PastRun

EXAMPLE = "pipeline runs --run @~0"
WIDE = 100  # columns that a table with dates takes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_file(parser, settings=False)
    parser.add_argument("--run", metavar="RUN", help="one run: digits of its id, @~N, its tag or a date")
    parser.add_argument("-n", type=int, default=20, metavar="N", help="how many to list (default: 20)")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Run the verb."""
    if args.n < 1:
        raise PlanError(f"-n {args.n}: expected at least 1")
    with Pipeline(args.file, args.overrides) as pipeline:
        runs = pipeline.runs()
        chosen = [runs[find_run(runs, args.run)]] if args.run else runs[::-1][: args.n]
        if args.json:
            print_json({"pipeline": pipeline.name, "runs": [asdict(run) for run in chosen]})
        elif args.run:
            print(_page(chosen[0]))
        elif not chosen:
            print("no run has executed anything yet")
        else:
            _print(chosen)
    return 0


def _print(runs: Sequence[PastRun]) -> None:
    """Print a row for each run; its date goes where the command would have no room, its age stays."""
    header = ["run", "state", "command", "ran", "failed", "time", "started", "", "tag"]
    rows = [dict(zip(header, _row(run), strict=True)) for run in runs]
    left_out = set() if any(run.tag for run in runs) else {"tag"}
    left_out |= {"started"} if terminal_width() < WIDE else set()
    columns = [name for name in header if name not in left_out]
    print(table(columns, [[row[name] for name in columns] for row in rows], flexible=2))


def _row(run: PastRun) -> tuple[str, ...]:
    ran, failed = run.count(*EXECUTED), run.count(FAILED)
    started = date_text(run.started)
    age = age_text(run.started) if run.started else "-"
    command = Brief(_command(run, but=DEFAULT_FILE))
    return (
        run.id[:8],
        run.state,
        command,
        str(ran),
        str(failed or "-"),
        seconds_text(run.seconds),
        started,
        age,
        run.tag,
    )


def _command(run: PastRun, but: str = "") -> str:
    return shlex.join(word for word in run.command if word != but) or "(Python)"


def _page(run: PastRun) -> str:
    rows = [
        (n["node"], n["outcome"], n["reason"], seconds_text(n["seconds"]), size_text(n["bytes"]), n["key"][:12])
        for n in run.nodes
    ]
    head = f"run {run.id[:8]}  {run.state}  {run.started}  {seconds_text(run.seconds)}  pipeline {_command(run)}"
    problems = [f"error: {n['node']}: {hanging(problem)}" for n in run.nodes for problem in n["problems"]]
    return "\n".join(
        [prose(head), table(("node", "outcome", "reason", "time", "size", "key"), rows, flexible=2), *problems]
    )
