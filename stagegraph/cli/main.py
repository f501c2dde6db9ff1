"""The entry point of ``pipeline``: find the verb, import only its module, map errors to exit codes."""

from __future__ import annotations

import contextlib
import errno
import gc
import importlib
import os
import signal
import sqlite3
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from stagegraph.cli.common import print_json
from stagegraph.cli.layout import prose
from stagegraph.cli.streams import exactly, for_people, hanging
from stagegraph.cli.verbs import find_verb, parse, usage
from stagegraph.errors import EXIT_INTERRUPTED, EXIT_PIPE, EXIT_STORE, EXIT_USAGE, REMOVE, PipelineError

# What a directory, a pipe or a link in a circle answers where a file is expected.
NO_FILE = frozenset({errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.EINVAL})


def dispatch(argv: list[str]) -> int:
    """Run one command line and return its exit code."""
    if not argv or argv[0] in {"-h", "--help", "help"}:
        if argv[1:] and not argv[1].startswith("-") and argv[1] != "help":
            return dispatch([argv[1], "--help"])
        print(usage())
        return 0 if argv else EXIT_USAGE
    if argv[0] == "--version":
        from stagegraph.tools import dist_versions

        print(f"stagegraph {dist_versions('stagegraph')['stagegraph']}")
        return 0
    if argv[0] == "complete":
        from stagegraph.cli.completion import complete

        print("\n".join(complete(argv[1:])))
        return 0
    module = importlib.import_module(find_verb(argv[0]).module)
    args = parse(argv[0], argv[1:])
    with contextlib.ExitStack() as stack:
        for name in getattr(module, "REFERENCES", ()):
            from stagegraph.cli.reference import folder, folders

            value = getattr(args, name)
            if isinstance(value, list):
                setattr(args, name, stack.enter_context(folders(args, value)))
            elif value is not None:
                setattr(args, name, stack.enter_context(folder(args, value)))
        code: int = module.run(args)
    return code


def main(argv: list[str] | None = None) -> None:
    """Run ``pipeline``; exits the process."""
    arguments = sys.argv[1:] if argv is None else argv
    gc.set_threshold(10_000)  # starting up makes many objects and next to no garbage
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # a parent's SIG_IGN, which is inherited, hides how children end
    with for_people():
        code = _run(arguments)
    sys.exit(code)


def _run(arguments: list[str]) -> int:
    """Run one command line; every error becomes a message and an exit code."""
    try:
        code = dispatch(arguments)
    except PipelineError as error:
        code = _report(error.problems, arguments, error.exit_code)
    except KeyboardInterrupt:
        rest = "; run again to continue where this stopped" if arguments[:1] == ["run"] else ""
        print(f"interrupted{rest}", file=sys.stderr)
        code = EXIT_INTERRUPTED
    except BrokenPipeError:
        code = EXIT_PIPE
    except (OSError, sqlite3.DatabaseError) as error:
        wrong_name = isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG  # a name that no file can have
        code = _report([_system_error(error)], arguments, EXIT_USAGE if wrong_name else EXIT_STORE)
    try:
        sys.stdout.flush()
    except OSError as error:  # a pager was closed, or what takes the output is full
        if not isinstance(error, BrokenPipeError):
            print(f"error: standard output: {error.strerror}", file=sys.stderr)
            code = code or EXIT_STORE
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    try:
        exactly(sys.stderr).flush()
    except OSError:  # nobody can be told, and Python would end with a status of its own
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    return code


def _report(problems: Sequence[str], arguments: Sequence[str], code: int) -> int:
    """Say what is wrong on stderr, and with ``--json`` in the one document on stdout too."""
    for problem in problems:
        print(prose(f"error: {hanging(problem)}", sys.stderr), file=sys.stderr)
    if "--json" in arguments:
        with contextlib.suppress(OSError):  # it may be what is wrong
            print_json({"ok": False, "problems": list(problems)})
    return code


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _system_error(error: Any) -> str:
    place = getattr(error, "filename", None)
    text = getattr(error, "strerror", None) or str(error)
    if place and error.errno in NO_FILE and ".stagegraph" in Path(str(place)).parts:
        return f"{_in_the_way(Path(str(place)))}: {text}; {REMOVE}"
    if not place and getattr(error, "errno", None) == errno.ENOENT:
        return "the folder that this was called in is gone; `cd` to one that is there"
    return f"{place!s:.300}: {text}" if place else f"the store under artifacts/ cannot be used: {text}"


def _in_the_way(place: Path) -> Path:
    """Return the first part of a path that is there and no folder, as it has to be; else the path itself."""
    return next((part for part in reversed(place.parents) if os.path.lexists(part) and not part.is_dir()), place)


if __name__ == "__main__":
    main()
