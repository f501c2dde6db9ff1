"""The two errors of a bundle's users: a bundle that cannot be used, and a request that it cannot serve."""

from __future__ import annotations

MAX_SHOWN = 20


class BundleError(ValueError):
    """A bundle that cannot be used here; ``problems`` holds the first reasons, each with what to do about it."""

    def __init__(self, *problems: str) -> None:
        hidden = len(problems) - MAX_SHOWN
        self.problems = (*problems[:MAX_SHOWN], *([f"and {hidden:,} more problems"] if hidden > 0 else []))
        super().__init__("\n".join(self.problems))


class RequestError(ValueError):
    """A request that the loaded bundle cannot serve: ids it does not have, more text than its context holds."""
