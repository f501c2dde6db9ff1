"""Progress on stderr while nodes run: live lines on a terminal, plain lines otherwise."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from typing import TYPE_CHECKING, Any, Self

from stagegraph.cli.common import seconds_text, size_text
from stagegraph.cli.layout import cut, folded
from stagegraph.cli.remaining import Remaining
from stagegraph.cli.streams import exactly, hanging, visible
from stagegraph.cli.summary import NEW
from stagegraph.execution.reporter import Reporter
from stagegraph.store.journal import HIT

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from stagegraph.execution.outcome import Outcome
    from stagegraph.planning.dag import Node
    from stagegraph.project import Project

PLAIN_SECONDS = 5.0


def watching(project: Project, nodes: Sequence[Node], *, jobs: int = 0, quiet: bool = False) -> Quiet:
    """Return the reporter that suits stderr for a run of these nodes."""
    if quiet:
        return Quiet()

    def predict() -> Mapping[str, float | None]:
        from stagegraph.query.history import Durations

        known = Durations(project.workspace.journal)
        return {node.name: known.predict(project.name, node.name, node.stage.id) for node in nodes}

    kind = LiveReporter if sys.stderr.isatty() else PlainReporter
    return kind(len(nodes), Remaining(predict, jobs or os.cpu_count() or 1))


class Quiet(Reporter):
    """A reporter that prints nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Clear the remaining lines of the run from the screen."""


class PlainReporter(Quiet):
    """One line when a node starts, one when it ends, and one every few seconds of progress between."""

    def __init__(self, total: int, remaining: Remaining) -> None:
        self._total = total
        self._remaining = remaining
        self._done: set[str] = set()
        self._shown_at: dict[str, float] = {}

    def started(self, node: Node, reason: str) -> None:
        """Show that a node begins."""
        self._shown_at[node.name] = time.monotonic()
        self._remaining.started(node.name)
        self._line(f"{node.name}: running ({reason})")

    def waiting(self, node: Node, what: str) -> None:
        """Show what holds a node up."""
        self._line(f"{node.name}: waiting for {what}")

    def progress(self, node: Node, done: int, total: int, unit: str, note: str) -> None:
        """Show how far a node is."""
        self._remaining.progress(node.name, done, total, unit)
        if time.monotonic() - self._shown_at.get(node.name, 0.0) >= PLAIN_SECONDS:
            self._shown_at[node.name] = time.monotonic()
            self._line(f"{node.name}: {progress_text(done, total, unit, note)}")

    def finished(self, outcome: Outcome) -> None:
        """Show how a node ended."""
        self._done.add(outcome.node.name)
        self._remaining.finished(outcome.node.name)
        if outcome.status != HIT:
            left = self._remaining.text()
            self._line(f"[{len(self._done)}/{self._total}{f', {left}' if left else ''}] {outcome_text(outcome)}")

    def retrying(self, node: Node, problem: str, attempt: int) -> None:
        """Show that a node is tried again."""
        self._line(f"{node.name}: failed, retry {attempt}: {hanging(problem)}")

    @staticmethod
    def _line(text: str) -> None:
        with contextlib.suppress(OSError):  # whoever read along has left, or is full; the work goes on
            print(text, file=sys.stderr, flush=True)


class LiveReporter(Quiet):
    """A line per running node with a bar where the stage reports progress, and one of the whole run above them;
    finished nodes scroll above.
    """

    def __init__(self, total: int, remaining: Remaining) -> None:
        self._total = total
        self._remaining = remaining
        self._whole: Any = None
        self._done: set[str] = set()
        self._bars: Any = None
        self._tasks: dict[str, Any] = {}

    def _start(self) -> Any:
        if self._bars is None:  # only a run that executes something pays for drawing it
            from rich.console import Console
            from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
            from rich.table import Column

            columns = (
                SpinnerColumn(),
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=20),
                TimeElapsedColumn(),
                TextColumn("{task.fields[amount]}", markup=False, table_column=Column(no_wrap=True, ratio=1)),
            )
            # Across the whole line: where that is short, the amount is cut and no name.
            self._bars = Progress(*columns, console=Console(file=exactly(sys.stderr)), transient=True, expand=True)
            self._whole = self._bars.add_task(f"0 of {self._total} nodes", total=self._total, amount="")
            self._bars.start()
        return self._bars

    def _show_whole(self) -> None:
        done = len(self._done)
        name = f"{done} of {self._total} nodes"
        self._bars.update(self._whole, completed=done, description=name, amount=self._remaining.text())

    def started(self, node: Node, reason: str) -> None:
        """Show that a node begins."""
        self._remaining.started(node.name)
        self._tasks[node.name] = self._start().add_task(node.name, total=None, amount=visible(reason))
        self._show_whole()

    def waiting(self, node: Node, what: str) -> None:
        """Show what holds a node up."""
        self._start()
        self._above(f"{node.name}: waiting for {what}")

    def progress(self, node: Node, done: int, total: int, unit: str, note: str) -> None:
        """Show how far a node is."""
        self._remaining.progress(node.name, done, total, unit)
        known = {"completed": done, "total": total} if total else {"completed": 0, "total": 1}
        self._bars.update(self._tasks[node.name], amount=progress_text(done, total, unit, note), **known)
        self._show_whole()

    def finished(self, outcome: Outcome) -> None:
        """Show how a node ended."""
        self._done.add(outcome.node.name)
        if outcome.node.name in self._tasks:
            self._bars.remove_task(self._tasks.pop(outcome.node.name))
        self._remaining.finished(outcome.node.name)
        if self._bars is not None:
            self._show_whole()
            if outcome.status != HIT:
                self._above(f"[{len(self._done)}/{self._total}] {outcome_text(outcome)}", whole=bool(outcome.problems))

    def retrying(self, node: Node, problem: str, attempt: int) -> None:
        """Show that a node is tried again."""
        self._bars.remove_task(self._tasks.pop(node.name))
        self._above(f"{node.name}: failed, retry {attempt}: {hanging(visible(problem))}")

    def _above(self, text: str, *, whole: bool = True) -> None:
        """Print above the bars; what need not be read ``whole``, as the summary has it too, is cut to one line."""
        console = self._bars.console
        text = folded(text, console.width) if whole else cut(text, console.width)
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    def __exit__(self, *_: object) -> None:
        """Take the bars off the screen."""
        if self._bars is not None:
            self._bars.stop()


def progress_text(done: int, total: int, unit: str, note: str) -> str:
    """Return ``3 of 12 files`` or ``1.2 MiB of 3.4 MiB, 40 MB/s``; ``3 files`` where the total is not known."""
    number = size_text if unit == "B" else "{:,}".format
    amount = number(done) + (f" of {number(total)}" if total else "") + (f" {unit}" if unit != "B" else "")
    amount = amount.rstrip()
    return f"{amount}, {visible(note)}" if note else amount


def outcome_text(outcome: Outcome) -> str:
    """Return one finished node in one line."""
    summary = outcome.record["summary"] if outcome.record else ""
    why = f"({outcome.reason})  " if outcome.reason not in {"", NEW} else ""
    text = hanging(visible(outcome.problems[0] if outcome.problems else why + summary))
    return f"{outcome.node.name}: {outcome.status} in {seconds_text(outcome.seconds)}  {text}".rstrip()
