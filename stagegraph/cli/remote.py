"""``pipeline remote``: lists the configured remotes, the signers trusted for each and the user's own public key."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from stagegraph.api import Pipeline
from stagegraph.cli.common import DEFAULT_FILE, add_json, add_set, locate, print_json, shown
from stagegraph.cli.layout import table
from stagegraph.errors import EXIT_NODE_FAILED, EXIT_OK, PlanError
from stagegraph.remote.settings import UserSettings, config_path, load_settings
from stagegraph.spec.load import load
from stagegraph.spec.remotes import MODES

EXAMPLE = "pipeline remote key"
MODE_NAMES = {directions: name for name, directions in MODES.items()}
ADVICE = 'remotes: {team: {url: "s3://bucket/path", mode: both}}'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "what", nargs="?", choices=("status", "key"), default="status", metavar="WHAT", help="status (default) or key"
    )
    parser.add_argument(
        "pipeline",
        nargs="?",
        metavar="FILE",
        help=f"pipeline file that lists remotes (default: a {DEFAULT_FILE}, if any)",
    )
    add_set(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Run the verb."""
    from stagegraph.remote.shared import KEY_FILE
    from stagegraph.remote.signing import Signer

    if args.what == "key":
        public = Signer(config_path().with_name(KEY_FILE)).public
        print_json({"public_key": public}) if args.json else print(public)
        return EXIT_OK
    file = args.pipeline or locate()
    listed = load(Path(file), args.overrides).remotes if args.pipeline or Path(file).is_file() else ()
    own = {remote.name for remote in load_settings().remotes}
    return _status(load_settings(listed), dict.fromkeys(own, shown(config_path())), file, as_json=args.json)


def _status(settings: UserSettings, origins: Mapping[str, str], file: str, *, as_json: bool) -> int:
    """Print each remote, whether it answers, and where it is listed: by name in ``origins``, else in ``file``."""
    from stagegraph.remote.shared import reach

    found = {remote: reach(remote) if remote.reads or remote.writes else "" for remote in settings.remotes}
    if as_json:
        remotes = [
            r._asdict() | {"answers": not problem, "problem": problem, "from": origins.get(r.name, file)}
            for r, problem in found.items()
        ]
        print_json({"config": str(config_path()), "remotes": remotes, "trusted": dict(settings.trusted)})
    else:
        rows = [
            (r.name, MODE_NAMES[r.reads, r.writes], problem or "answers", r.url, origins.get(r.name, file))
            for r, problem in found.items()
        ]
        print(
            table(("remote", "mode", "state", "url", "from"), rows, flexible=2)
            if rows
            else f"no remotes in {config_path()}, nor in a pipeline file here"
        )
        for name, public in settings.trusted.items():
            print(f"trusted: {name} {public}")
    return EXIT_NODE_FAILED if any(found.values()) else EXIT_OK


def configured(pipeline: Pipeline, *, reads: bool = False, writes: bool = False) -> UserSettings:
    """Return the user's settings with the pipeline's remotes.

    :class:`PlanError` if no remote permits reading, or writing, as requested.
    """
    settings = load_settings(pipeline.dag.pipeline.remotes)
    if not any((remote.reads and reads) or (remote.writes and writes) for remote in settings.remotes):
        what = "gives" if reads else "takes"
        raise PlanError(
            f"no remote {what} results; say where some are in {config_path()} or the pipeline file, as {ADVICE}"
        )
    return settings
