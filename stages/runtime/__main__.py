"""``python -m stages.runtime [generate|chat|serve|selftest] BUNDLE``: what needs only this folder and TVM."""

from __future__ import annotations

import argparse
import difflib
import sys

from stages.runtime import command, console, selftest
from stages.runtime.server import command as serve

COMMANDS = {"generate": command, "chat": console, "serve": serve, "selftest": selftest}


def main() -> int:
    """Parse the command line and run it; without the name of a command it is generate."""
    name, *arguments = sys.argv[1:] if sys.argv[1:2] and sys.argv[1] in COMMANDS else ["generate", *sys.argv[1:]]
    parser = argparse.ArgumentParser(
        prog=f"python -m stages.runtime {name}",
        description="Continue a prompt with a bundle; with `chat` as the first argument, talk with it, with `serve` "
        "let other programs use it, with `selftest` hold it against its certificate.",
        allow_abbrev=False,
    )
    COMMANDS[name].add_arguments(parser)
    args, unknown = parser.parse_known_args(arguments)
    if unknown:
        options = [option for action in parser._actions for option in action.option_strings]  # noqa: SLF001 - no other way
        close = difflib.get_close_matches(unknown[0].partition("=")[0], options, n=1, cutoff=0.6)
        parser.error(f"unknown argument {unknown[0]}" + (f"; did you mean {close[0]}?" if close else ""))
    code: int = COMMANDS[name].run(args)
    return code


if __name__ == "__main__":
    sys.exit(main())
