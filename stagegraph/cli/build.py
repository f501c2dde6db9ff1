"""``pipeline build SOURCE -o DIR``: writes a pipeline file, runs it and exports the attested result, in one command.

The pipeline is the one found here or in a folder above, with the path as its variable; where there is none, ``init``
writes one here first. Everything after that is ``run`` and ``export``.
"""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

from stagegraph.api import Pipeline
from stagegraph.cli import init
from stagegraph.cli import run as run_verb
from stagegraph.cli.common import add_set, locate, shown, size_text
from stagegraph.cli.layout import prose
from stagegraph.cli.verbs import parse
from stagegraph.errors import EXIT_OK, PlanError
from stagegraph.registry import Starter
from stagegraph.spec.load import load

EXAMPLE = "pipeline build /models/SmolLM2-135M-Instruct -o dist/smollm2"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    nouns = list(init.starters())
    parser.add_argument("source", metavar="|".join(nouns).upper(), help="; ".join(_docs()))
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", help="where to export (default: dist/NAME)")
    init.add_options(parser)
    parser.add_argument("--unverified", action="store_true", help="export even if no later stage has passed it")
    parser.add_argument("-q", "--quiet", action="store_true", help="print problems only")
    add_set(parser)


def _docs() -> list[str]:
    return [starter.doc for starter in init.starters().values()]


def run(args: argparse.Namespace) -> int:
    """Run the verb."""
    noun, starter = next(iter(init.starters().items()))
    begun = init.start(noun, args.source, args)
    file = locate()
    settings: list[str] = []
    if Path(file).exists():
        wanted = {noun: _named(begun.source), **begun.settings}
        settings = [f"{name}={json.dumps(value)}" for name, value in wanted.items() if not _is_so(file, name, value)]
    else:
        written = init.write(Path(), begun)
        print(f"wrote {', '.join(map(shown, written))}")
    overrides = [*settings, *args.overrides]
    words = [word for setting in overrides for word in ("--set", setting)]
    code = run_verb.run(parse("run", [file, *words, *(["--quiet"] if args.quiet else [])]))
    return code or _export(file, overrides, starter, args)


def _named(source: Path | str) -> str:
    return str(source.absolute()) if isinstance(source, Path) else source


def _is_so(file: str, name: str, wanted: Any) -> bool:
    """Say whether a variable of the pipeline file already has this value; paths are compared by where they lead."""
    item = load(Path(file)).variables.get(name)
    if item is None:
        return False
    value = [part.value for part in item.value] if isinstance(item.value, list) else item.value
    same_path = isinstance(value, str) and Path(item.base, value).resolve() == Path(str(wanted)).resolve()
    return value == wanted or same_path


def _export(file: str, overrides: list[str], starter: Starter, args: argparse.Namespace) -> int:
    """Export every result of a stage, each into a folder of its own if there are several."""
    problems: list[str] = []
    exported: list[Path] = []
    with Pipeline(file, overrides) as pipeline:
        nodes = [node for node in pipeline.dag.nodes if node.stage.id == starter.exports]
        target = args.output or Path("dist", pipeline.name)
        for node in nodes:
            folder = target / "-".join(node.spec.each.values()) if len(nodes) > 1 else target
            ((_, out), *_) = node.stage.outputs.items()
            try:
                artifact, files, notes = pipeline.export(
                    f"{node.name}:{out.path}", folder, replace=True, unverified=args.unverified
                )
            except PlanError as error:
                problems += error.problems
                continue
            size = size_text(sum((folder / name).stat().st_size for name in files))
            print(prose("\n".join([f"{artifact.label}: {len(files)} files, {size} in {shown(folder)}", *notes])))
            exported.append(folder)
    if problems:
        raise PlanError(*dict.fromkeys(problems))
    if exported and starter.then and not args.quiet:
        folder = shlex.quote(shown(exported[0]))
        print("next: " + ", or ".join(f"pipeline {verb} {folder}" for verb in starter.then))
    return EXIT_OK
