"""``pipeline report``: writes a self-contained HTML page, without scripts, to read, print and send."""

from __future__ import annotations

import argparse
from pathlib import Path

from stagegraph.api import Pipeline
from stagegraph.cli.common import add_file, write_text

EXAMPLE = "pipeline report -o report.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_file(parser)
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("report.html"), metavar="FILE", help="default: report.html"
    )
    parser.add_argument(
        "--run", metavar="RUN", help="the run in the timeline: digits of its id, or @~N (default: last)"
    )


def run(args: argparse.Namespace) -> int:
    """Run the verb."""
    from stagegraph.cli.report_page import page
    from stagegraph.query.overview import overview

    with Pipeline(args.file, args.overrides) as pipeline:
        text = page(pipeline, overview(pipeline, args.run))
    write_text(args.output, text)
    return 0
