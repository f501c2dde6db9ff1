"""Estimates the remaining time of a run, from earlier durations and the progress of running nodes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from stagegraph.cli.common import seconds_text

MINUTE = 60.0
Predictions = Mapping[str, float | None]  # node -> seconds, None where no node like it has ever run


class Remaining:
    """The nodes of a run that are not done; ``predict`` is called once, when the first node starts."""

    def __init__(self, predict: Callable[[], Predictions], jobs: int) -> None:
        self._predict, self._jobs = predict, jobs
        self._waits: dict[str, float | None] | None = None  # nodes that have not begun -> what they will take
        self._done: set[str] = set()  # before the first one began
        self._longest: list[tuple[float, str]] = []  # of them, and some that have begun: the longest is the last
        self._sum, self._unknown = 0.0, 0  # of what they will take; of how many that is not known
        self._running: dict[str, tuple[float | None, float]] = {}  # what a node will take, and when it began
        self._counted: dict[str, tuple[str, float, float]] = {}  # node -> what it counts now, since when, the part done

    def started(self, node: str) -> None:
        """Note that a node begins."""
        if self._waits is None:
            self._waits = {name: seconds for name, seconds in self._predict().items() if name not in self._done}
            self._longest = sorted((seconds, node) for node, seconds in self._waits.items() if seconds is not None)
            self._sum, self._unknown = sum(s for s, _ in self._longest), len(self._waits) - len(self._longest)
        predicted = self._running[node][0] if node in self._running else self._take(node)
        self._running[node] = predicted, time.monotonic()

    def progress(self, node: str, done: int, total: int, unit: str) -> None:
        """Note the progress of a node in what it counts now, which need not be the last that it counts."""
        if node in self._running:
            before, since, _ = self._counted.get(node, (unit, self._running[node][1], 0.0))
            self._counted[node] = unit, since if unit == before else time.monotonic(), done / total if total else 0.0

    def finished(self, node: str) -> None:
        """Note that a node is done, whether or not it ran."""
        if self._waits is None:
            self._done.add(node)
        self._counted.pop(node, None)
        if self._running.pop(node, None) is None:
            self._take(node)

    def _take(self, node: str) -> float | None:
        """Count a node no more among those that wait; return what it will take."""
        if not self._waits or node not in self._waits:
            return None
        seconds = self._waits.pop(node)
        self._unknown -= seconds is None
        self._sum -= seconds or 0.0
        return seconds

    def text(self) -> str:
        """Return ``about 2 m 05 s left``; empty while that is not known.

        It is asked for as every node ends, so it looks at those that run alone, not at all that wait.
        """
        if self._waits is None or self._unknown:
            return ""
        while self._longest and self._longest[-1][1] not in self._waits:
            self._longest.pop()
        seconds = [self._of(node) for node in self._running]
        known = [each for each in seconds if each is not None]
        if len(known) < len(seconds) or not (known or self._waits):
            return ""
        longest = max(known + [seconds for seconds, _ in self._longest[-1:]])
        left = max(longest, (sum(known) + self._sum) / self._jobs)
        return f"about {seconds_text(left) if left >= MINUTE else f'{max(round(left), 1)} s'} left"

    def _of(self, node: str) -> float | None:
        """Return the seconds that a running node still needs: at least those of what it counts now, at its pace."""
        predicted, started = self._running[node]
        if predicted is None:
            return None
        now = time.monotonic()
        _, since, part = self._counted.get(node, ("", now, 0.0))
        pace = (now - since) * (1 - part) / part if part > 0.1 else 0.0
        return max(predicted - (now - started), pace, 0.0)
