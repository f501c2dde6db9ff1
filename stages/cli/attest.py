"""``pipeline attest BUNDLE RESULT.json``: stores the result of a selftest on another machine beside the bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from stages.runtime import attestations, certificate, manifest, serving

if TYPE_CHECKING:
    import argparse

EXAMPLE = "pipeline attest dist/tiny-qwen result.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    serving.bundle_argument(parser)
    parser.add_argument(
        "result", type=Path, metavar="RESULT", help="what `python -m stages.runtime selftest --output RESULT` wrote"
    )


def run(args: argparse.Namespace) -> int:
    """Run the verb; 0 if it is kept, 2 if it is of another bundle, or damaged."""
    return serving.guarded(_run, args)


def _run(args: argparse.Namespace, out: TextIO, _err: TextIO) -> int:
    bundle = manifest.read(args.bundle)
    sealed = certificate.of(bundle.root)
    out.write(attestations.keep(bundle, sealed, args.result))
    return 0
