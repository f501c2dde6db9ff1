"""Errors that list all problems found, and helpers that shorten such lists."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_SHOWN = 20  # problems of one kind


class ProblemsError(ValueError):
    """What is wrong, each of ``problems`` a complete sentence; rooms raise a class of their own made of this."""

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


def capped(problems: Sequence[str], what: str = "of this kind") -> list[str]:
    """Return the first problems of one kind, and how many more there are."""
    hidden = len(problems) - MAX_SHOWN
    return [*problems[:MAX_SHOWN], *([f"and {hidden:,} more {what}"] if hidden > 0 else [])]
