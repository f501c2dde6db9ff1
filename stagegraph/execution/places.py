"""The places where nodes run: this machine, and a cluster if one is configured."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from stagegraph.execution.executor import AtWork, Executor, Options, Running, Slot, Task
from stagegraph.execution.resources import Room, memory_text

if TYPE_CHECKING:
    from stagegraph.execution.sandbox import Workers
    from stagegraph.planning.dag import Node
    from stagegraph.planning.planner import Planner
    from stagegraph.store.workspace import Workspace


class Local(Room):
    """Runs nodes in worker processes of this machine."""

    def __init__(self, jobs: int, workspace: Workspace, nodes: Sequence[Node]) -> None:
        super().__init__(jobs)
        self._workspace, self._nodes = workspace, nodes
        self._workers: Workers | None = None

    def start(self, task: Task) -> Slot:
        """Start a node in a worker process of its profile, with its inputs laid out in its sandbox."""
        from stagegraph.execution.sandbox import Workers, placed, request_for

        workspace, secrets = self._workspace, task.prepared.secrets
        self._workers = self._workers or Workers(self._nodes)
        with workspace.index.together():
            inputs = task.sandbox.lay_out_inputs(workspace.store, task.layout)
        new = bool(secrets or task.node.spec.resources.memory)
        worker = self._workers.take(task.node.stage.profile, new=new)
        request = request_for(task.decision, task.prepared, fresh=task.fresh)
        worker.send({**request, **placed(task.sandbox, task.log, workspace.root, inputs, task.parts)})
        return worker

    def release(self, slot: Any, *, keep: bool) -> None:
        """Keep a worker warm, or end it."""
        if keep and self._workers is not None:
            self._workers.give_back(slot)
        else:
            slot.kill()

    def stop(self) -> None:
        """End the workers that are warm."""
        if self._workers is not None:
            self._workers.stop()


class Places:
    """The places of one run: a cluster, if one is configured, for all nodes without secrets; this machine for the rest.

    What is configured is read when the first node is to run: a run without news pays for none of it.
    """

    def __init__(
        self, planner: Planner, workspace: Workspace, options: Options, waiting: Callable[[Node, str], None]
    ) -> None:
        self._planner, self._workspace, self._options, self._waiting = planner, workspace, options, waiting
        self._all: list[Executor] = []
        self._announced: set[str] = set()  # entries a node of which had to wait for room

    @property
    def all(self) -> list[Executor]:
        """This machine, and the cluster."""
        if not self._all:
            options, nodes = self._options, self._planner.dag.nodes
            self._all.append(Local(options.jobs or os.cpu_count() or 1, self._workspace, nodes))
            if options.share:
                from stagegraph.remote.settings import load_settings

                settings = load_settings(self._planner.dag.pipeline.remotes)
                cluster = settings.cluster(options.executor, options.scheduler)
                if cluster is not None:
                    from stagegraph.execution.cluster import Cluster

                    self._all.append(Cluster(cluster, self._workspace, self._planner, options.jobs))
        return self._all

    def of(self, node: Node) -> Executor:
        """Return the place where a node runs."""
        return self.all[0] if self._planner.prepared(node).secrets else self.all[-1]

    def refuse(self, nodes: Sequence[Node]) -> None:
        """Raise :class:`~stagegraph.errors.PlanError` with every node that can never run where it should."""
        for place in self.all if nodes else ():
            place.refuse([node for node in nodes if self.of(node) is place])

    def full(self, running: Iterable[Running]) -> bool:
        """Say whether there is no room anywhere."""
        return all(place.full(_there(place, running)) for place in self.all)

    def has(self, node: Node, running: Iterable[Running]) -> bool:
        """Say whether there is room for a node where it should run; of the first of an entry tell if there is none."""
        place, wanted = self.of(node), node.spec.resources
        room = place.has(node, _there(place, running))
        if not room and node.spec.entry not in self._announced:
            self._announced.add(node.spec.entry)
            memory = f"{memory_text(wanted.memory)} of memory" if wanted.memory else "memory that others declare"
            self._waiting(node, "the machine, which it takes alone" if wanted.exclusive else memory)
        return room

    def over(self, running: Iterable[Running]) -> Iterator[tuple[Any, str]]:
        """Yield the slots whose node takes more than it declares, and what to say of it."""
        for place in self.all:
            yield from place.over(_there(place, running))

    def stop(self) -> None:
        """End what has nothing to do."""
        for place in self._all:
            place.stop()


def _there(place: Executor, running: Iterable[Running]) -> AtWork:
    return [(r.decision.node, r.slot) for r in running if r.executor is place]
