"""Runs one node in this process, for debugging: breakpoints stop, and an error keeps its traceback.

Nothing of it is kept: whoever sits at a debugger may have changed what came out, and parts that it remembers go to a
store of their own. What it wrote lies where the outputs of a failure do.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from stagegraph.execution.sandbox import Log, Sandbox, layout_of, placed, request_for
from stagegraph.execution.worker import WorkerContext, collect_outputs, known_inputs
from stagegraph.registry import load_object

if TYPE_CHECKING:
    from stagegraph.execution.messages import Request
    from stagegraph.planning.dag import Node
    from stagegraph.planning.planner import Planner
    from stagegraph.store.record import Record
    from stagegraph.store.workspace import Workspace


def run_here(planner: Planner, workspace: Workspace, node: Node) -> Path | None:
    """Run the stage of a node whose inputs are up to date; return where its outputs are, None if they hold a secret.

    Whatever the stage raises is raised here.
    """
    pipeline = planner.dag.pipeline.name
    planner.prepare(planner.dag.above([node]))

    def record_of(upstream: Node) -> Record:
        record = workspace.last_record(pipeline, upstream.name)
        assert record is not None, f"{upstream.name} was just brought up to date"
        return record

    decision, prepared = planner.decide(node, record_of), planner.prepared(node)
    with workspace.locked(decision.key, wait=True):
        sandbox = Sandbox.create(workspace, decision.key)
        sandbox.secret = bool(prepared.secrets)
        try:
            layout = layout_of(node, {u: record_of(u) for u in node.upstream})
            inputs = sandbox.lay_out_inputs(workspace.store, layout)
            here = Log(Path(os.devnull)), sandbox.folder / "store", inputs, planner.part_codes(decision)
            request: Request = {**request_for(decision, prepared, fresh=True), **placed(sandbox, *here)}
            if request["prepare"]:
                load_object(request["prepare"])()
            with Path(os.devnull).open("w", encoding="utf-8") as events:
                context = WorkerContext(request, prepared.params, events)
                node.stage.run(context)
                collect_outputs(node.stage, context.out, context.settle() | known_inputs(request))
        finally:
            failed_folder = sandbox.keep(workspace, pipeline, node.name)
    return failed_folder / "out" if failed_folder else None
