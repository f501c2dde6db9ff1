"""``pipeline chat BUNDLE``: talk with a bundle, in several turns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages.runtime import console

if TYPE_CHECKING:
    import argparse

EXAMPLE = "pipeline chat bundle.llvm"
REFERENCES = ("bundle",)  # arguments that may name a node's result instead of a path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    console.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run the verb; 0 ok, 2 bad usage or a bundle that cannot be used here."""
    return console.run(args)
