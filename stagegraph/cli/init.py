"""``pipeline init``: creates a folder with a first pipeline.yaml that suits the given source and this machine."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from stagegraph.cli.common import DEFAULT_FILE, shown
from stagegraph.errors import PlanError, tell
from stagegraph.planning.sources import MARK
from stagegraph.registry import Starter, find, names

if TYPE_CHECKING:
    from stagegraph.stage import JsonObject

EXAMPLE = "pipeline init my-model --checkpoint /models/SmolLM2-135M-Instruct"
IGNORED = "artifacts/"
SCHEMA = "pipeline.schema.json"


class Start(NamedTuple):
    """The input of a new pipeline file: the starter's module, the path or pinned URL that it was given, what it found
    there, and the variables to set.
    """

    noun: str
    module: Any
    source: Path | str
    examined: Any
    settings: JsonObject


def starters() -> Mapping[str, Starter]:
    """Return every starter by the kind of thing it begins with."""
    return {noun: find("starters", noun) for noun in names("starters")}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the starters."""
    for starter in starters().values():
        importlib.import_module(starter.module).add_arguments(parser)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("directory", nargs="?", type=Path, default=Path(), metavar="DIR", help="default: this one")
    for noun, starter in starters().items():
        parser.add_argument(f"--{noun}", metavar="PATH", help=starter.doc)
    add_options(parser)


def run(args: argparse.Namespace) -> int:
    """Run the verb."""
    given = {noun: text for noun in starters() if (text := getattr(args, noun)) is not None}
    if not given:
        raise PlanError(_not_given(args.directory))
    ((noun, text), *_) = given.items()
    if MARK in text:
        _check_new(args.directory)  # before anything is fetched
    written = write(args.directory, start(noun, text, args))
    print(f"wrote {', '.join(shown(file) for file in written)}")
    inside = "" if args.directory.resolve() == Path.cwd() else f"cd {shown(args.directory)} && "
    print(f"next: {inside}pipeline run")
    return 0


def _not_given(place: Path) -> str:
    """Ask what the pipeline is for; if that was named as the folder to write, say how it is named."""
    for noun, starter in starters().items():
        with contextlib.suppress(ValueError):
            if place != Path():
                importlib.import_module(starter.module).examine(place)
                return f"{place} is a {noun}: `pipeline init --{noun} {shlex.quote(str(place))}` is for it"
    return f"what is it made for? add {' or '.join(f'--{noun} PATH' for noun in starters())}"


def start(noun: str, text: str, args: argparse.Namespace) -> Start:
    """Return what a starter found at a path or URL; :class:`PlanError` if no starter recognises it.

    What a URL names is fetched, as a run would; one that names no content yet is pinned to what it names now.
    """
    module = importlib.import_module(starters()[noun].module)
    try:
        settings, text = module.settings(args), module.named(text)  # before anything is fetched
        source, path = _fetched(text, module) if MARK in text else (Path(text), Path(text))
        return Start(noun, module, source, module.examine(path), settings)
    except ValueError as error:
        raise PlanError(*str(error).split("\n")) from None


def _fetched(url: str, module: Any) -> tuple[str, Path]:
    """Return a URL with the revision it names now, and the local path of the files that a starter reads."""
    from stagegraph.planning.urls import fetch, pinned

    try:
        found = pinned(url)
        if found != url:
            tell(f"{url} is {found} now")
        tell(f"fetching what is not here yet of {found}")
        return found, fetch(found, module.READ, module.ALONE)
    except (ValueError, OSError) as error:
        raise PlanError(f"{url}: {error}") from None


def _check_new(folder: Path) -> None:
    file = folder / DEFAULT_FILE
    if folder.exists() and not folder.is_dir():
        raise PlanError(f"{shown(folder)}: is a file; expected the folder to write into")
    if file.exists():
        raise PlanError(f"{shown(file)} exists already; edit it, or name another folder: `pipeline init DIR`")


def write(folder: Path, begun: Start) -> list[Path]:
    """Write a pipeline file, a .gitignore and the schema for editors; return the new files."""
    import json

    from stagegraph.spec.schema import json_schema

    _check_new(folder)
    file = folder / DEFAULT_FILE
    text = begun.module.compose(begun.source, begun.examined, begun.settings, folder)
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
