"""``pipeline init``: a folder with a first pipeline.yaml, made for what it is given and for this machine."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from stagegraph.cli.common import DEFAULT_FILE, shown
from stagegraph.errors import PlanError
from stagegraph.registry import Starter, find, names

EXAMPLE = "pipeline init my-model --checkpoint /models/SmolLM2-135M-Instruct"
IGNORED = "artifacts/"
SCHEMA = "pipeline.schema.json"


class Start(NamedTuple):
    """What a pipeline is begun with: the starter's module, the path it was given, what it has found there, and the
    variables that were asked for.
    """

    noun: str
    module: Any
    path: Path
    examined: Any
    settings: Mapping[str, Any]


def starters() -> Mapping[str, Starter]:
    """Return every starter by the kind of thing it begins with."""
    return {noun: find("starters", noun) for noun in names("starters")}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare what the starters let one choose."""
    for starter in starters().values():
        importlib.import_module(starter.module).add_arguments(parser)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("directory", nargs="?", type=Path, default=Path(), metavar="DIR", help="default: this one")
    for noun, starter in starters().items():
        parser.add_argument(f"--{noun}", type=Path, metavar="PATH", help=starter.doc)
    add_options(parser)


def run(args: argparse.Namespace) -> int:
    """Run the verb."""
    given = {noun: path for noun in starters() if (path := getattr(args, noun)) is not None}
    if not given:
        raise PlanError(f"what is it made for? add {' or '.join(f'--{noun} PATH' for noun in starters())}")
    ((noun, path), *_) = given.items()
    written = write(args.directory, start(noun, path, args))
    print(f"wrote {', '.join(shown(file) for file in written)}")
    inside = "" if args.directory.resolve() == Path.cwd() else f"cd {shown(args.directory)} && "
    print(f"next: {inside}pipeline run")
    return 0


def start(noun: str, path: Path, args: argparse.Namespace) -> Start:
    """Return what a starter has found at a path; :class:`PlanError` if nothing can be begun with that."""
    module = importlib.import_module(starters()[noun].module)
    try:
        return Start(noun, module, path, module.examine(path), module.settings(args))
    except ValueError as error:
        raise PlanError(*str(error).split("\n")) from None


def write(folder: Path, begun: Start) -> list[Path]:
    """Write a pipeline file, what git is to ignore, and the schema for editors; return the files that are new."""
    import json

    from stagegraph.spec.schema import json_schema

    file = folder / DEFAULT_FILE
    if file.exists():
        raise PlanError(f"{shown(file)} exists already; edit it, or name another folder: `pipeline init DIR`")
    text = begun.module.compose(begun.path, begun.examined, begun.settings, folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = [file, folder / SCHEMA]
    file.write_text(text, encoding="utf-8")
    written[1].write_text(json.dumps(json_schema(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    ignore = folder / ".gitignore"
    have = ignore.read_text(encoding="utf-8") if ignore.exists() else ""
    if IGNORED not in have.splitlines():
        ignore.write_text(have + ("\n" if have and not have.endswith("\n") else "") + IGNORED + "\n", encoding="utf-8")
        written.append(ignore)
    return written
