"""What is wrong with a checkpoint, all of it at once, and lists of problems that stay short."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


class ConfigError(ValueError):
    """A config.json that cannot be built: every problem found, each a complete sentence."""

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


def capped(problems: Sequence[str], limit: int = 20) -> list[str]:
    """Return the first problems of one kind and how many more there are: one wrong number can make thousands."""
    hidden = len(problems) - limit
    return [*problems[:limit], *([f"and {hidden:,} more of this kind"] if hidden > 0 else [])]
