"""The two ways in which using a bundle can go wrong through somebody's mistake."""

from __future__ import annotations


class BundleError(ValueError):
    """A bundle that cannot be used here; ``problems`` holds every reason, each with what to do about it."""

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


class RequestError(ValueError):
    """A request that the loaded bundle cannot serve: ids it does not have, more text than its context holds."""
