"""The summary that ``run`` prints: nodes that changed, the verdict on the result, and how many were up to date."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from stagegraph.cli.common import seconds_text, shown, size_text
from stagegraph.cli.layout import Brief, prose, table
from stagegraph.cli.streams import hanging
from stagegraph.files import typed
from stagegraph.stage import RESERVATION
from stagegraph.store.journal import BUILT, EXECUTED, FAILED, HIT, SKIPPED, UNCHANGED
from stagegraph.store.record import parts_text, record_size

if TYPE_CHECKING:
    from stagegraph.execution.outcome import Outcome, Run
    from stagegraph.project import Project

MOST_ROWS = 60  # nodes that a summary lists one by one
NEW = "never built"  # the reason of nearly every node of a first run, and no longer so once it has run


def print_summary(project: Project, done: Run, *, verbose: bool) -> None:
    """Print the nodes that changed or attest the result (``verbose``: all, in detail), warnings and counts."""
    rows = list(_rows(done.outcomes, verbose=verbose))
    if rows:
        print(table(("node", "outcome", "what", "time", "size"), rows, flexible=2))
    for outcome in done.outcomes:
        for warning in outcome.record["warnings"] if outcome.record else []:
            print(prose(f"warning: {outcome.node.name}: {hanging(warning)}"))
    for digest in project.workspace.store.damaged:
        where = project.workspace.store.quarantine
        print(f"warning: stored object {digest[:16]} was damaged and moved to {shown(where)}; what needs it is rebuilt")
    if not verbose:
        print_lines(_skipped(done.outcomes))
    print(("\n" if rows else "") + counts_text(done.outcomes, done.seconds))
    if any(o.status == UNCHANGED for o in done.outcomes):
        print_lines(_saved(project, done))


def print_lines(lines: Iterable[str]) -> None:
    """Print lines."""
    for line in lines:
        print(prose(line))


def _rows(outcomes: Iterable[Outcome], *, verbose: bool) -> Iterator[tuple[str, ...]]:
    """Yield the rows of a summary; of many, one for all instances of an entry that were simply built."""
    listed = [outcome for outcome in outcomes if verbose or _counts(outcome)]
    groups: dict[tuple[str, ...], list[Outcome]] = {}
    for outcome in listed:
        alike = len(listed) > MOST_ROWS and not verbose and outcome.status in EXECUTED and not _attests(outcome)
        key = (outcome.node.spec.entry, outcome.status) if alike else (outcome.node.name,)
        groups.setdefault(key, []).append(outcome)
    for group in groups.values():
        yield _row(group[0], verbose=verbose) if len(group) == 1 else _row_of_many(group)


def _row_of_many(group: Sequence[Outcome]) -> tuple[str, ...]:
    first = group[0]
    size = sum(record_size(outcome.record) for outcome in group if outcome.record)
    time = seconds_text(sum(outcome.seconds for outcome in group))
    return first.node.spec.entry, first.status, f"{len(group)} nodes; -v lists each", time, size_text(size)


def _counts(outcome: Outcome) -> bool:
    """Say whether a node is listed: something happened to it, or it attests that others may be shipped."""
    return outcome.status != SKIPPED and (outcome.status != HIT or bool(outcome.reason) or _attests(outcome))


def _attests(outcome: Outcome) -> bool:
    return any(out.attests for out in outcome.node.stage.outputs.values())


def _row(outcome: Outcome, *, verbose: bool) -> tuple[str, ...]:
    record = outcome.record
    made = Brief(record["summary"] if record else "")
    why = outcome.reason
    if verbose:
        why = "; ".join(filter(None, [why, parts_text(record) if record and outcome.status != HIT else ""]))
    elif why == NEW:
        why = ""
    time = seconds_text(outcome.seconds) if outcome.seconds else "-"
    size = size_text(record_size(record)) if record else "-"
    return outcome.node.name, outcome.status, why or made, time, size


def counts_text(outcomes: Iterable[Outcome], seconds: float) -> str:
    """Return how many nodes ended in which way; a node with a reservation is counted under the reservation."""
    counts = Counter(reservation(o) or o.status for o in outcomes)
    usual = [kind for kind in (BUILT, UNCHANGED, HIT, FAILED, SKIPPED) if kind in counts]
    kinds = usual + [kind for kind in counts if kind not in usual]
    return ", ".join(f"{counts[kind]} {kind}" for kind in kinds) + f" in {seconds_text(seconds)}"


def reservation(outcome: Outcome) -> str:
    """Return the reservation with which a node passed, without its reason: ``NOT RUN``."""
    text: str = outcome.record["facts"].get(RESERVATION, "") if outcome.record else ""
    return text.partition(" (")[0]


def _skipped(outcomes: Iterable[Outcome]) -> Iterator[str]:
    """Yield a line for each failure that nodes were skipped for."""
    roots: dict[str, str] = {}  # node that was skipped -> what that began with
    below: dict[str, list[str]] = {}
    for outcome in outcomes:
        if outcome.status == SKIPPED:
            name = outcome.reason.partition(" ")[0]
            root = roots.get(name, outcome.reason)
            roots[outcome.node.name] = root
            below.setdefault(root, []).append(outcome.node.name)
    for root, names in below.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        yield f"{SKIPPED} as {root}: {', '.join(names[:3])}{more}"


def _saved(project: Project, done: Run) -> Iterator[str]:
    """Say how many downstream nodes early cutoff skipped, and how long they last took."""
    below = project.dag.below([o.node for o in done.outcomes if o.status == UNCHANGED])
    skipped = [o.record for o in done.outcomes if o.status == HIT and o.node in below and o.record]
    if skipped:
        seconds = seconds_text(sum(record["seconds"] for record in skipped))
        yield f"early cutoff skipped {len(skipped)} downstream node{'s' * (len(skipped) != 1)}: {seconds}"


def print_failure(outcome: Outcome) -> None:
    """Print a failure on stderr: the problem, where the log is, and where the failed outputs are."""
    sys.stdout.flush()
    lines = [f"error: {outcome.node.name}: {hanging(problem)}" for problem in outcome.problems]
    if outcome.bug:
        lines.append("  this is a bug of the stage, not of your input; the log has the traceback")
    lines.append(f"  log:  pipeline log {typed(outcome.node.name)}")
    if outcome.failed_outputs:
        lines.append(f"  kept: {shown(outcome.failed_outputs)}/out")
    print(prose("\n".join(lines), sys.stderr), file=sys.stderr)
