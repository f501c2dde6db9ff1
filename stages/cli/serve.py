"""``pipeline serve BUNDLE...``: let other programs use bundles, by the OpenAI API."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages.runtime.server import command

if TYPE_CHECKING:
    import argparse

EXAMPLE = "pipeline serve 'bundle[llvm]'"
REFERENCES = ("bundles",)  # arguments that may name a node's result instead of a path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    command.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run the verb; 0 once it was told to stop, 2 bad usage or a bundle that cannot be used here."""
    return command.run(args)
