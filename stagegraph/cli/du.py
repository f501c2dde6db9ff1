"""``pipeline du``: disk usage of the store per node, each object counted once, and what gc would free."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from stagegraph.api import Pipeline
from stagegraph.cli.common import add_file, add_json, print_json, size_text
from stagegraph.cli.layout import table

if TYPE_CHECKING:
    from stagegraph.query.contents import Usage

EXAMPLE = "pipeline du --json"
KINDS = {
    "result": "earlier results",
    "other": "other results of a key",
    "part": "memoised parts",
    "object": "named by nothing",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_file(parser, settings=False)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Run the verb."""
    from stagegraph.query.contents import look, usage
    from stagegraph.query.gc import KEEP_RUNS, collect
    from stagegraph.query.needs import needs
    from stagegraph.store.leftovers import disk_bytes

    with Pipeline(args.file, args.overrides) as pipeline:
        workspace = pipeline.workspace
        contents = look(workspace)
        disk, copies = disk_bytes(workspace)
        needed = needs(pipeline)
        sweep = collect(workspace, needed, keep_runs=KEEP_RUNS, max_size=None, dry_run=True, contents=contents)
        found = usage(contents)
    rows = _rows(found)
    if args.json:
        entries = [{"what": what, "count": count, "bytes": size} for what, count, size in rows]
        sums = {"bytes": contents.total, "disk_bytes": disk, "gc_frees": sweep.freed}
        print_json({**sums, "entries": entries})
        return 0
    cells = [(what, str(count or "-"), size_text(size)) for what, count, size in rows]
    print(table(("what", "files", "size"), cells, flexible=0))
    print(f"\n{size_text(disk)} on disk, {size_text(copies)} of it copies that artifacts/ shows")
    print(f"{size_text(contents.total)} of objects; `pipeline gc` would free {size_text(sweep.freed)}")
    return 0


def _rows(found: Usage) -> list[tuple[str, int, int]]:
    """Return (what, files, bytes): current results largest first, the rest by kind.

    What several results share counts once, in the largest of them.
    """
    from stagegraph.store.record import record_files

    seen: set[str] = set()

    def row(what: str, digests: set[str]) -> tuple[str, int, int]:
        fresh = digests - seen
        seen.update(fresh)
        return what, len(fresh), found.size(fresh)

    current = {name: {digest for digest, _ in record_files(r).values()} for name, r in found.current.items()}
    ordered = sorted(current, key=lambda name: -found.size(current[name]))
    rows = sorted((row(name, current[name]) for name in ordered), key=lambda counted: -counted[2])
    for kind, what in KINDS.items():
        rows.append(row(what, set().union(*(item.digests for item in found.others if item.kind == kind))))
    rows += [(f".stagegraph/{name}", 0, size) for name, size in found.contents.folders.items() if size]
    return [(what, count, size) for what, count, size in rows if size]
