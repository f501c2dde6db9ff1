"""The table of verbs, and the argument parser of each, for which only that verb's module is imported."""

from __future__ import annotations

import argparse
import importlib
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from stagegraph.cli.common import add_file, locate
from stagegraph.cli.layout import terminal_width
from stagegraph.errors import PipelineError, nearest, similar
from stagegraph.registry import Verb, find, names

OWN = {
    "init": Verb("stagegraph.cli.init", "write a first pipeline.yaml that fits what it is given"),
    "build": Verb("stagegraph.cli.build", "from nothing to real files: init if need be, run, export"),
    "run": Verb("stagegraph.cli.run", "do the work whose inputs changed, and nothing else"),
    "watch": Verb("stagegraph.cli.watch", "run again whenever a file changes that it depends on"),
    "status": Verb("stagegraph.cli.status", "say what a run would do and how long it would take"),
    "params": Verb("stagegraph.cli.params", "list every parameter, its value and where that comes from"),
    "explain": Verb("stagegraph.cli.explain", "say what changed since a node's result, and where that began"),
    "graph": Verb("stagegraph.cli.graph", "draw the DAG as text, Mermaid, Graphviz dot or SVG"),
    "show": Verb("stagegraph.cli.show", "look at outputs, views, parameters and cost, now or as of a run"),
    "compare": Verb("stagegraph.cli.compare", "put results of one kind side by side: a table, a picture"),
    "report": Verb("stagegraph.cli.report", "write one page of it all: graph, times, results, logs"),
    "diff": Verb("stagegraph.cli.diff", "say what differs between two results, runs or pipelines"),
    "lineage": Verb("stagegraph.cli.lineage", "follow a file back to its sources, parameters, code and tools"),
    "pull": Verb("stagegraph.cli.pull", "take results that the remotes have, and run nothing"),
    "push": Verb("stagegraph.cli.push", "give the results that are here to the remotes"),
    "remote": Verb("stagegraph.cli.remote", "list the remotes and who is believed; print your own key"),
    "runs": Verb("stagegraph.cli.runs", "list past runs, and what each did"),
    "log": Verb("stagegraph.cli.log", "print what a node prints as it runs, or printed"),
    "export": Verb("stagegraph.cli.export", "copy an artifact out as real files, all or nothing"),
    "du": Verb("stagegraph.cli.du", "show disk usage per node"),
    "gc": Verb("stagegraph.cli.gc", "remove earlier results from the store, never what is in use"),
    "clean": Verb("stagegraph.cli.clean", "remove what artifacts/ shows, or with --store all that was made"),
    "fsck": Verb("stagegraph.cli.fsck", "read and check every stored object"),
    "completion": Verb("stagegraph.cli.completion", "print the script that completes verbs, options and nodes"),
    "schema": Verb("stagegraph.cli.schema", "print the JSON Schema of pipeline.yaml for editors"),
}
ALIASES = {"why-not": "explain"}
# What other tools call it: word -> what it is here.
ELSEWHERE = {
    "ls": "status", "list": "status", "plan": "run --dry-run", "dry-run": "run --dry-run", "check": "status",
    "validate": "status", "lint": "status", "make": "run", "repro": "run", "exec": "run", "start": "run",
    "resume": "run", "why": "explain", "new": "init", "create": "init", "setup": "init", "info": "show", "cat": "show",
    "inspect": "show", "history": "runs", "logs": "log", "dag": "graph", "metrics": "compare", "exp": "compare",
    "copy": "export", "deploy": "export", "package": "export", "fetch": "pull", "download": "pull", "upload": "push",
    "rm": "clean", "remove": "clean", "delete": "clean", "clear": "clean", "prune": "gc", "doctor": "fsck",
    "df": "du", "test": "verify", "eval": "verify", "infer": "generate", "predict": "generate",
    "config": "params", "vars": "params", "set": "run --set NAME=VALUE", "version": "--version", "dev": "watch",
}  # fmt: skip
SUFFIXES = (".yaml", ".yml")
NO_VALUE = "has no value"
# What argparse says of an option -> what stands there instead.
REWORDED = {
    "invalid int value: (.*)": r"\1: found \2; expected a whole number",
    "invalid float value: (.*)": r"\1: found \2; expected a number",
    "expected one argument": rf"\1: {NO_VALUE}",
    "ignored explicit argument (.*)": r"\1: found \2; expected no value",
    r"not allowed with argument (\S+)": r"\1 and \2 contradict each other",
}
SELDOM = (
    "lineage",
    "pull",
    "push",
    "remote",
    "du",
    "clean",
    "fsck",
    "gc",
    "attest",
    "sign",
    "completion",
    "schema",
)  # which the list of verbs, to fit a screen, only names


