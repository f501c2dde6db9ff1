"""``pipeline verify BUNDLE``: hold a bundle against its certificate on this machine; pass or fail."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages.runtime import selftest

if TYPE_CHECKING:
    import argparse

EXAMPLE = "pipeline verify dist/tiny-qwen"
REFERENCES = ("bundle", "certificate")  # arguments that may name a node's result instead of a path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    selftest.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run the verb; 0 pass, 1 fail, 2 no result: what cannot be read, or not be run here."""
    return selftest.run(args)
