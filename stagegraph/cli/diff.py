"""``pipeline diff A B``: what differs between two results, two runs, or two pipelines."""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from stagegraph.api import Pipeline
from stagegraph.cli.common import add_file, add_json, print_json
from stagegraph.cli.layout import terminal_width
from stagegraph.cli.pager import page
from stagegraph.cli.verbs import SUFFIXES
from stagegraph.errors import PlanError, listed, nearest
from stagegraph.query.diff import KINDS

if TYPE_CHECKING:
    from stagegraph.query.diff import Difference, Sets

EXAMPLE = "pipeline diff quantize.llvm@~1 quantize.llvm"
RUN = re.compile(r"@?(~\d+|[0-9a-f]{6,64})")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    kinds = "NODE, NODE@RUN or a digest; a run (@~1 or its id); or a pipeline file"
    parser.add_argument("a", metavar="A", help=kinds)
    parser.add_argument("b", metavar="B", help="the same of the other side")
    add_file(parser)
    parser.add_argument("--stat", action="store_true", help="print only the number of differences of each kind")
    parser.add_argument(
        "--only", action="append", default=[], metavar="KIND", help="print only differences of this kind, such as param"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Run the verb."""
    files = [name for name in (args.a, args.b) if name.endswith(SUFFIXES)]
    if len(files) == 1:
        raise PlanError(f"{files[0]} is a pipeline file, and the other is none; expected two results, runs or files")
    if files:
        with Pipeline(args.a, args.overrides) as a, Pipeline(args.b, args.overrides) as b:
            return _print_sets(_compare(a, "", b, ""), args)
    with Pipeline(args.file, args.overrides) as pipeline:
        if all(_is_run(pipeline, name) for name in (args.a, args.b)):
            return _print_sets(_compare(pipeline, args.a, pipeline, args.b), args)
        found = _pairs(pipeline, args.a, args.b)
    if args.json:
        print_json({"differences": [each.document() for each in found]})
    else:
        page("\n\n".join("\n".join(_lines(each, args)) for each in found))
    return 0


def _is_run(pipeline: Pipeline, name: str) -> bool:
    digits = name.removeprefix("@")
    known = digits.startswith("~") or any(run.id.startswith(digits) for run in pipeline.runs())
    return bool(RUN.fullmatch(name)) and known


def _compare(a: Pipeline, run_a: str, b: Pipeline, run_b: str) -> Sets:
    from stagegraph.query.diff import compare_sets, state

    files = [str(pipeline.dag.pipeline.file) for pipeline in (a, b)]
    return compare_sets(run_a or files[0], state(a, run_a), run_b or files[1], state(b, run_b))


def _pairs(pipeline: Pipeline, a: str, b: str) -> list[Difference]:
    """Compare one result with one, or instance by instance where both sides have as many."""
    from stagegraph.query.diff import difference

    left, right = pipeline.artifacts(a), pipeline.artifacts(b)
    if len(left) != len(right):
        raise PlanError(f"{a} means {len(left)} results and {b} {len(right)}: name one of each")
    return [difference(x, y) for x, y in zip(left, right, strict=True)]


def _print_sets(found: Sets, args: argparse.Namespace) -> int:
    if args.json:
        print_json(found.document())
        return 0
    sides = ((found.a, found.only_a), (found.b, found.only_b))
    lines = [f"only in {side}: {listed(nodes) if args.stat else ', '.join(nodes)}" for side, nodes in sides if nodes]
    for each in found.differing:
        lines += [*_lines(each, args), *([] if args.stat else [""])]
    page("\n".join([*lines, f"{len(found.differing)} differ, {found.same} are the same"]))
    return 0


def _lines(found: Difference, args: argparse.Namespace) -> Iterator[str]:
    """Yield what the command line asks for of a difference."""
    kinds = Counter(row.kind for row in found.rows)
    if unknown := set(args.only) - {*KINDS}:
        raise PlanError(f"--only {min(unknown)}: unknown kind{nearest(min(unknown), KINDS)}")
    if args.only:
        found = replace(found, rows=[row for row in found.rows if row.kind in args.only])
    if args.stat:
        same = "the outputs are identical" if found.same else "the outputs differ"
        counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items() if not args.only or kind in args.only)
        yield f"{found.a} -> {found.b}: {same}" + (f"; {counts}" if counts else "")
    else:
        yield from difference_lines(found)


def difference_lines(found: Difference) -> Iterator[str]:
    """Yield how two results differ, a line for each difference that fits one."""
    same = "the outputs are identical" if found.same else "the outputs differ"
    yield f"{found.a} -> {found.b}: {same}"
    width = terminal_width()
    for row in found.rows:
        values = f": {row.a or '-'} -> {row.b or '-'}" if row.a or row.b else ""
        line = f"  {row.kind:<6} {row.what}{values}"
        if len(line) <= width:
            yield line
        else:
            yield f"  {row.kind:<6} {row.what}:"
            yield from (f"    {sign} {side}" for sign, side in (("-", row.a), ("+", row.b)) if side)
