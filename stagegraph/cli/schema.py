"""``pipeline schema``: the JSON Schema of pipeline files, generated from the stages that are installed."""

from __future__ import annotations

import argparse

from stagegraph.cli.common import print_json

EXAMPLE = "pipeline schema > pipeline.schema.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """There are none."""


def run(_args: argparse.Namespace) -> int:
    """Run the verb."""
    from stagegraph.spec.schema import json_schema

    print_json(json_schema())
    return 0