def verb_names() -> list[str]:
    """Return every verb: ours in their order, then those of providers."""
    return [*OWN, *names("verbs")]


def find_verb(name: str) -> Verb:
    """Return a verb of ours or of a provider."""
    found: Verb | None = OWN.get(ALIASES.get(name, name)) or find("verbs", name)
    if found is not None:
        return found
    if name.startswith("-"):
        raise PipelineError(f"no verb before '{name}'; options follow it, as in `pipeline run {name}`")
    if (meant := ELSEWHERE.get(name)) or name.endswith(SUFFIXES):
        raise PipelineError(f"no verb '{name}'; here it is `pipeline {meant or f'run {name}'}`")
    advice = nearest(name, verb_names())
    raise PipelineError(f"no verb '{name}'{advice if 'mean' in advice else '; `pipeline help` lists them'}")


def build_parser(verb: str) -> argparse.ArgumentParser:
    """Return the parser of one verb."""
    found = find_verb(verb)
    loaded = importlib.import_module(found.module)
    example = f"example: {loaded.EXAMPLE}" if hasattr(loaded, "EXAMPLE") else None
    parser = _Parser(
        prog=f"pipeline {verb}",
        description=found.doc,
        epilog=example,
        allow_abbrev=False,
        formatter_class=_Help,
    )
    loaded.add_arguments(parser)
    if named := references(verb):
        for action in parser._actions:  # noqa: SLF001 - argparse tells its arguments in no other way
            if action.dest in named:
                action.help = f"{action.help}, or a node's name"
        add_file(parser)
    return parser


def references(verb: str) -> Sequence[str]:
    """Return the arguments of a provider's verb that may name a node in place of a path."""
    found: Sequence[str] = getattr(importlib.import_module(find_verb(verb).module), "REFERENCES", ())
    return found


class _Parser(argparse.ArgumentParser):
    """A parser that reports mistakes like all other errors, and suggests the nearest name."""

    def error(self, message: str) -> NoReturn:
        for text, instead in REWORDED.items():
            message = re.sub(f"^argument (?:-./)?(\\S+?): {text}", instead, message)
        option = message.partition(":")[0]
        if message == f"{option}: {NO_VALUE}":
            action = self._option_string_actions[option]
            raise PipelineError(f"{message}; expected {option} {action.metavar or '|'.join(action.choices or ())}")
        raise PipelineError(f"{message}; `{self.prog} --help` lists its arguments")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            name = action.option_strings[-1] if action.option_strings else action.metavar or action.dest.upper()
            raise PipelineError(f"{name}: unknown value '{value}'{nearest(value, map(str, action.choices))}")


