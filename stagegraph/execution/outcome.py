"""Data classes for how a run and each of its nodes ended."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from stagegraph.store.objects import RottenError
from stagegraph.store.record import Record

if TYPE_CHECKING:
    from stagegraph.planning.dag import Node


@dataclass
class Outcome:
    """How one node ended in this run; ``status`` is HIT, BUILT, UNCHANGED, FAILED or SKIPPED."""

    node: Node
    status: str
    reason: str
    key: str = ""
    record: Record | None = None
    seconds: float = 0.0
    began: float = 0.0  # seconds after the run, of what was executed
    problems: tuple[str, ...] = ()
    log: Path | None = None
    failed_outputs: Path | None = None  # the folder with what it had written when it failed
    bug: bool = False
    reasons: list[str] = field(default_factory=list)


class Run(NamedTuple):
    """A finished run: how each node ended, in topological order, and the wall time in seconds."""

    outcomes: tuple[Outcome, ...]
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether every node has a result."""
        return all(outcome.record is not None for outcome in self.outcomes)


def problem_of(error: Exception) -> str:
    """Describe an error of the store or the system that prevented a node's result."""
    if isinstance(error, RottenError):
        return f"its stored input {error.digest[:16]} was damaged again after it was rebuilt: is the disk failing?"
    if isinstance(error, OSError):
        return f"{error.filename or 'the store under artifacts/'}: {error.strerror or error}"
    return f"the index under artifacts/ cannot be written: {error}"
