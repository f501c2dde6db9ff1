"""``pipeline lineage REF``: traces an artifact, or a file in it, back to every source, parameter, code and tool."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING

from stagegraph.api import Pipeline
from stagegraph.cli.common import add_file, print_json
from stagegraph.cli.pager import page
from stagegraph.planning.changes import show

if TYPE_CHECKING:
    from stagegraph.query.lineage import Ancestor, Lineage

EXAMPLE = "pipeline lineage bundle.llvm:bundle/model.so --format mermaid"
DIGITS = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("reference", metavar="REF", help="NODE, NODE@RUN, a key or a digest; with :PATH a file in it")
    add_file(parser)
    parser.add_argument("--format", choices=("text", "json", "mermaid"), default="text", help="default: text")
    parser.add_argument("--json", action="store_const", const="json", dest="format", help="the same as --format json")


def run(args: argparse.Namespace) -> int:
    """Run the verb."""
    with Pipeline(args.file, args.overrides) as pipeline:
        found = pipeline.lineage(args.reference)
    if args.format == "json":
        print_json(found.document())
    elif args.format == "mermaid":
        print("\n".join(_mermaid(found)))
    else:
        page("\n".join(_text(found)))
    return 0


def _text(found: Lineage) -> Iterator[str]:
    for name, (digest, _) in found.artifact.files.items():
        maker = f"  made by {found.copied[name]}" if name in found.copied else ""
        yield f"{found.artifact.label}:{name}  {digest[:DIGITS]}{maker}"
    for origin in found.origins:
        yield ""
        yield from _execution(origin)


def _execution(origin: Ancestor) -> Iterator[str]:
    about = origin.document()
    if origin.record is None:
        yield f"{origin.label}  key {origin.key[:DIGITS]}  its record is gone"
        return
    yield f"{origin.label}  key {origin.key[:DIGITS]}  {about['started']} on {about['host']}"
    for name, value in about["params"].items():
        yield f"  param   {name} = {show(value)}"
    for parameter, files in about["sources"].items():
        yield from (f"  source  {parameter}: {name}  {digest[:DIGITS]}" for name, digest in files.items())
    code = about["code"]
    yield f"  code    {len(code['modules'])} modules and rows, {code['digest'][:DIGITS]}"
    yield from (f"  tool    {name} {version}" for name, version in about["tools"].items())
    yield from (f"  library {name} {version}" for name, version in about["libraries"].items())
    yield from (f"  input   {before.label}  key {before.key[:DIGITS]}" for before in origin.before)


def _mermaid(found: Lineage) -> Iterator[str]:
    yield "flowchart LR"
    ids = {origin.key: f"n{i}" for i, origin in enumerate(found.origins)}
    for origin in found.origins:
        yield f'  {ids[origin.key]}["{origin.label}<br/>{origin.key[:8]}"]'
        yield from (f"  {ids[before.key]} --> {ids[origin.key]}" for before in origin.before)
        files = origin.document().get("sources", {})
        for i, (parameter, digests) in enumerate(files.items()):
            names = "<br/>".join(f"{name} {digest[:8]}" for name, digest in digests.items())
            yield f'  {ids[origin.key]}s{i}[("{parameter}<br/>{names}")] --> {ids[origin.key]}'
