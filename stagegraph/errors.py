"""The errors that a user may see, one class per phase; the entry point maps each to an exit code.

A message says what is wrong, where (``file:line:column``, a node, a part of an input) and what to do. All problems
that a phase finds travel in one error, so that a user mends them in one go.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

REMOVE = "no store makes that: remove it, and the next run makes what belongs there"
EXIT_OK, EXIT_NODE_FAILED, EXIT_USAGE, EXIT_STORE, EXIT_WORK_TO_DO, EXIT_INTERRUPTED = 0, 1, 2, 3, 4, 130
FIRST_SECONDS, EVERY_SECONDS = 1.0, 5.0  # of long work without a word
GB = 1e9
_LISTED = 4  # names in a message
_READ = 40  # names in a list of all that may be chosen
EXIT_PIPE = 141  # what a shell reports for a program whose reader went away


class PipelineError(Exception):
    """Root of every error meant for a user: one or more problems, each a complete sentence with its place."""

    exit_code = EXIT_USAGE

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class SpecError(PipelineError):
    """The pipeline file, or an override of it, is not well formed."""


class PlacedError(SpecError):
    """A problem of a file that a pipeline file names; ``place`` is where in it, None where its name itself is wrong."""

    def __init__(self, problem: str, place: tuple[str, int, int] | None = None) -> None:
        super().__init__(problem)
        self.place = place


class PlanError(PipelineError):
    """The pipeline is well formed but cannot be planned: a missing source, a stale input under ``--only``."""


class StageError(PipelineError):
    """A stage cannot do its work because of its input; raised by stage authors for mistakes a user can mend."""

    exit_code = EXIT_NODE_FAILED


class StoreError(PipelineError):
    """The store under ``artifacts/`` is damaged or unusable."""

    exit_code = EXIT_STORE


def similar(name: str, known: Iterable[str]) -> str:
    """Return the known name that comes closest, empty if none is close."""
    import difflib  # only a mistake pays for it

    return next(iter(difflib.get_close_matches(name, sorted(set(known)), n=1, cutoff=0.6)), "")


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest known name, else a list of known names, as far as one reads."""
    names = sorted(set(known))
    if close := similar(name, names):
        return f"; did you mean '{close}'?"
    more = len(names) - _READ
    return f"; known: {', '.join(names[:_READ])}{f' and {more} more' * (more > 0)}" if names else ""


def listed(names: Iterable[str]) -> str:
    """Return ``a, b, c, d and 3 more``: each name once, the first few in full."""
    distinct = list(dict.fromkeys(names))
    more = len(distinct) - _LISTED
    return ", ".join(distinct[:_LISTED]) + (f" and {more} more" if more > 0 else "")


def tell(text: str) -> None:
    """Print a notice on stderr, unless the program has its own ``logging`` handlers."""
    from logging import getLogger

    getLogger("stagegraph").warning("%s", text)


class Progress:
    """Prints how many of ``total`` bytes are done: first after a second, then at intervals."""

    def __init__(self, doing: str, total: int) -> None:
        self._doing, self._total, self._done = doing, total, 0
        self._began = time.monotonic()
        self._next = self._began + FIRST_SECONDS

    def __call__(self, count: int) -> None:
        """Add ``count`` bytes; concurrent calls may lose some, which affects only what is printed."""
        self._done += count
        now = time.monotonic()
        if now >= self._next:
            self._next = now + EVERY_SECONDS
            rate = self._done / GB / max(now - self._began, 1e-9)
            tell(f"{self._doing} {self._done / GB:.1f} of {self._total / GB:.1f} GB, {rate:.2f} GB/s")


def warn(text: str) -> None:
    """Print a warning on stderr, unless the program has its own ``logging`` handlers."""
    from logging import getLogger  # only trouble pays for it

    getLogger("stagegraph").warning("warning: %s", text)
