"""``pipeline show REF``: shows a node's result, from its record and the views that its stage rendered."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from stagegraph.api import Pipeline
from stagegraph.cli import lookup
from stagegraph.cli.common import add_file, print_json, seconds_text, shown, size_text
from stagegraph.cli.layout import markdown, table, terminal_width
from stagegraph.cli.pager import describe_binary, page
from stagegraph.cli.streams import hanging
from stagegraph.errors import PlanError
from stagegraph.files import typed
from stagegraph.planning.changes import show
from stagegraph.query.artifact import unbuilt
from stagegraph.registry import find, load_object, names
from stagegraph.store.record import parts_text, result_digest

if TYPE_CHECKING:
    from stagegraph.query.artifact import Artifact
    from stagegraph.store.record import FileEntry

PREVIEW_LINES = 40
NUMBERED = 8  # files whose names differ in a number only, that are listed one by one
DIGITS = re.compile(r"\d+")
EXAMPLE = "pipeline show compile.llvm:metadata.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "reference",
        metavar="REF",
        help="NODE (a bare name means all instances), NODE@RUN, or a key or digest; with :PATH a file in it",
    )
    add_file(parser)
    parser.add_argument("--view", metavar="NAME", help="print one view whole")
    parser.add_argument("--views", action="store_true", help="list the views")
    parser.add_argument("--ir", action="store_const", const="ir", dest="view", help="the view ir: readable code")
    parser.add_argument("--plot", metavar="FILE", help="draw a picture of the result into FILE (.png, .svg)")
    lookup.add_options(parser)
    parser.add_argument("--json", action="store_true", help="print the records as one JSON document on stdout")


def run(args: argparse.Namespace) -> int:
    """Run the verb."""
    with Pipeline(args.file, args.overrides) as pipeline:
        found = pipeline.artifacts(args.reference)
        if option := lookup.asked(args):
            nodes = pipeline.dag.by_name
            lookup.run(args, pipeline, {nodes[a.label]: a.record for a in found if a.label in nodes}, option)
        elif args.plot:
            _plot(found, Path(args.plot))
        elif args.json:
            print_json({artifact.label: artifact.record for artifact in found})
        elif args.views:
            print("\n".join(f"{artifact.label}: {', '.join(artifact.views) or 'no views'}" for artifact in found))
        elif args.view:
            page("".join(artifact.view(args.view) for artifact in found), _kind(args.view))
        elif found[0].path:
            _print_files(found)
        else:
            page("\n\n".join(_page(pipeline, artifact) for artifact in found))
        # Said after the others were shown.
        if missing := unbuilt(pipeline, args.reference, found):
            raise PlanError(*missing)
    return 0


def _kind(view: str) -> str:
    """Return a file name that says by its suffix what a view is; most are Markdown or plain text, which it includes."""
    return "ir.py" if view == "ir" else view if view.endswith(".json") else f"{view}.md"


def _plot(found: list[Artifact], path: Path) -> None:
    """Draw the picture of a node's report that its stage knows how to draw."""
    if len(found) > 1:
        raise PlanError(f"--plot draws one result, and these are {', '.join(artifact.label for artifact in found)}")
    plot = find("plots", found[0].record["stage"])
    if plot is None:
        raise PlanError(
            f"{found[0].label}: its stage has no picture; --plot draws results of {', '.join(names('plots'))}"
        )
    try:
        load_object(plot.function)(found[0].read_json(plot.file), path)
    except (ValueError, OSError) as error:
        raise PlanError(str(error)) from None
    print(f"drew {shown(path)}")


def _print_files(found: list[Artifact]) -> None:
    """Print the one file that a path names, or list the folder."""
    for artifact in found:
        if artifact.path not in artifact.files:
            rows = [(name, size_text(size), digest[:16]) for name, (digest, size) in artifact.files.items()]
            print(table(("file", "size", "digest"), rows, flexible=0))
            continue
        path = artifact.object(artifact.path)
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            text = f"{artifact.label}:{artifact.path}  {describe_binary(path)}\n"
        page(text, artifact.path)


def _page(pipeline: Pipeline, artifact: Artifact) -> str:
    record = artifact.record
    document = record["document"]
    cost = f"{seconds_text(record['cpu_seconds'])} CPU, {size_text(record['peak_bytes'])} peak"
    built = f"built {record['started']} on {record['host']} in {seconds_text(record['seconds'])} ({cost})"
    lines = [
        f"{artifact.label}  {record['summary']}".rstrip(),
        f"  key {record['key'][:16]}  {built}",
        "  params " + (", ".join(f"{k}={show(v)}" for k, v in document["params"].items()) or "none"),
        "  tools  " + (", ".join(f"{k} {v}" for k, v in document["tools"].items()) or "none"),
    ]
    if libraries := document.get("libraries"):
        lines.append("  libraries  " + ", ".join(f"{k} {v}" for k, v in libraries.items()))
    if record.get("parts"):
        lines.append(f"  parts  {parts_text(record)}")
    lines += [f"  warning: {hanging(warning)}" for warning in record["warnings"]]
    node = pipeline.dag.by_name.get(artifact.label)
    if node and pipeline.failed(node):
        lines.append(f"  failed when it ran again since: pipeline log {typed(artifact.label)}")
    for _, other in pipeline.workspace.others(record["key"]):
        digest = result_digest(other)[:16]
        if digest != result_digest(record)[:16]:
            lines.append(
                f"  other  of the same key, made {other['started']}: pipeline diff {digest} {typed(artifact.label)}"
            )
    rows = [row for port, output in record["outputs"].items() for row in _files(port, output["files"])]
    if node:
        is_shown = pipeline.workspace.is_shown(pipeline.name, node.name, artifact.key, record)
        instead = "" if is_shown else "  (not this result as it stands)"
        lines.append(f"  in     {shown(pipeline.workspace.node_dir(pipeline.name, node.name))}/{instead}")
    lines += ["", table(("output", "file", "size", "digest"), rows, flexible=1)]
    for name in artifact.views:
        if not name.endswith(".json"):  # for programs
            lines += ["", f"-- {name} --", *_preview(artifact, name)]
    return "\n".join(lines)


def _files(port: str, files: Mapping[str, FileEntry]) -> Iterator[tuple[str, ...]]:
    """Yield a row for each file of an output; one for files that are numbered, if there are many."""
    alike: dict[str, list[str]] = {}
    for file in files:
        alike.setdefault(DIGITS.sub("*", file), []).append(file)
    for pattern, group in alike.items():
        if len(group) > NUMBERED:
            yield port, pattern, size_text(sum(files[file][1] for file in group)), f"{len(group)} files"
        else:
            yield from ((port, file, size_text(files[file][1]), files[file][0][:16]) for file in group)


def _preview(artifact: Artifact, view: str) -> Iterator[str]:
    lines = markdown(artifact.view(view), terminal_width()).splitlines()
    yield from lines[:PREVIEW_LINES]
    if len(lines) > PREVIEW_LINES:
        yield f"… {len(lines) - PREVIEW_LINES} more lines: pipeline show {typed(artifact.label)} --view {view}"
