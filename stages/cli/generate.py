"""``pipeline generate BUNDLE --prompt TEXT``: stream the continuation of a prompt from a bundle."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages.runtime import command

if TYPE_CHECKING:
    import argparse

EXAMPLE = "pipeline generate bundle.llvm --prompt 'It was'"
REFERENCES = ("bundle",)  # arguments that may name a node's result instead of a path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    command.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run the verb; 0 ok, 2 bad usage or a bundle that cannot be used here."""
    return command.run(args)
