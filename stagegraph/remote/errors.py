"""What may go wrong with a remote."""

from __future__ import annotations


class RemoteError(Exception):
    """A remote does not do what is asked of it: it is away, refuses, or is full."""


class RangeError(RemoteError):
    """A remote cannot give an object from the middle on."""


class StoppedError(Exception):
    """The run was abandoned."""


class MismatchError(Exception):
    """What came is not what was asked for."""
