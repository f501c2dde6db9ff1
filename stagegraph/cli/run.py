"""``pipeline run``: bring the pipeline, or a selection of its nodes, up to date."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from stagegraph.cli.common import Opened, add_file, opened, print_json, seconds_text, shown, size_text, table
from stagegraph.cli.report import reporter_for
from stagegraph.errors import EXIT_NODE_FAILED, EXIT_OK, PlanError
from stagegraph.plan import HIT, UNKNOWN, Decision
from stagegraph.workspace import parts_text, record_size

if TYPE_CHECKING:
    from stagegraph.dag import Node
    from stagegraph.scheduler import Outcome


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_file(parser)
    parser.add_argument(
        "--stage",
        action="append",
        default=[],
        metavar="NAME",
        help="only these nodes and what they need; repeatable, patterns as graph-build[*,decode]",
    )
    parser.add_argument(
        "--from",
        action="append",
        default=[],
        dest="start",
        metavar="NAME",
        help="these nodes and everything below them (and what they need)",
    )
    parser.add_argument(
        "--only",
        action="store_true",
        help="run nothing but the selected nodes; refuse if something they need is not up to date",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="run the selected nodes even if they are hits, and say whether the result is identical",
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would run and why, and run nothing")
    parser.add_argument("--fail-fast", action="store_true", help="start nothing more after the first failure")
    parser.add_argument(
        "-j", "--jobs", type=int, metavar="N", help="how many nodes at once (default: one per processor)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout")


def run(args: argparse.Namespace) -> int:
    """Run the verb."""
    began = time.monotonic()
    if args.jobs is not None and args.jobs < 1:
        raise PlanError(f"-j {args.jobs}: the number of jobs must be at least 1")
    if args.only and not (args.stage or args.start):
        raise PlanError("--only needs a selection: add --stage NAME or --from NAME")
    with opened(args.file, args.overrides) as work:
        selected = _selected(work, args)
        nodes = [node for node in work.dag.nodes if node in work.dag.above(selected)]
        if args.only:
            _refuse_others(work, nodes, selected)
        if args.dry_run:
            return _dry_run(work, nodes, selected, args)
        outcomes = _execute(work, nodes, selected, args)
        seconds = time.monotonic() - began
        failed = any(outcome.record is None for outcome in outcomes)
        executed = [o for o in outcomes if o.outcome not in {HIT, "SKIPPED"}]
        if executed:
            work.workspace.journal.append(
                {
                    "pipeline": work.dag.pipeline.name,
                    "seconds": round(seconds, 3),
                    "nodes": [_document(o) for o in executed],
                }
            )
        if args.json:
            print_json(
                {
                    "pipeline": work.dag.pipeline.name,
                    "ok": not failed,
                    "seconds": round(seconds, 3),
                    "damaged": work.workspace.store.damaged,
                    "nodes": [_document(o) for o in outcomes],
                }
            )
        else:
            _print(work, outcomes, seconds)
    return EXIT_NODE_FAILED if failed else EXIT_OK


def _selected(work: Opened, args: argparse.Namespace) -> set[Node]:
    problems: list[str] = []
    chosen: set[Node] = set()
    for pattern, below in [(p, False) for p in args.stage] + [(p, True) for p in args.start]:
        try:
            found = work.dag.select(pattern)
            chosen |= work.dag.below(found) if below else set(found)
        except PlanError as error:
            problems += error.problems
    if problems:
        raise PlanError(*problems)
    return chosen if args.stage or args.start else set(work.dag.nodes)


def _refuse_others(work: Opened, nodes: Sequence[Node], selected: set[Node]) -> None:
    """Under ``--only`` every node that is needed but not selected must be up to date."""
    stale = [d for d in work.planner.plan(nodes) if d.node not in selected and d.status != HIT]
    if stale:
        advice = "--only does not run it; drop --only to bring it up to date"
        raise PlanError(*(f"{d.node.name} is {d.status.lower()} ({d.reason}) and {advice}" for d in stale))


def _dry_run(work: Opened, nodes: Sequence[Node], selected: set[Node], args: argparse.Namespace) -> int:
    decisions = work.planner.plan(nodes)
    if args.force:
        _mark_forced(decisions, selected)
    if args.json:
        print_json(
            {
                "pipeline": work.dag.pipeline.name,
                "nodes": [{"node": d.node.name, "status": d.status, "reasons": d.reasons} for d in decisions],
            }
        )
        return EXIT_OK
    print(table(("node", "status", "reason"), [(d.node.name, d.status, d.reason) for d in decisions], flexible=2))
    count = sum(d.status not in {HIT, UNKNOWN} for d in decisions)
    unknown = sum(d.status == UNKNOWN for d in decisions)
    print(
        f"\nwould run {count} of {len(decisions)} nodes"
        + (f", and up to {unknown} below them" if unknown else "")
        + "; nothing was run"
    )
    return EXIT_OK


def _mark_forced(decisions: Iterable[Decision], selected: set[Node]) -> None:
    for decision in decisions:
        if decision.status == HIT and decision.node in selected:
            decision.status, decision.reasons = "STALE", ["forced"]


def _execute(work: Opened, nodes: Sequence[Node], selected: set[Node], args: argparse.Namespace) -> list[Outcome]:
    from stagegraph.scheduler import Options, Scheduler

    force = frozenset(node.name for node in selected) if args.force else frozenset()
    options = Options(jobs=args.jobs or 0, force=force, fail_fast=args.fail_fast)
    if work.workspace.index.set_aside:
        aside = work.workspace.index.set_aside
        print(f"warning: the index could not be read; it was set aside as {aside} and is begun anew", file=sys.stderr)
    with reporter_for(len(nodes)) as reporter:
        return Scheduler(work.planner, work.workspace, reporter, options).run(nodes)


def _document(outcome: Outcome) -> dict[str, Any]:
    record = outcome.record or {}
    return {
        "node": outcome.node.name,
        "outcome": outcome.outcome,
        "reason": outcome.reason,
        "key": outcome.key,
        "seconds": outcome.seconds,
        "bytes": record_size(record) if record else 0,
        "peak_bytes": record.get("peak_bytes", 0),
        "summary": record.get("summary", ""),
        "parts": record.get("parts", {}),
        "warnings": record.get("warnings", []),
        "problems": list(outcome.problems),
        "log": str(outcome.log) if outcome.log else None,
    }


def _print(work: Opened, outcomes: Sequence[Outcome], seconds: float) -> None:
    rows = [
        (
            o.node.name,
            o.outcome,
            _why(o),
            seconds_text(o.seconds) if o.seconds else "-",
            size_text(record_size(o.record)) if o.record else "-",
        )
        for o in outcomes
    ]
    print(table(("node", "outcome", "reason", "time", "size"), rows, flexible=2))
    for o in outcomes:
        for warning in (o.record or {}).get("warnings", []):
            print(f"warning: {o.node.name}: {warning}")
    for digest in work.workspace.store.damaged:
        where = work.workspace.store.quarantine
        print(f"warning: stored object {digest[:16]} was damaged and moved to {shown(where)}; what needs it is rebuilt")
    counts = {
        kind: sum(o.outcome == kind for o in outcomes) for kind in ("BUILT", "UNCHANGED", HIT, "FAILED", "SKIPPED")
    }
    print("\n" + ", ".join(f"{n} {kind}" for kind, n in counts.items() if n) + f" in {seconds_text(seconds)}")
    for o in outcomes:
        if o.outcome == "FAILED":
            _print_failure(o)


def _why(outcome: Outcome) -> str:
    """Return a node's reason or, without one, what came out; with the parts it made and reused if it ran."""
    record = outcome.record or {}
    said = [outcome.reason or record.get("summary", ""), parts_text(record) if outcome.outcome != HIT else ""]
    return "; ".join(filter(None, said))


def _print_failure(outcome: Outcome) -> None:
    sys.stdout.flush()
    lines = [f"error: {outcome.node.name}: {problem}" for problem in outcome.problems]
    if outcome.bug:
        lines.append("  this is a bug of the stage, not of your input; the log has the traceback")
    lines.append(f"  log:  pipeline log '{outcome.node.name}'")
    if outcome.kept:
        lines.append(f"  kept: {shown(outcome.kept)}/out")
    print("\n".join(lines), file=sys.stderr)
