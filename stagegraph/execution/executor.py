"""The protocol of a place where nodes run; the two places are in :mod:`stagegraph.execution.places`."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from stagegraph.execution.messages import Event, Layout
    from stagegraph.execution.sandbox import Log, Sandbox
    from stagegraph.planning.dag import Node
    from stagegraph.planning.planner import Decision, Prepared
    from stagegraph.store.memo import PartCode


@dataclass(frozen=True)
class Options:
    """The options of a run: how many nodes at once, which to run although they are hits, what a failure does.

    ``share``: take results from the user's remotes and give them; ``fetch_only``: run nothing that none of them has.
    ``executor`` and ``scheduler`` say where they run, if not as the user's configuration has it; without ``share``,
    here.
    """

    jobs: int = 0
    force: frozenset[str] = frozenset()
    fail_fast: bool = False
    retries: int = 0
    share: bool = False
    fetch_only: bool = False
    executor: str = ""
    scheduler: str = ""


class Slot(Protocol):
    """The execution of one node, which reports by events.

    ``began`` (only from elsewhere, and again where it is begun again), ``progress``, ``end``, and ``gone`` with a
    ``meaning`` if it ended without an ``end``.
    """

    def fileno(self) -> int:
        """Return a descriptor that becomes readable when there are events."""

    def receive(self) -> list[Event]:
        """Return the events that have arrived."""

    def kill(self) -> None:
        """End the node and everything that it started, at once."""


@dataclass(frozen=True)
class Task:
    """A node that is to run, with all that its slot needs; ``fresh``: it reuses no memoised parts."""

    decision: Decision
    prepared: Prepared
    layout: Layout
    sandbox: Sandbox
    log: Log
    parts: Mapping[str, PartCode]
    fresh: bool

    @property
    def node(self) -> Node:
        """The node."""
        return self.decision.node


AtWork = Sequence[tuple["Node", Any]]  # nodes that a place runs, with their slots


class Executor(Protocol):
    """A place where nodes run."""

    def refuse(self, nodes: Iterable[Node]) -> None:
        """Raise :class:`~stagegraph.errors.PlanError` with every node that can never run there."""

    def full(self, running: AtWork) -> bool:
        """Say whether there is no room for any node beside those that run."""

    def has(self, node: Node, running: AtWork) -> bool:
        """Say whether there is room for a node beside those that run."""

    def over(self, running: AtWork) -> Iterator[tuple[Any, str]]:
        """Yield the slots whose node takes more than it declares, each with a message."""

    def start(self, task: Task) -> Slot:
        """Start a node."""

    def release(self, slot: Any, *, keep: bool) -> None:
        """Take back a slot, for reuse if ``keep``; a node that still runs is ended."""

    def stop(self) -> None:
        """End idle worker processes."""


@dataclass
class Running:
    """A node under way."""

    decision: Decision
    executor: Executor
    slot: Slot
    sandbox: Sandbox
    made_from: dict[str, list[str]]
    lock: int
    log: Log
    began: float = 0.0
    started_at: str = ""
    deadline: float | None = None
    where: str = ""

    def begin(self, where: str = "") -> None:
        """Record the start time and the deadline."""
        self.began, self.where = time.monotonic(), where
        self.started_at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        timeout = self.decision.node.spec.timeout
        self.deadline = self.began + timeout if timeout else None
