"""``pipeline pull``: downloads the results of a pipeline that the user's remotes have; runs nothing."""

from __future__ import annotations

import argparse

from stagegraph.api import Pipeline
from stagegraph.cli.common import add_file, add_json, add_selection, print_json
from stagegraph.cli.layout import table
from stagegraph.cli.live import watching
from stagegraph.errors import EXIT_OK
from stagegraph.store.journal import HIT

EXAMPLE = "pipeline pull --until 'compile.*'"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_file(parser)
    add_selection(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Run the verb."""
    from stagegraph.cli.remote import configured

    with Pipeline(args.file, args.overrides) as pipeline:
        configured(pipeline, reads=True)
        selection = pipeline.select(stage=args.stage, start=args.start, until=args.until)
        with watching(pipeline, selection.nodes) as reporter:
            done = pipeline.run(selection, fetch_only=True, reporter=reporter, command=["pull", args.file])
    taken = sum(o.status == HIT and o.reason.startswith("from remote") for o in done.outcomes)
    here = sum(o.status == HIT for o in done.outcomes)
    if args.json:
        nodes = [{"node": o.node.name, "outcome": o.status, "reason": o.reason, "key": o.key} for o in done.outcomes]
        print_json({"pipeline": pipeline.name, "taken": taken, "here": here, "nodes": nodes})
    else:
        print(
            table(("node", "outcome", "reason"), [(o.node.name, o.status, o.reason) for o in done.outcomes], flexible=2)
        )
        print(f"\n{taken} taken from remotes; {here} of {len(done.outcomes)} nodes have a result here")
    return EXIT_OK
