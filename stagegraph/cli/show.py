"""``pipeline show NODE``: what a node made, from its stored record and the views its stage rendered when it ran."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from stagegraph.api import Pipeline
from stagegraph.cli import lookup
from stagegraph.cli.common import add_file, print_json, seconds_text, shown, size_text, table
from stagegraph.errors import PlanError, StoreError, nearest
from stagegraph.workspace import parts_text

if TYPE_CHECKING:
    from stagegraph.dag import Node

PREVIEW_LINES = 40


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "node",
        metavar="NODE",
        help="a node's name, as tokenizer-bundle or compile[llvm]; a bare name means all instances",
    )
    add_file(parser)
    parser.add_argument("--view", metavar="NAME", help="print one view whole")
    lookup.add_options(parser)
    parser.add_argument("--json", action="store_true", help="print the records as one JSON document on stdout")


def run(args: argparse.Namespace) -> int:
    """Run the verb."""
    with Pipeline(args.file, args.overrides) as work:
        nodes = work.dag.select(args.node)
        found = {node: work.workspace.last_record(work.name, node.name) for node in nodes}
        records = {node: record for node, record in found.items() if record is not None}
        if option := lookup.asked(args):
            lookup.run(args, work, records, option)
        elif args.json:
            print_json({node.name: record for node, record in records.items()})
        elif args.view:
            for node, record in records.items():
                print(_view(work, node, record, args.view), end="")
        else:
            print("\n\n".join(_page(work, node, record) for node, record in records.items()))
    unbuilt = [node.name for node in nodes if node not in records]
    if unbuilt:
        raise PlanError(*(f"{name} has no result yet; `pipeline run --stage '{name}'` makes it" for name in unbuilt))
    return 0


def _view(work: Pipeline, node: Node, record: dict[str, Any], name: str) -> str:
    if name not in record["views"]:
        raise PlanError(f"{node.name} has no view '{name}'{nearest(name, record['views'])}")
    digest = record["views"][name][0]
    wrong = work.workspace.store.verify(digest)
    if wrong:
        raise StoreError(f"{node.name}: view '{name}' is {wrong} in the store; `pipeline run` rebuilds it")
    return work.workspace.store.path(digest).read_text(encoding="utf-8")


def _page(work: Pipeline, node: Node, record: dict[str, Any]) -> str:
    document = record["document"]
    cost = f"{seconds_text(record['cpu_seconds'])} CPU, {size_text(record['peak_bytes'])} peak"
    built = f"built {record['started']} on {record['host']} in {seconds_text(record['seconds'])} ({cost})"
    lines = [
        f"{node.name}  {record['summary']}".rstrip(),
        f"  key {record['key'][:16]}  {built}",
        "  params " + (", ".join(f"{k}={v}" for k, v in document["params"].items()) or "none"),
        "  tools  " + (", ".join(f"{k} {v}" for k, v in document["tools"].items()) or "none"),
    ]
    if record.get("parts"):
        lines.append(f"  parts  {parts_text(record)}")
    lines += [f"  warning: {warning}" for warning in record["warnings"]]
    folder = work.workspace.node_dir(work.name, node.name)
    rows = [
        (port, name, size_text(size), digest[:16])
        for port, output in record["outputs"].items()
        for name, (digest, size) in output["files"].items()
    ]
    lines += [f"  in     {shown(folder)}/", "", table(("output", "file", "size", "digest"), rows, flexible=1)]
    for name in record["views"]:
        text = _view(work, node, record, name).splitlines()
        lines += ["", f"-- {name} --", *text[:PREVIEW_LINES]]
        if len(text) > PREVIEW_LINES:
            lines.append(f"… {len(text) - PREVIEW_LINES} more lines: pipeline show '{node.name}' --view {name}")
    return "\n".join(lines)
