"""``pipeline fsck``: read every stored object and compare it with its name; quarantine what does not match."""

from __future__ import annotations

import argparse

from stagegraph.api import Pipeline
from stagegraph.cli.common import add_file, print_json, shown, size_text
from stagegraph.errors import EXIT_OK, EXIT_STORE
from stagegraph.record import record_files
from stagegraph.workspace import Workspace

EXAMPLE = "pipeline fsck --json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_file(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout")


def run(args: argparse.Namespace) -> int:
    """Run the verb."""
    with Pipeline(args.file, args.overrides) as work:
        workspace = work.workspace
        checked = size = 0
        bad: dict[str, str] = {}
        for digest in list(workspace.store.digests()):
            size += workspace.store.path(digest).stat().st_size
            checked += 1
            wrong = workspace.store.check(digest)
            if wrong:
                bad[digest] = wrong
        missing = _missing(workspace)
        if args.json:
            print_json({"checked": checked, "bytes": size, "damaged": bad, "missing": missing})
        else:
            print(f"{checked} objects, {size_text(size)} read")
            for digest, wrong in bad.items():
                moved = f" (moved to {shown(workspace.store.quarantine)})" if wrong == "damaged" else ""
                print(f"{wrong}: {digest}{moved}")
            for digest, name in missing.items():
                print(f"missing: {digest} ({name})")
            print(
                "all intact" if not bad and not missing else "the next `pipeline run` rebuilds what it needs of these"
            )
    return EXIT_STORE if bad or missing else EXIT_OK


def _missing(workspace: Workspace) -> dict[str, str]:
    """Return the objects that records and parts name but the store lacks: digest -> what it was."""
    missing = {}
    for name in list(workspace.index.names("rec:")):
        record = workspace.record(name.removeprefix("rec:"))
        for file, (digest, _) in record_files(record).items() if record else ():
            if not workspace.store.path(digest).exists():
                missing[digest] = f"{record['stage']}: {file}" if record else file
    for _, part in list(workspace.parts()):
        if not workspace.store.path(part["digest"]).exists():
            missing[part["digest"]] = f"memoised {part['kind']}"
    return missing
