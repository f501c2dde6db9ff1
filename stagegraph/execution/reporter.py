"""The callbacks by which a run reports its progress."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stagegraph.execution.outcome import Outcome
    from stagegraph.planning.dag import Node


class Reporter:
    """The callbacks of a run, which do nothing; a subclass overrides those it wants."""

    def started(self, node: Node, reason: str) -> None:
        """A node begins to execute."""

    def waiting(self, node: Node, what: str) -> None:
        """A node waits for ``what``."""

    def progress(self, node: Node, done: int, total: int, unit: str, note: str) -> None:
        """A running node reports how far it is."""

    def retrying(self, node: Node, problem: str, attempt: int) -> None:
        """A node failed and is tried again, for the ``attempt``-th time."""

    def finished(self, outcome: Outcome) -> None:
        """A node is done."""
