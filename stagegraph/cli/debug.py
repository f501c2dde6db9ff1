"""``pipeline run --debug NODE``: bring what a node needs up to date, then run its stage in this process."""

from __future__ import annotations

import sys
import time
import traceback
from typing import TYPE_CHECKING

from stagegraph.cli.common import seconds_text, shown
from stagegraph.cli.live import watching
from stagegraph.cli.summary import print_failure
from stagegraph.errors import EXIT_NODE_FAILED, EXIT_OK, PlanError
from stagegraph.files import dotted
from stagegraph.project import Selection
from stagegraph.store.journal import FAILED

if TYPE_CHECKING:
    from stagegraph.api import Pipeline


def debug(pipeline: Pipeline, name: str) -> int:
    """Run one node in this process; on a terminal, an error opens the debugger where it was raised."""
    nodes = pipeline.dag.select(name)
    if len(nodes) > 1:
        raise PlanError(f"--debug runs one node, and {name} means {', '.join(dotted(n.name) for n in nodes)}")
    (node,) = nodes
    needed = tuple(n for n in pipeline.select(stage=[name]).nodes if n is not node)
    if needed:
        with watching(pipeline, needed) as reporter:
            done = pipeline.run(Selection(frozenset(needed), needed), reporter=reporter)
        for outcome in done.outcomes:
            if outcome.status == FAILED:
                print_failure(outcome)
        if not done.ok:
            return EXIT_NODE_FAILED
    from stagegraph.execution.here import run_here

    began = time.monotonic()
    try:
        out = run_here(pipeline.planner, pipeline.workspace, node)
    except Exception as error:  # noqa: BLE001 - whatever a stage raises is what is looked for
        traceback.print_exc()
        if sys.stdin.isatty() and sys.stdout.isatty():
            import pdb

            pdb.post_mortem(error.__traceback__)
        return EXIT_NODE_FAILED
    where = f"; what it wrote is in {shown(out)}" if out else ""
    print(f"{node.name} ran here in {seconds_text(time.monotonic() - began)}: nothing of it was kept{where}")
    return EXIT_OK
