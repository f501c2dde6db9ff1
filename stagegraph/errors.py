"""The one family of errors a user may see, by phase; the process boundary maps each to an exit code.

A message says what is wrong, where (``file:line:column``, a node, a part of an input) and what to do. All problems
that a phase finds travel in one error, so that a user mends them in one go.
"""

from __future__ import annotations

from collections.abc import Iterable

EXIT_OK, EXIT_NODE_FAILED, EXIT_USAGE, EXIT_STORE, EXIT_WORK_TO_DO, EXIT_INTERRUPTED = 0, 1, 2, 3, 4, 130
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
    """Return ``"; did you mean 'x'?"`` for the closest known name, or the list of known names if none is close."""
    names = sorted(set(known))
    if close := similar(name, names):
        return f"; did you mean '{close}'?"
    return f"; known: {', '.join(names)}" if names else ""


def tell(text: str) -> None:
    """Say on stderr what takes long, unless a program has its own handlers of Python's ``logging``."""
    from logging import getLogger

    getLogger("stagegraph").warning("%s", text)


def warn(text: str) -> None:
    """Tell whoever runs this; on stderr, unless a program has its own handlers of Python's ``logging``."""
    from logging import getLogger  # only trouble pays for it

    getLogger("stagegraph").warning("warning: %s", text)
