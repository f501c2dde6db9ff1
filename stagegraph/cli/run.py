"""``pipeline run``: bring the pipeline, or a selection of its nodes, up to date."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from stagegraph.api import Pipeline
from stagegraph.cli.common import add_file, add_selection, print_json
from stagegraph.cli.live import watching
from stagegraph.cli.summary import print_failure, print_summary
from stagegraph.errors import EXIT_NODE_FAILED, EXIT_OK, PlanError
from stagegraph.files import dotted
from stagegraph.remote import EXECUTORS
from stagegraph.store.journal import FAILED, TAG

if TYPE_CHECKING:
    from stagegraph.execution.outcome import Run
    from stagegraph.project import Selection
    from stagegraph.query.reproduce import Reproduction

EXAMPLE = "pipeline run --stage 'graph-build.*.decode' --set vars.scheme=q0f32"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_file(parser)
    add_selection(parser)
    add = parser.add_argument
    add("--only", action="store_true", help="run only these nodes; refuse if inputs are out of date")
    add("--force", action="store_true", help="run even if up to date; say if the result is identical")
    add(
        "--check-reproducible",
        action="store_true",
        help="build it twice from scratch, report differences",
    )
    add("--dry-run", action="store_true", help="print what would run, why and for how long; run nothing")
    add(
        "--debug",
        metavar="NODE",
        help="run this node in this process, for breakpoints and tracebacks; stores no result",
    )
    add("--fail-fast", action="store_true", help="start no further node after the first failure")
    add("--retries", type=int, default=0, metavar="N", help="try a failed node again, up to N times")
    add("-j", "--jobs", type=int, metavar="N", help="how many nodes at once (default: one per processor)")
    add("--executor", choices=EXECUTORS, default="", help="where nodes run (default: as configured, else local)")
    add("--scheduler", default="", metavar="URL", help="the scheduler's address for --executor dask: tls://HOST:PORT")
    add("--tag", default="", metavar="NAME", help="name this run, so that NODE@NAME is its result")
    add("-v", "--verbose", action="store_true", help="list every node, and what each reused")
    add("-q", "--quiet", action="store_true", help="print problems only")
    add("--json", action="store_true", help="print one JSON document on stdout")


def run(args: argparse.Namespace) -> int:
    """Run the verb."""
    _check(args)
    with Pipeline(args.file, args.overrides) as pipeline:
        if args.debug is not None:
            from stagegraph.cli.debug import debug

            return debug(pipeline, args.debug)
        selection = pipeline.select(stage=args.stage, start=args.start, until=args.until)
        if args.dry_run:
            return _dry_run(pipeline, selection, args)
        done = _execute(pipeline, selection, args)
        again = _build_again(pipeline, selection, args) if done.ok and args.check_reproducible else None
        if args.json:
            from stagegraph.query.history import outcome_document

            print_json(
                {
                    "pipeline": pipeline.name,
                    "ok": done.ok,
                    "seconds": done.seconds,
                    "damaged": pipeline.workspace.store.damaged,
                    "nodes": [outcome_document(o) for o in done.outcomes],
                    **({"reproduction": again.document()} if again else {}),
                }
            )
        else:
            if not args.quiet:
                print_summary(pipeline, done, verbose=args.verbose)
            for outcome in done.outcomes:
                if outcome.status == FAILED:
                    print_failure(outcome)
            if again:
                _print_reproduction(again)
        if not done.ok:
            _print_resume(done, args)
    return EXIT_OK if done.ok and (again is None or again.ok) else EXIT_NODE_FAILED


def _check(args: argparse.Namespace) -> None:
    """Refuse options that contradict each other, before any file is read."""
    if args.jobs is not None and args.jobs < 1:
        raise PlanError(f"-j {args.jobs}: the number of jobs must be at least 1")
    if args.retries < 0:
        raise PlanError(f"--retries {args.retries}: the number of retries must be at least 0")
    if args.tag and not TAG.fullmatch(args.tag):
        raise PlanError(f"--tag {args.tag}: expected a letter, then letters, digits, '.', '_' and '-'")
    if args.debug is not None and (
        args.stage or args.start or args.until or args.dry_run or args.check_reproducible or args.json
    ):
        raise PlanError("--debug runs one node and what it needs; leave selections, --dry-run and --json out")
    if args.dry_run and args.check_reproducible:
        raise PlanError("--check-reproducible builds everything twice, --dry-run nothing: use one of them")
    if args.only and not (args.stage or args.start or args.until):
        raise PlanError("--only needs a selection: add --stage NAME, --from NAME or --until NAME")


def _dry_run(pipeline: Pipeline, selection: Selection, args: argparse.Namespace) -> int:
    from stagegraph.cli.plan_table import plan_lines

    plan = pipeline.plan(selection, force=args.force, jobs=args.jobs or 0)
    if args.json:
        print_json({"pipeline": pipeline.name, **plan.document()})
    else:
        print("\n".join(plan_lines(plan, costs=False)))
    return EXIT_OK


def _execute(pipeline: Pipeline, selection: Selection, args: argparse.Namespace) -> Run:
    with watching(pipeline, selection.nodes, jobs=args.jobs or 0, quiet=args.quiet) as reporter:
        return pipeline.run(
            selection,
            only=args.only,
            force=args.force,
            jobs=args.jobs or 0,
            fail_fast=args.fail_fast,
            retries=args.retries,
            executor=args.executor,
            scheduler=args.scheduler,
            reporter=reporter,
            command=_arguments(args),
            tag=args.tag,
        )


def _build_again(pipeline: Pipeline, selection: Selection, args: argparse.Namespace) -> Reproduction:
    with watching(pipeline, selection.nodes, jobs=args.jobs or 0, quiet=args.quiet) as reporter:
        return pipeline.reproduce(selection, jobs=args.jobs or 0, reporter=reporter)


def _print_reproduction(again: Reproduction) -> None:
    from stagegraph.cli.diff import difference_lines

    for difference in again.differing:
        print("\n".join(["", *difference_lines(difference)]))
    for outcome in again.failed:
        problems = outcome.problems or (outcome.reason,)
        print(f"error: {outcome.node.name}: built once, and not again: {'; '.join(problems)}", file=sys.stderr)
    counts = (
        (again.same, "the same, byte for byte"),
        (len(again.differing), "different"),
        (again.measured, "measured again"),
        (len(again.failed), "failed"),
    )
    print("\nbuilt again from nothing: " + ", ".join(f"{count} {how}" for count, how in counts if count))


def _print_resume(done: Run, args: argparse.Namespace) -> None:
    """Print the command that resumes the run: the same one, with ``--force`` only for nodes that are not done."""
    import shlex

    left = [dotted(o.node.name) for o in done.outcomes if o.record is None] if args.force else None
    print(f"resume: {shlex.join(['pipeline', *_arguments(args, left)])}", file=sys.stderr)


def _arguments(args: argparse.Namespace, stage: list[str] | None = None) -> list[str]:
    """Return the command line that selects the same, or the nodes named by ``stage``."""
    words = ["run", args.file]
    chosen = (("--stage", args.stage), ("--from", args.start), ("--until", args.until))
    for option, names in chosen if stage is None else (("--stage", stage),):
        words += [word for name in names for word in (option, name)]
    words += [f"--{flag.replace('_', '-')}" for flag in ("only", "force", "fail_fast") if getattr(args, flag)]
    words += ["--retries", str(args.retries)] if args.retries else []
    words += ["-j", str(args.jobs)] if args.jobs else []
    words += ["--executor", args.executor] if args.executor else []
    words += ["--scheduler", args.scheduler] if args.scheduler else []
    words += ["--tag", args.tag] if args.tag else []
    return words + [word for setting in args.overrides for word in ("--set", setting)]
