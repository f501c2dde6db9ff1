"""``pipeline fsck``: read every object, record and part, and the index; set aside or name what is damaged."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Mapping
from itertools import chain

from stagegraph.api import Pipeline
from stagegraph.cli.common import add_file, add_json, print_json, shown, size_text
from stagegraph.errors import EXIT_OK, EXIT_STORE, PipelineError
from stagegraph.store.folders import stat_or_none
from stagegraph.store.journal import HIT
from stagegraph.store.memo import is_part
from stagegraph.store.record import record_files
from stagegraph.store.workspace import Workspace

EXAMPLE = "pipeline fsck --json"
SIZE = 2  # in a stat


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
        checked, size, bad = _check_objects(workspace)
        suspects = _suspects(workspace)  # runs go on meanwhile; they wait only while these are looked at again
        problem = workspace.index.problem()
        with workspace.alone():
            missing, problems = _confirmed(workspace, suspects, problem, repair=args.repair)
        notes = _refill(work) if workspace.index.set_aside else []
        notes += _edited_libraries(work)
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
    extent = f"with the source texts behind {known} results as they stand"
    lost = "of earlier ones `explain` names modules that changed, and no functions"
    return [f"the index is begun anew, {extent}: {lost}; the next run places artifacts/ again"]


def _edited_libraries(work: Pipeline) -> list[str]:
    """Say which results an edit of a library in place makes stale, which a run without news does not look for."""

    def current() -> set[str]:
        return {decision.node.name for decision in work.planner.plan(work.dag.nodes) if decision.status == HIT}

    try:
        before = current()
        stale = sorted(before - current()) if work.planner.sweep() else []
    except PipelineError:
        return []
    work.planner.save()
    return [f"a library was edited in place: the next `pipeline run` makes {', '.join(stale)} again"] if stale else []


def _check_objects(workspace: Workspace) -> tuple[int, int, dict[str, str]]:
    """Read every object; return how many there are, their bytes, and what is wrong: digest -> damaged, unreadable."""
    checked = size = 0
    bad: dict[str, str] = {}
    folder = ""
    for digest in workspace.store.digests():
        if digest[:2] != folder:
            folder = digest[:2]
            workspace.index.read_ahead(f"obj:{folder}")
        wrong = workspace.store.check(digest)
        if wrong and wrong != "missing":  # gone since: `gc` removes objects meanwhile
            bad[digest] = wrong
        size += (stat_or_none(workspace.store.file(digest)) or [0, 0, 0])[SIZE]
        checked += 1
    return checked, size, bad


def _objects(workspace: Workspace, name: str) -> dict[str, str] | None:
    """Return the objects that a record or part names: digest -> what it is; None for a document that is damaged."""
    if name.startswith("rec:"):
        record = workspace.record(name.removeprefix("rec:"))
        return record and {digest: f"{record['stage']}: {file}" for file, (digest, _) in record_files(record).items()}
    part = workspace.index.get(name)
    return {part["digest"]: f"memoised {part['kind']}"} if is_part(part) else None


def _suspects(workspace: Workspace) -> list[str]:
    """Return the names of the records and parts that are damaged, or have objects that the store lacks."""
    names = chain(workspace.index.names("rec:"), workspace.index.names("part:"))
    return [name for name in names if not _is_whole(workspace, _objects(workspace, name))]


def _is_whole(workspace: Workspace, objects: Mapping[str, str] | None) -> bool:
    return objects is not None and all(os.path.exists(workspace.store.file(d)) for d in objects)  # noqa: PTH110 - many


def _confirmed(
    workspace: Workspace, suspects: Iterable[str], problem: str | None, *, repair: bool
) -> tuple[dict[str, str], list[str]]:
    """Return the objects that are missing (digest -> what it was), and what is wrong with the documents.

    ``problem`` is that of the index. ``repair`` removes what cannot be believed.
    """
    index = workspace.index
    missing: dict[str, str] = {}
    problems = [f"damaged: the index ({problem})"] if problem else []
    if problem and repair:
        index.begin_anew()
    for name in suspects:
        objects = _objects(workspace, name)
        if objects is None and name not in index.damaged | index.files.damaged:  # gone since
            continue
        if objects is None:
            problems.append(f"damaged: {'record' if name.startswith('rec:') else 'part'} {name.partition(':')[2]}")
            if repair:
                index.delete(name)
        else:
            missing |= {d: what for d, what in objects.items() if not _is_whole(workspace, {d: what})}
    if repair and workspace.root.is_dir():
        index.move_to_files()
    return missing, problems
