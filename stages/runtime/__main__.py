"""``python -m stages.runtime BUNDLE --prompt TEXT``: continue a prompt where only this folder and TVM's runtime are."""

from __future__ import annotations

import argparse
import sys

from stages.runtime import command


def main() -> int:
    """Parse the command line and run it."""
    parser = argparse.ArgumentParser(prog="python -m stages.runtime", description="Continue a prompt with a bundle.")
    command.add_arguments(parser)
    return command.run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
