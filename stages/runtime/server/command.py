"""The command that serves bundles until it is stopped: ``python -m`` and the verb ``serve``."""

from __future__ import annotations

import ipaddress
import itertools
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from stages.runtime import serving
from stages.runtime.errors import RequestError

if TYPE_CHECKING:
    import argparse
    import socket
    from collections.abc import Mapping

    import uvicorn

    from stages.runtime.server.engine import Engine

INSTALL = "pip install 'stagegraph[serve]' (or: pip install starlette uvicorn)"
KEY = "STAGEGRAPH_API_KEY"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command to ``parser``."""
    add = parser.add_argument
    add("bundles", nargs="+", metavar="BUNDLE", type=Path, help="a bundle's directory")
    add("--name", action="append", default=[], metavar="NAME", help="name for clients; once per bundle, in their order")
    add(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="address to listen on (default 127.0.0.1, this machine)",
    )
    add("--port", type=int, default=8000, metavar="N", help="port (default 8000; 0: any free one)")
    add("--api-key-file", type=Path, metavar="FILE", help=f"file with the key that clients must send; or set {KEY}")
    add("--no-auth", action="store_true", help="require no key, on any address")
    add("--no-page", action="store_true", help="do not serve the chat page at /")
    add("--sequences", type=int, metavar="N", help="answers generated at once (default: the bundle's most)")
    add(
        "--cache-tokens",
        type=int,
        metavar="N",
        help="tokens in the KV cache (default: a context per answer)",
    )
    add(
        "--queue",
        type=int,
        default=64,
        metavar="N",
        help="requests that may wait before refusal (default 64)",
    )
    add("--timeout", type=float, default=600, metavar="SECONDS", help="time limit of an answer (default 600)")
    add(
        "--speculate",
        type=int,
        default=0,
        metavar="N",
        help="draft N tokens at a time unless requests say (default 0)",
    )
    add(
        "--draft",
        type=Path,
        metavar="BUNDLE",
        help="a smaller bundle that drafts (default: the text so far)",
    )
    add("--grace", type=int, default=30, metavar="SECONDS", help="time for running requests after SIGTERM (default 30)")
    serving.opening_arguments(parser)


def run(args: argparse.Namespace, *streams: TextIO) -> int:
    """Run the command: the address and a line about each request go to stderr.

    Returns 0 once it was told to stop, 2 for a bundle or a setting that cannot be served.
    """
    return serving.guarded(_run, args, *streams)


def _run(args: argparse.Namespace, _out: TextIO, err: TextIO) -> int:
    try:
        import uvicorn

        from stages.runtime.server import app, protocol
    except ImportError as error:
        raise RequestError(f"serving needs starlette and uvicorn ({error}): {INSTALL}") from None
    if not 0 <= args.port < 2**16:
        raise RequestError(f"--port {args.port}: expected 0 to 65535")
    for option in ("queue", "timeout", "grace"):
        if getattr(args, option) < 0:
            raise RequestError(f"--{option} {getattr(args, option):g}: expected a number of at least 0")
    key = _key(args)
    local = _is_local(args.host)
    engines = _engines(args)
    limits = app.RequestLimits(seconds=args.timeout)
    application = app.create(engines, key=key, local=local, with_page=not args.no_page, limits=limits, log=err)
    config = uvicorn.Config(
        application,
        host=args.host,
        port=args.port,
        log_level="warning",
        access_log=False,
        server_header=False,
        http=protocol.protocol(16 * (args.queue + 16), limits.sending),
        ws="none",
        timeout_graceful_shutdown=args.grace,
    )
    server = uvicorn.Server(config)
    with _listening(config) as listener:
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        err.write(f"serving {', '.join(engines)} at http://{shown}:{port}/v1\n")
        err.write("" if args.no_page else f"chat page: http://{shown}:{port}/\n")
        err.flush()
        # uvicorn takes these while it runs, and raises those that came once more when it is done.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
        server.run(sockets=[listener])
    for engine in engines.values():
        engine.close()
    return 0


def _listening(config: uvicorn.Config) -> socket.socket:
    try:
        listener = config.bind_socket()
        listener.listen(config.backlog)  # from now on: who reads the address, which is printed next, may connect
        return listener
    except SystemExit:  # as a command line of its own it says why, and ends
        raise RequestError(f"--port {config.port}: cannot be opened, see above; --port 0 chooses a free one") from None


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _key(args: argparse.Namespace) -> str | None:
    """Return what clients must send, None for nothing; others than this machine's need it."""
    key = os.environ.get(KEY, "")
    if args.api_key_file is not None:
        try:
            key = serving.text_of(args.api_key_file.read_bytes(), str(args.api_key_file))
        except OSError as error:
            raise RequestError(f"{args.api_key_file}: {error.strerror}") from None
    if args.api_key_file is not None and not key.strip():
        raise RequestError(f"{args.api_key_file}: the file is empty")
    if not key.strip() and not _is_local(args.host) and not args.no_auth:
        raise RequestError(
            f"anyone who can reach {args.host} could use the model: set a key with --api-key-file FILE or {KEY}, or "
            "allow it with --no-auth"
        )
    return key.strip() or None


def _engines(args: argparse.Namespace) -> Mapping[str, Engine]:
    """Load every bundle; all names are checked before."""
    found = {}
    if len(args.name) > len(args.bundles):
        raise RequestError(f"--name was given {len(args.name)} times for {len(args.bundles)} bundles")
    for path, given in itertools.zip_longest(args.bundles, args.name):
        bundle = serving.opened(path, args)
        name = given or bundle.name
        if name in found:
            raise RequestError(f"two bundles are named {name}: give each a --name")
        found[name] = bundle

    from stages.runtime.server.drafts import MOST
    from stages.runtime.server.engine import Engine

    if not 0 <= args.speculate <= MOST:
        raise RequestError(f"--speculate {args.speculate}: expected 0 to {MOST}")
    draft = None if args.draft is None else serving.opened(args.draft, args)
    settings = {"sequences": args.sequences, "tokens": args.cache_tokens, "queue": args.queue}
    return {name: Engine(bundle, **settings, speculate=args.speculate, draft=draft) for name, bundle in found.items()}
