"""``pipeline clean``: removes the files shown under ``artifacts/``, which a run restores, or the whole store.

Only what nodes have shown there goes: what somebody else put beside it is named, and stays.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from stagegraph.api import Pipeline
from stagegraph.cli.common import add_file, shown, size_text
from stagegraph.errors import EXIT_OK, PlanError, listed
from stagegraph.files import dotted, remove_tree
from stagegraph.store.leftovers import disk_bytes

EXAMPLE = "pipeline clean --store"
NAME = re.compile(r"[^/\0]+")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_file(parser)
    add = parser.add_argument
    add(
        "--store",
        action="store_true",
        help="remove the store too: results, logs and runs of all pipelines beside this one",
    )
    add("-y", "--yes", action="store_true", help="do not ask for confirmation; --store requires it without a terminal")


def run(args: argparse.Namespace) -> int:
    """Run the verb."""
    with Pipeline(args.file, args.overrides) as pipeline:
        workspace = pipeline.workspace
        folder = workspace.artifacts if args.store else workspace.artifacts / pipeline.name
        if not folder.is_dir() or not workspace.root.is_dir():
            print(f"{shown(folder)} is {'no store' if folder.is_dir() else 'not there'}: nothing to remove")
            return EXIT_OK
        size = size_text(disk_bytes(workspace)[0])
        if args.store and not (args.yes or _agreed(f"remove {shown(folder)}, {size}, with every result in it?")):
            return EXIT_OK
        with workspace.alone():
            busy = [path.name for path in workspace.work.glob("*") if workspace.is_running(path.name)]
            if busy:
                raise PlanError("a run is under way; end it first, or wait for it")
            left = _remove(pipeline, store=args.store)
    restored = f"; {size} are gone" if args.store else "; its results are in the store: `pipeline run` shows them again"
    print(f"removed {shown(folder)}{restored}")
    if left:
        print(f"left there, as it is of no node: {listed(map(shown, left))}")
    return EXIT_OK


def _remove(pipeline: Pipeline, *, store: bool) -> list[Path]:
    """Remove the folders of all nodes that are known, and the store if asked for; return what else is there."""
    workspace = pipeline.workspace
    known = (name.split("/", 1) for name in workspace.lasts())  # as the index says, which may be anybody's
    nodes = [*filter(_is_inside, known), *([pipeline.name, node] for node in pipeline.nodes)]
    owners = {name for name, _ in nodes} if store else {pipeline.name}
    for name, node in nodes:
        if name in owners:
            remove_tree(workspace.node_dir(name, node))
    folders = [workspace.artifacts / name for name in sorted(owners)]
    if store:
        remove_tree(workspace.root)
        folders.append(workspace.artifacts)
    for folder in folders:
        with contextlib.suppress(OSError):  # there is more in it, or it was never made
            folder.rmdir()
    found = [path for folder in folders if folder.is_dir() for path in sorted(folder.iterdir())]
    return [path for path in found if path not in folders]


def _is_inside(names: Sequence[str]) -> bool:
    """Say whether the names of a pipeline and a node are those of one folder in another."""
    folders = (names[0], dotted(names[-1]))
    return len(names) == 2 and all(name not in {".", ".."} and NAME.fullmatch(name) for name in folders)


def _agreed(question: str) -> bool:
    """Ask for confirmation; refuse without a terminal, since nobody could answer."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise PlanError(f"{question} there is no terminal to ask at: -y says yes")
    if input(f"{question} [y/N] ").strip().lower() in {"y", "yes"}:
        return True
    print("nothing was removed")
    return False