class _Help(argparse.RawDescriptionHelpFormatter):
    """Options in a narrow column, so that most take one line of a terminal of 80 columns."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=20, width=terminal_width(80) - 2)  # its own imports shutil

    def _format_usage(self, *args: Any) -> str:
        return f"usage: {self._prog} [options]{_positionals(args[1])}\n\n"


def _positionals(actions: Iterable[argparse.Action]) -> str:
    names = [a for a in actions if not a.option_strings]
    given = [(a.metavar, getattr(a, "save_nargs", a.nargs)) for a in names]  # argparse hides it as it parses
    return "".join(f" [{name}]" if nargs == "?" else f" {name}" for name, nargs in given)


def parse(verb: str, argv: list[str]) -> argparse.Namespace:
    """Parse a verb's arguments; an unknown option is reported with the nearest known one."""
    parser = build_parser(verb)
    args, unknown = parser.parse_known_intermixed_args(argv)  # options may stand between arguments
    if unknown:
        # What follows an unknown option may be its value.
        pairs = zip(["", *unknown], unknown, strict=False)
        words = [word for before, word in pairs if word[:1] == "-" or before[:1] != "-"]
        raise PipelineError(*(_unknown(word, parser, unknown) for word in words))
    if getattr(args, "file", "") is None:
        args.file = locate()
    elif verb in OWN and hasattr(args, "file"):
        _check_file(args.file, parser)
    return args


def _unknown(word: str, parser: argparse.ArgumentParser, unknown: Sequence[str]) -> str:
    """Say that an argument is not known, and what may have been meant."""
    options, named = _options(parser), _named(parser)
    bare = {option.lstrip("-"): option for option in options}  # that both begin with dashes makes no two alike
    if word[:1] != "-":
        file = word.endswith(SUFFIXES) and _takes_file(parser)
        advice = f"`{parser.prog}` takes one pipeline file" if file else _meant(word, parser)
        return f"'{word}' is one argument too many; {advice}"
    if close := similar(word.partition("=")[0].lstrip("-"), bare):
        return f"unknown argument '{word}'; did you mean '{bare[close]}'?"
    if word == "--stage" and named:
        node = unknown[unknown.index(word) + 1 :][:1] or named
        return f"unknown argument '{word}'; a node is named as in `{parser.prog} {node[0]}`"
    return f"unknown argument '{word}'; `{parser.prog} --help` lists its arguments"


def _check_file(file: str, parser: argparse.ArgumentParser) -> None:
    """Refuse a node's name, a run or another file in the place of the pipeline file."""
    if Path(file).name == file != "" and not file.endswith(SUFFIXES) and not os.path.lexists(file):
        raise PipelineError(f"{file}: no such pipeline file; {_meant(file, parser)}")


def _meant(word: str, parser: argparse.ArgumentParser) -> str:
    """Say where a verb takes what stands in the place of its pipeline file, or too much."""
    option, what = ("--run", "a run") if word[:1] in {"@", "~"} else ("--stage", "a node")
    if option in _options(parser):
        return f"{what} is named as in `{parser.prog} {option} {word}`"
    if named := _named(parser):
        return f"`{parser.prog}` takes {' and '.join(f'one {name}' for name in named)}"
    if "-o" in _options(parser):
        return f"a file to write is named as in `{parser.prog} -o {word}`"
    return f"`{parser.prog}` takes {'a pipeline file alone' if _takes_file(parser) else 'options alone'}"


def _options(parser: argparse.ArgumentParser) -> list[str]:
    return [option for action in parser._actions for option in action.option_strings]  # noqa: SLF001 - no other way


def _takes_file(parser: argparse.ArgumentParser) -> bool:
    return any(action.dest == "file" for action in parser._actions)  # noqa: SLF001


def _named(parser: argparse.ArgumentParser) -> list[str]:
    """Return the arguments that name nodes and the like: all without an option but the pipeline file."""
    given = [action for action in parser._actions if not action.option_strings and action.dest != "file"]  # noqa: SLF001
    return [str(action.metavar) for action in given]


def usage() -> str:
    """Return the list of verbs."""
    import textwrap

    lines = [f"  {verb:<12}{find_verb(verb).doc}" for verb in verb_names() if verb not in SELDOM]
    seldom = textwrap.wrap(f"now and then: {', '.join(SELDOM)}", 80, subsequent_indent="  ")
    return "\n".join(["usage: pipeline VERB [arguments]", *lines, *seldom, "`pipeline VERB --help` explains one verb."])
