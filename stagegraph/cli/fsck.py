"""``pipeline fsck``: read every object, record and part, and the index; set aside or name what is damaged."""

from __future__ import annotations

import argparse

from stagegraph.api import Pipeline
from stagegraph.cli.common import add_file, add_json, print_json, shown, size_text
from stagegraph.errors import EXIT_OK, EXIT_STORE, PipelineError
from stagegraph.store.journal import HIT
from stagegraph.store.record import record_files
from stagegraph.store.workspace import Workspace

EXAMPLE = "pipeline fsck --json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_file(parser, settings=False)
    add_json(parser)
    parser.add_argument("--repair", action="store_true", help="remove damaged records, and begin a damaged index anew")


def run(args: argparse.Namespace) -> int:
    """Run the verb."""
    with Pipeline(args.file, args.overrides) as work:
        workspace = work.workspace
        workspace.check_folders()
        checked = size = 0
        bad: dict[str, str] = {}
        for digest in list(workspace.store.digests()):
            wrong = workspace.store.check(digest)
            if wrong and wrong != "missing":  # gone since: `gc` removes objects meanwhile
                bad[digest] = wrong
            size += _size(workspace, digest)
            checked += 1
        with workspace.alone():
            missing = _missing(workspace)
            problems = _problems(workspace, repair=args.repair)
        notes = _refill(work) if workspace.index.set_aside else []
    if args.json:
        print_json(
            {
                "checked": checked,
                "bytes": size,
                "damaged": bad,
                "missing": missing,
                "problems": problems,
                "notes": notes,
            }
        )
    else:
        print(f"{checked} objects, {size_text(size)} read")
        for digest, wrong in bad.items():
            print(f"{wrong}: {digest} (moved to {shown(workspace.store.quarantine)})")
        for digest, name in missing.items():
            print(f"missing: {digest} ({name})")
        for problem in problems:
            print(problem)
        for note in notes:
            print(note)
        print(_advice(bool(bad or missing), bool(problems), repair=args.repair))
    return EXIT_STORE if bad or missing or problems else EXIT_OK


def _advice(lost: bool, damaged: bool, *, repair: bool) -> str:
    if damaged and not repair:
        return "`pipeline fsck --repair` mends the index and removes damaged records; the next run makes them again"
    return "the next `pipeline run` rebuilds what it needs of these" if lost or damaged else "all intact"


def _refill(work: Pipeline) -> list[str]:
    """Put into an index that was begun anew what can be found out at once; say what cannot, and what the next run does.

    Stats of sources are taken by the planning itself, and source texts of results that the pipeline has as it stands.
    """
    known = 0
    try:
        for decision in work.planner.plan(work.dag.nodes):
            if decision.status == HIT:
                work.planner.keep_code(decision)
                known += 1
    except PipelineError as error:
        return [
            f"the index is begun anew; the pipeline cannot be planned, so that nothing is put in: {error.problems[0]}"
        ]
    held = f"with the source texts behind {known} results as they stand"
    lost = "of earlier ones `explain` names modules that changed, and no functions"
    return [f"the index is begun anew, {held}: {lost}; the next run places artifacts/ again"]


def _size(workspace: Workspace, digest: str) -> int:
    try:
        return workspace.store.path(digest).stat().st_size
    except OSError:
        return 0


def _missing(workspace: Workspace) -> dict[str, str]:
    """Return the objects that records and parts name but the store lacks: digest -> what it was."""
    missing = {}
    for record in workspace.records():
        for file, (digest, _) in record_files(record).items():
            if not workspace.store.path(digest).exists():
                missing[digest] = f"{record['stage']}: {file}"
    for _, part in list(workspace.parts()):
        if not workspace.store.path(part["digest"]).exists():
            missing[part["digest"]] = f"memoised {part['kind']}"
    return missing


def _problems(workspace: Workspace, *, repair: bool) -> list[str]:
    """Return what is wrong with the documents; ``repair`` removes what cannot be believed."""
    index = workspace.index
    problem = index.problem()
    problems = [f"damaged: the index ({problem})"] if problem else []
    if problem and repair:
        index.begin_anew()
    for name in [*index.names("rec:"), *index.names("part:")]:
        document = workspace.record(name.removeprefix("rec:")) if name.startswith("rec:") else index.get(name)
        if document is None:
            problems.append(f"damaged: {'record' if name.startswith('rec:') else 'part'} {name.partition(':')[2]}")
            if repair:
                index.delete(name)
    if repair and workspace.root.is_dir():
        index.move_to_files()
    return problems
