"""``pipeline explain NODE``: traces what changed since the last result to its origin, or tells why nothing runs."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from stagegraph.api import Pipeline
from stagegraph.cli.common import add_file, add_json, print_json, seconds_text
from stagegraph.cli.pager import page
from stagegraph.planning.planner import UNKNOWN
from stagegraph.store.journal import HIT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stagegraph.query.explain import Cause, Explanation

EXAMPLE = "pipeline explain compile.cuda --diff"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("node", metavar="NODE", help="a node's name or pattern; a bare name means all instances")
    add_file(parser)
    parser.add_argument("--diff", action="store_true", help="print the changed lines of code")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Run the verb."""
    with Pipeline(args.file, args.overrides) as pipeline:
        found = pipeline.explain(args.node)
        if args.json:
            print_json({"pipeline": pipeline.name, "nodes": [explanation.document() for explanation in found]})
        else:
            page("\n\n".join("\n".join(_lines(explanation, diff=args.diff)) for explanation in found))
    return 0


def _lines(found: Explanation, *, diff: bool) -> Iterator[str]:
    d = found.decision
    yield f"{d.node.name}  {d.status}  {_headline(found)}"
    for note in found.notes:
        yield f"  {note}"
    for cause in found.causes:
        yield from _tree(cause, "  ", diff=diff)
    if found.cut_off:
        names = list(found.cut_off)
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        yield f"  early cutoff skipped {', '.join(names[:3])}{more}: {seconds_text(sum(found.cut_off.values()))}"


def _headline(found: Explanation) -> str:
    d = found.decision
    since = f"its result of {d.previous['started']}" if d.previous else ""
    if d.status == HIT:
        return f"nothing it depends on changed since {since}"
    if d.status == UNKNOWN:
        return "known only after what it reads has run:"
    return f"changed since {since}:" if since else "it has no result yet"


def _tree(cause: Cause, indent: str, *, diff: bool) -> Iterator[str]:
    place = f" ({cause.place})" if cause.place else ""
    yield f"{indent}{cause.text}{place}{' because' if cause.because else ''}"
    if diff:
        yield from (f"{indent}  {line}" for line in cause.diff)
    for below in cause.because:
        yield from _tree(below, indent + "  ", diff=diff)
