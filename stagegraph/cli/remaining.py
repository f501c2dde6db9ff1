"""Estimates the remaining time of a run, from earlier durations and the progress of running nodes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from stagegraph.cli.common import seconds_text

Predictions = Mapping[str, float | None]  # node -> seconds, None where no node like it has ever run


class Remaining:
    """The nodes of a run that are not done; ``predict`` is called once, when the first node starts."""

    def __init__(self, predict: Callable[[], Predictions], jobs: int) -> None:
        self._predict, self._jobs = predict, jobs
        self._left: dict[str, float | None] | None = None
        self._started: dict[str, float] = {}  # of the nodes that run
        self._counted: dict[str, tuple[str, float, float]] = {}  # node -> what it counts now, since when, the part done

    def started(self, node: str) -> None:
        """Note that a node begins."""
        if self._left is None:
            self._left = dict(self._predict())
        self._started[node] = time.monotonic()

    def progress(self, node: str, done: int, total: int, unit: str) -> None:
        """Note the progress of a node in what it counts now, which need not be the last that it counts."""
        before, since, _ = self._counted.get(node, (unit, self._started.get(node, time.monotonic()), 0.0))
        self._counted[node] = unit, since if unit == before else time.monotonic(), done / total if total else 0.0

    def finished(self, node: str) -> None:
        """Note that a node is done, whether or not it ran."""
        self._started.pop(node, None)
        self._counted.pop(node, None)
        if self._left is not None:
            self._left.pop(node, None)

    def text(self) -> str:
        """Return ``about 2 m 05 s left``; empty while that is not known."""
        if self._left is None:
            return ""
        seconds = [self._of(node, predicted) for node, predicted in self._left.items()]
        known = [each for each in seconds if each is not None]
        if len(known) < len(seconds) or not known:
            return ""
        return f"about {seconds_text(max(*known, sum(known) / self._jobs))} left"

    def _of(self, node: str, predicted: float | None) -> float | None:
        """Return the seconds that a node still needs: at least those of what it counts now, at its pace so far."""
        if node not in self._started or predicted is None:
            return predicted
        now = time.monotonic()
        _, since, part = self._counted.get(node, ("", now, 0.0))
        pace = (now - since) * (1 - part) / part if part > 0.1 else 0.0
        return max(predicted - (now - self._started[node]), pace, 0.0)
