"""``pipeline push``: uploads the local results to the user's remotes."""

from __future__ import annotations

import argparse

from stagegraph.api import Pipeline
from stagegraph.cli.common import add_file, add_json, add_selection, print_json
from stagegraph.cli.remote import configured
from stagegraph.errors import EXIT_NODE_FAILED, EXIT_OK
from stagegraph.store.journal import HIT

EXAMPLE = "pipeline push --stage 'quantize.*'"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_file(parser)
    add_selection(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Run the verb."""
    from stagegraph.remote.shared import Shared

    with Pipeline(args.file, args.overrides) as pipeline:
        settings = configured(pipeline, writes=True)
        selection = pipeline.select(stage=args.stage, start=args.start, until=args.until)
        plan = pipeline.planner.plan(selection.nodes)
        here = [d for d in plan if d.status == HIT and not pipeline.planner.prepared(d.node).secrets]
        shared = Shared(settings, pipeline.workspace)
        try:
            for decision in here:
                record = pipeline.workspace.record(decision.key)
                if record is not None:
                    shared.push(record)
        finally:
            sent = shared.finish()
    if args.json:
        print_json({"results": [d.node.name for d in here], "objects": sent, "failed": sorted(shared.failed)})
    else:
        notice = (
            f"sent {sent} object{'s' * (sent != 1)}" if sent or shared.failed else "the remotes have all of it already"
        )
        print(
            f"{len(here)} of {len(selection.nodes)} nodes have a result here; {notice if here else 'nothing to send'}"
        )
    return EXIT_NODE_FAILED if shared.failed else EXIT_OK
