"""The entry point of ``pipeline``: find the verb, import only its module, map errors to exit codes."""

from __future__ import annotations

import argparse
import gc
import importlib
import io
import json
import os
import signal
import sqlite3
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any

from stagegraph.errors import EXIT_INTERRUPTED, EXIT_PIPE, EXIT_STORE, EXIT_USAGE, PipelineError, nearest
from stagegraph.registry import VERBS

# Verb -> (module with add_arguments(parser) and run(args) -> exit code, one line of help).
TABLE = {
    "run": ("stagegraph.cli.run", "bring nodes up to date: do the work whose inputs changed, nothing else"),
    "status": ("stagegraph.cli.status", "say what a run would do, without running"),
    "explain": ("stagegraph.cli.explain", "say what changed since a node's last result, and where that began"),
    "graph": ("stagegraph.cli.graph", "draw the DAG as text, Mermaid or Graphviz dot"),
    "show": ("stagegraph.cli.show", "look at a node: its outputs, views, parameters, cost"),
    "log": ("stagegraph.cli.log", "print what a node printed when it last ran"),
    "fsck": ("stagegraph.cli.fsck", "read and check every stored object"),
    "schema": ("stagegraph.cli.schema", "print the JSON Schema of pipeline.yaml for editors"),
    "generate": (VERBS["generate"], "generate text from a bundle"),
    "models": (VERBS["models"], "list the model families, what each supports and the config keys it honours"),
    "tokenize": (VERBS["tokenize"], "show how a bundle's tokenizer reads a text, and where another differs"),
}


def build_parser(verb: str) -> argparse.ArgumentParser:
    """Return the parser of one verb."""
    module, summary = TABLE[verb]
    parser = argparse.ArgumentParser(prog=f"pipeline {verb}", description=summary, allow_abbrev=False)
    importlib.import_module(module).add_arguments(parser)
    return parser


def usage() -> str:
    """Return the list of verbs."""
    lines = [f"  {verb:<10}{summary}" for verb, (_, summary) in TABLE.items()]
    return "usage: pipeline VERB [arguments]\n\n" + "\n".join(lines) + "\n\n`pipeline VERB --help` explains one verb."


def dispatch(argv: list[str]) -> int:
    """Run one command line and return its exit code."""
    if not argv or argv[0] in {"-h", "--help", "help"}:
        print(usage())
        return 0 if argv else EXIT_USAGE
    if argv[0] == "--version":
        from stagegraph.tools import dist_versions

        print(f"stagegraph {dist_versions('stagegraph')['stagegraph']}")
        return 0
    if argv[0] not in TABLE:
        raise PipelineError(f"no verb '{argv[0]}'{nearest(argv[0], TABLE)}")
    args = build_parser(argv[0]).parse_args(argv[1:])
    code: int = importlib.import_module(TABLE[argv[0]][0]).run(args)
    return code


def main(argv: list[str] | None = None) -> None:
    """Run ``pipeline``; exits the process."""
    arguments = sys.argv[1:] if argv is None else argv
    gc.set_threshold(10_000)  # starting up makes many objects and next to no garbage
    signal.signal(signal.SIGTERM, _interrupt)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character still gets the rest
    try:
        code = dispatch(arguments)
    except PipelineError as error:
        code = _report(error.problems, arguments, error.exit_code)
    except KeyboardInterrupt:
        print("interrupted; run again to continue where this stopped", file=sys.stderr)
        code = EXIT_INTERRUPTED
    except BrokenPipeError:
        code = EXIT_PIPE
    except (OSError, sqlite3.DatabaseError) as error:
        code = _report([_system_error(error)], arguments, EXIT_STORE)
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # a pager was closed
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(code)


def _report(problems: Sequence[str], arguments: Sequence[str], code: int) -> int:
    """Say what is wrong on stderr, and with ``--json`` in the one document on stdout too."""
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if "--json" in arguments:
        print(json.dumps({"ok": False, "problems": list(problems)}, indent=1, ensure_ascii=False))
    return code


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _system_error(error: Any) -> str:
    place = getattr(error, "filename", None)
    text = getattr(error, "strerror", None) or str(error)
    return f"{place}: {text}" if place else f"the store under artifacts/ cannot be used: {text}"


if __name__ == "__main__":
    main()
