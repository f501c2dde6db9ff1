"""``pipeline remote``: lists the configured remotes, the signers trusted for each and the user's own public key."""

from __future__ import annotations

import argparse

from stagegraph.cli.common import add_json, print_json
from stagegraph.cli.layout import table
from stagegraph.errors import EXIT_NODE_FAILED, EXIT_OK, PlanError
from stagegraph.remote.settings import UserSettings, config_path, load_settings

EXAMPLE = "pipeline remote key"
ADVICE = 'remotes: {team: {url: "s3://bucket/path", mode: both}}'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "what", nargs="?", choices=("status", "key"), default="status", metavar="WHAT", help="status (default) or key"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Run the verb."""
    from stagegraph.remote.shared import KEY_FILE
    from stagegraph.remote.signing import Signer

    if args.what == "key":
        public = Signer(config_path().with_name(KEY_FILE)).public
        print_json({"public_key": public}) if args.json else print(public)
        return EXIT_OK
    return _status(load_settings(), as_json=args.json)


def _status(settings: UserSettings, *, as_json: bool) -> int:
    from stagegraph.remote.shared import reach

    found = {remote: reach(remote) for remote in settings.remotes}
    if as_json:
        remotes = [r._asdict() | {"answers": not problem, "problem": problem} for r, problem in found.items()]
        print_json({"config": str(config_path()), "remotes": remotes, "trusted": dict(settings.trusted)})
    else:
        rows = [
            (r.name, "both" if r.reads and r.writes else "read" if r.reads else "write", problem or "answers", r.url)
            for r, problem in found.items()
        ]
        print(table(("remote", "mode", "state", "url"), rows, flexible=2) if rows else f"no remotes in {config_path()}")
        for name, public in settings.trusted.items():
            print(f"trusted: {name} {public}")
    return EXIT_NODE_FAILED if any(found.values()) else EXIT_OK


def configured(*, reads: bool = False, writes: bool = False) -> UserSettings:
    """Return the user's settings; :class:`PlanError` if no remote permits reading, or writing, as requested."""
    settings = load_settings()
    if not any((remote.reads and reads) or (remote.writes and writes) for remote in settings.remotes):
        what = "gives" if reads else "takes"
        raise PlanError(f"no remote {what} results; say where some are in {config_path()}, as {ADVICE}")
    return settings
