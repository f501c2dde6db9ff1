"""``pipeline export REF DIR``: copies a result out of the store as independent files to ship; all of them or none."""

from __future__ import annotations

import argparse
from pathlib import Path

from stagegraph.api import Pipeline
from stagegraph.cli.common import add_file, shown, size_text

EXAMPLE = "pipeline export bundle.llvm:bundle dist/tiny-qwen"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "reference", metavar="REF", help="NODE, NODE@RUN, a key or a digest; with :PATH a file or folder"
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="the target directory; created if missing")
    add_file(parser)
    parser.add_argument("--force", action="store_true", help="replace an earlier export in DIR")
    parser.add_argument(
        "--unverified",
        action="store_true",
        help="export even if no later stage has passed it, or only with a reservation",
    )


def run(args: argparse.Namespace) -> int:
    """Run the verb."""
    with Pipeline(args.file, args.overrides) as pipeline:
        artifact, names, notes = pipeline.export(
            args.reference, args.directory, replace=args.force, unverified=args.unverified
        )
    size = sum((args.directory / name).stat().st_size for name in names)
    print(f"{artifact.label}: {len(names)} file{'s' * (len(names) != 1)}, {size_text(size)} in {shown(args.directory)}")
    for line in notes:
        print(f"  {line}")
    return 0
