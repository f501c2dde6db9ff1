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
        self._running: dict[str, tuple[float, float]] = {}  # node -> when it started, which part of it is done

    def started(self, node: str) -> None:
        """Note that a node begins."""
        if self._left is None:
            self._left = dict(self._predict())
        self._running[node] = time.monotonic(), 0.0

    def progress(self, node: str, done: int, total: int) -> None:
        """Note the progress of a node."""
        if total and node in self._running:
            self._running[node] = self._running[node][0], done / total

    def finished(self, node: str) -> None:
        """Note that a node is done, whether or not it ran."""
        self._running.pop(node, None)
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
        """Return the seconds that a node still needs, extrapolated from its own progress once there is enough of it."""
        if node not in self._running:
            return predicted
        started, part = self._running[node]
        elapsed = time.monotonic() - started
        if part > 0.1:
            return elapsed * (1 - part) / part
        return None if predicted is None else max(predicted - elapsed, 0.0)
