"""``pipeline watch``: runs again whenever a pipeline file, a source or the code of a node changes.

Every run, and every look for what those files are, is a process of its own: stages that were edited are imported anew.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from stagegraph.cli.common import add_file, add_selection
from stagegraph.digest import stat_id
from stagegraph.errors import EXIT_USAGE, PipelineError

EXAMPLE = "pipeline watch --stage compile.llvm"
POLL_SECONDS = 0.5
SETTLE_SECONDS = 0.2  # an editor writes several files
Seen = dict[str, list[int] | None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_file(parser)
    add_selection(parser)
    parser.add_argument("-j", "--jobs", type=int, metavar="N", help="how many nodes at once")


def run(args: argparse.Namespace) -> int:
    """Run the verb, until it is interrupted."""
    words = [word for setting in args.overrides for word in ("--set", setting)]
    chosen = (("--stage", args.stage), ("--from", args.start), ("--until", args.until))
    selection = [word for option, names in chosen for name in names for word in (option, name)]
    jobs = ["-j", str(args.jobs)] if args.jobs else []
    files, first = [args.file], True
    while True:
        files = _files(args.file, words) or files  # a mistake in the file: what it was read from before
        before = _seen(files)
        done = subprocess.run([*_pipeline("run"), args.file, *words, *selection, *jobs], check=False)
        if first and done.returncode == EXIT_USAGE:  # of the command line, perhaps, which no edit mends
            return EXIT_USAGE
        first = False
        files = _files(args.file, words) or files  # with the code of nodes whose inputs were not there before
        seen = _seen(files) | before
        print(f"watching {len(files)} file{'s' * (len(files) > 1)}; Ctrl-C ends it", file=sys.stderr, flush=True)
        while _seen(list(seen)) == seen:
            time.sleep(POLL_SECONDS)
        time.sleep(SETTLE_SECONDS)


def _pipeline(verb: str) -> list[str]:
    return [sys.executable, "-P", "-m", "stagegraph.cli.main", verb]


def _files(file: str, settings: Sequence[str]) -> list[str]:
    """Return the files to watch, from a fresh process that has no modules loaded; none if that reports an error."""
    command = [sys.executable, "-P", "-m", "stagegraph.cli.watch", file, *settings[1::2]]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False)
    found: list[str] = json.loads(done.stdout) if done.returncode == 0 else []
    return found


def _seen(files: Sequence[str]) -> Seen:
    """Return the stat of each file, by which a change is noticed; None for one that is missing."""
    found: Seen = {}
    for file in files:
        try:
            status = os.stat(file)  # noqa: PTH116 - a folder too
        except OSError:
            found[file] = None
        else:
            folder = os.path.isdir(file)  # noqa: PTH112
            found[file] = [status.st_mtime_ns] if folder else list(stat_id(Path(file)))
    return found


def watched(file: str, settings: Sequence[str]) -> list[str]:
    """Return the files that a pipeline was read from, the code and the sources of its nodes, and the latters' folders,
    in which files may appear.
    """
    from stagegraph.project import Project
    from stagegraph.spec.item import Reads
    from stagegraph.spec.load import load

    reads = Reads()
    load(Path(file), settings, reads=reads)
    found = dict.fromkeys(reads.files)
    with Project(file, settings) as project:
        for decision in project.planner.plan(project.dag.nodes):
            prepared = project.planner.prepared(decision.node)
            for name, state in prepared.sources.items():
                given: str = getattr(prepared.params, name)
                found |= dict.fromkeys([given, *map(str, state.files.values())])
            found |= dict.fromkeys(map(str, project.planner.code_files(decision).values()))
    return list(found)


if __name__ == "__main__":
    try:
        print(json.dumps(watched(sys.argv[1], sys.argv[2:])))
    except PipelineError:
        sys.exit(1)
