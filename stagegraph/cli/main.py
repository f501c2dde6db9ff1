"""The entry point of ``pipeline``: find the verb, import only its module, map errors to exit codes."""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import os
import signal
import sqlite3
import sys
from collections.abc import Iterable, Sequence
from types import FrameType
from typing import Any, NoReturn

from stagegraph.cli.common import add_file, print_json
from stagegraph.cli.streams import for_people, hanging
from stagegraph.errors import EXIT_INTERRUPTED, EXIT_PIPE, EXIT_STORE, EXIT_USAGE, PipelineError, nearest
from stagegraph.registry import VERBS

# Verb -> (module with add_arguments(parser) and run(args) -> exit code, one line of help).
TABLE = {
    "run": ("stagegraph.cli.run", "do the work whose inputs changed, and nothing else"),
    "status": ("stagegraph.cli.status", "say what a run would do and how long it would take"),
    "explain": ("stagegraph.cli.explain", "say what changed since a node's result, and where that began"),
    "graph": ("stagegraph.cli.graph", "draw the DAG as text, Mermaid, Graphviz dot or SVG"),
    "show": ("stagegraph.cli.show", "look at outputs, views, parameters and cost, now or as of a run"),
    "diff": ("stagegraph.cli.diff", "say what differs between two results, runs or pipelines"),
    "lineage": ("stagegraph.cli.lineage", "follow a file back to its sources, parameters, code and tools"),
    "runs": ("stagegraph.cli.runs", "list past runs, and what each did"),
    "log": ("stagegraph.cli.log", "print what a node prints as it runs, or printed"),
    "export": ("stagegraph.cli.export", "copy an artifact out as real files, all or nothing"),
    "du": ("stagegraph.cli.du", "say who uses the space of the store"),
    "gc": ("stagegraph.cli.gc", "remove earlier results from the store, never what is in use"),
    "fsck": ("stagegraph.cli.fsck", "read and check every stored object"),
    "completion": ("stagegraph.cli.completion", "print the script that completes verbs, options and nodes"),
    "schema": ("stagegraph.cli.schema", "print the JSON Schema of pipeline.yaml for editors"),
    "generate": (VERBS["generate"], "generate text from a bundle"),
    "chat": (VERBS["chat"], "talk with a bundle, in several turns"),
    "models": (VERBS["models"], "list the model families and what each supports"),
    "tokenize": (VERBS["tokenize"], "show how a tokenizer reads a text, and where another differs"),
}


def build_parser(verb: str) -> argparse.ArgumentParser:
    """Return the parser of one verb."""
    module, summary = TABLE[verb]
    loaded = importlib.import_module(module)
    example = f"example: {loaded.EXAMPLE}" if hasattr(loaded, "EXAMPLE") else None
    parser = _Parser(
        prog=f"pipeline {verb}",
        description=summary,
        epilog=example,
        allow_abbrev=False,
        formatter_class=_Help,
    )
    loaded.add_arguments(parser)
    if references := getattr(loaded, "REFERENCES", ()):
        for action in parser._actions:  # noqa: SLF001 - argparse tells its arguments in no other way
            if action.dest in references:
                action.help = f"{action.help}, or a node's name"
        add_file(parser)
    return parser


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with an argument as every other mistake is said, with what comes nearest."""

    def error(self, message: str) -> NoReturn:
        raise PipelineError(f"{message}; `{self.prog} --help` lists its arguments")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            name = action.option_strings[-1] if action.option_strings else action.metavar
            raise PipelineError(f"{name}: unknown value '{value}'{nearest(value, map(str, action.choices))}")


class _Help(argparse.RawDescriptionHelpFormatter):
    """Options in a narrow column, so that most take one line of a terminal of 80 columns."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=20)

    def _format_usage(self, *args: Any) -> str:
        return f"usage: {self._prog} [options]{_positionals(args[1])}\n\n"


def _positionals(actions: Iterable[argparse.Action]) -> str:
    names = [a for a in actions if not a.option_strings]
    return "".join(f" [{a.metavar}]" if a.nargs == "?" else f" {a.metavar}" for a in names)


def parse(verb: str, argv: list[str]) -> argparse.Namespace:
    """Parse a verb's arguments; an option it does not have is said with the nearest it has."""
    parser = build_parser(verb)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        options = [option for action in parser._actions for option in action.option_strings]  # noqa: SLF001 - no other way
        advice = f"; `pipeline {verb} --help` lists its arguments"
        raise PipelineError(*(f"unknown argument '{word}'{_near(word, options) or advice}" for word in unknown))
    return args


def _near(word: str, options: list[str]) -> str:
    found = nearest(word.partition("=")[0], options)
    return found if "did you mean" in found else ""


def usage() -> str:
    """Return the list of verbs."""
    lines = [f"  {verb:<12}{summary}" for verb, (_, summary) in TABLE.items()]
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
    if argv[0] == "complete":
        from stagegraph.cli.completion import complete

        print("\n".join(complete(argv[1:])))
        return 0
    if argv[0] not in TABLE:
        raise PipelineError(f"no verb '{argv[0]}'{nearest(argv[0], TABLE)}")
    args, module = parse(argv[0], argv[1:]), importlib.import_module(TABLE[argv[0]][0])
    with contextlib.ExitStack() as stack:
        for name in getattr(module, "REFERENCES", ()):
            from stagegraph.cli.reference import folder

            if (value := getattr(args, name)) is not None:
                setattr(args, name, stack.enter_context(folder(args, value)))
        code: int = module.run(args)
    return code


def main(argv: list[str] | None = None) -> None:
    """Run ``pipeline``; exits the process."""
    arguments = sys.argv[1:] if argv is None else argv
    gc.set_threshold(10_000)  # starting up makes many objects and next to no garbage
    signal.signal(signal.SIGTERM, _interrupt)
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
        code = _report([_system_error(error)], arguments, EXIT_STORE)
    try:
        sys.stdout.flush()
    except OSError as error:  # a pager was closed, or what takes the output is full
        if not isinstance(error, BrokenPipeError):
            print(f"error: standard output: {error.strerror}", file=sys.stderr)
            code = code or EXIT_STORE
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return code


def _report(problems: Sequence[str], arguments: Sequence[str], code: int) -> int:
    """Say what is wrong on stderr, and with ``--json`` in the one document on stdout too."""
    for problem in problems:
        print(f"error: {hanging(problem)}", file=sys.stderr)
    if "--json" in arguments:
        with contextlib.suppress(OSError):  # it may be what is wrong
            print_json({"ok": False, "problems": list(problems)})
    return code


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _system_error(error: Any) -> str:
    place = getattr(error, "filename", None)
    text = getattr(error, "strerror", None) or str(error)
    return f"{place}: {text}" if place else f"the store under artifacts/ cannot be used: {text}"


if __name__ == "__main__":
    main()
