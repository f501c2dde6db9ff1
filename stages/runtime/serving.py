"""Shared by the commands: opening bundles, sampling options, Ctrl-C and errors, and the line of rates."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import sys
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stages.runtime.backend import DEVICES
from stages.runtime.errors import BundleError, RequestError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator
    from types import FrameType
    from typing import TextIO

    from stages.runtime.generation import Generation
    from stages.runtime.manifest import Manifest
    from stages.runtime.server.answer import AnswerOptions
    from stages.runtime.server.engine import Engine
    from stages.runtime.tokenizer import BundleTokenizer

    Run = Callable[[argparse.Namespace, TextIO, TextIO], int]

_CONTROLS = re.compile("[\x7f-\x9f]")  # those before the space JSON escapes itself
CHAT_TOKENS = 1024  # of an answer, at most, where neither the checkpoint nor an argument says
INTERRUPTED = 128 + signal.SIGINT
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def json_text(document: object) -> str:
    """Return a document as JSON, readable but for control characters: a terminal would act on DEL and C1."""
    text = json.dumps(document, ensure_ascii=False, indent=1)
    return _CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def one_line(problem: object) -> str:
    """Return a message as a terminal may show it: names out of files may hold anything."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(problem))


def add_arguments(parser: argparse.ArgumentParser, *, max_tokens: str) -> None:
    """Add to ``parser`` what every command takes; ``max_tokens`` says what is taken where that is not given."""
    add = parser.add_argument
    add("--system", metavar="TEXT", help="the chat's system message, not the model's own")
    add("--max-tokens", type=int, metavar="N", help=f"stop after N tokens (default {max_tokens})")
    add("--temperature", type=float, metavar="T", help="0 is greedy (default; in a chat the checkpoint's)")
    add("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens (default 0: from all)")
    add("--top-p", type=float, metavar="P", help="draw from this share of probability (default 1)")
    add("--min-p", type=float, metavar="P", help="draw from tokens P times as likely as the first")
    add("--repetition-penalty", type=float, metavar="R", help="above 1: what came is less likely (default 1)")
    add("--seed", type=int, default=0, metavar="N", help="seed of the draws (default 0)")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated")
    add("--specials", action="store_true", help="show special tokens, the one that ends the text too")
    opening_arguments(parser)


def opening_arguments(parser: argparse.ArgumentParser) -> None:
    """Add to ``parser`` how a bundle is opened."""
    parser.add_argument(
        "--device",
        choices=("auto", *dict.fromkeys(DEVICES.values())),
        default="auto",
        metavar="NAME",
        help=f"{' or '.join(dict.fromkeys(DEVICES.values()))} (default: the bundle's)",
    )
    signature_argument(parser)
    parser.add_argument("--quick", action="store_true", help="check the weights' sizes only, not their digests")


def guarded(
    run: Callable[[argparse.Namespace, TextIO, TextIO], int], args: argparse.Namespace, *streams: TextIO
) -> int:
    """Return what ``run`` returns, 2 for a mistake, which is said, 130 after Ctrl-C, 141 where the reader has gone."""
    out, err = streams or (sys.stdout, sys.stderr)
    try:
        return run(args, out, err)
    except BrokenPipeError:
        # The reader closed the pipe. What Python still holds for stdout must go somewhere when the process ends.
        if out is sys.stdout:
            os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
        return 128 + signal.SIGPIPE
    except (BundleError, RequestError) as error:
        for problem in getattr(error, "problems", (error,)):
            err.write(f"error: {one_line(problem)}\n")
        return 2
    except KeyboardInterrupt:
        err.write("interrupted\n")
        return INTERRUPTED


@contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Yield what says whether Ctrl-C came; only a second one is a :class:`KeyboardInterrupt`.

    The first must not tear a call of the library apart: between two tokens the cache is whole.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        yield lambda: False
        return
    came = False

    def note(_signal: int, _frame: FrameType | None) -> None:
        nonlocal came
        if came:
            raise KeyboardInterrupt
        came = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: came
    finally:
        signal.signal(signal.SIGINT, before)


def text(value: str, where: str) -> str:
    """Return ``value``; :class:`RequestError` if bytes that are not UTF-8 came with the command line or by typing."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"{where}: not UTF-8 at character {error.start}") from None
    return value


def text_of(data: bytes, where: str) -> str:
    """Return the text of what a file or standard input holds."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise RequestError(f"{where}: not UTF-8 at byte {error.start}") from None


def standard_input() -> str:
    """Return all of standard input."""
    if sys.stdin is None:  # it was closed before Python began
        raise RequestError("standard input is closed")
    return text_of(sys.stdin.buffer.read(), "standard input")


@dataclass(frozen=True)
class Served:
    """A bundle that passed its checks, with its tokenizer and what the arguments make of its defaults."""

    manifest: Manifest
    tokenizer: BundleTokenizer
    options: AnswerOptions
    sampling: str

    @contextmanager
    def engine(self) -> Iterator[Engine]:
        """Load the weights, and yield what makes one answer at a time."""
        from stages.runtime.server.engine import Engine

        engine = Engine(self.manifest, sequences=1, tokenizer=self.tokenizer)
        try:
            yield engine
        finally:
            engine.close()


def serve(args: argparse.Namespace, *, chat: bool, max_tokens: int | None = None) -> Served:
    """Check a bundle and the options; loads no weights. A ``chat`` is sampled as the checkpoint says.

    Without an argument that says how long an answer is, it has ``max_tokens``; None for the checkpoint's own, or 1024.
    """
    bundle = opened(args.bundle, args)
    # What they import may be absent, which the check above has said by now.
    from stages.runtime.sampling import Settings, of_checkpoint
    from stages.runtime.server.answer import AnswerOptions
    from stages.runtime.tokenizer import BundleTokenizer

    given = {name: getattr(args, name) for name in _SAMPLING if getattr(args, name) is not None}
    default = of_checkpoint(bundle.sampling) if chat else {}
    settings = Settings(**{**default, **given})
    if args.max_tokens is not None and args.max_tokens < 1:
        raise RequestError(f"max_tokens {args.max_tokens} is not above 0")
    if "" in args.stop:
        raise RequestError("--stop: the text is empty")
    stops = [text(stop, "--stop").encode() for stop in args.stop]
    if args.seed < 0:
        raise RequestError(f"seed {args.seed} is negative")
    tokenizer = BundleTokenizer(bundle.folder)
    usual = max_tokens or int(bundle.sampling.get("max_new_tokens", CHAT_TOKENS))
    options = AnswerOptions(settings, args.max_tokens or usual, tuple(stops), specials=args.specials)
    in_use = ("temperature", "repetition_penalty") if settings.temperature == 0 else _SAMPLING
    origin = " (generation_config.json)" if {*default} & {*in_use} - {*given} else ""
    return Served(bundle, tokenizer, options, f"{settings}{origin}")


def opened(path: Path, args: argparse.Namespace) -> Manifest:
    """Return the manifest of a bundle that can run here; :class:`BundleError` says all that is in the way."""
    from stages.runtime import manifest

    bundle = manifest.read(path, require_signature=args.require_signature)
    bundle = dataclasses.replace(bundle, quick=args.quick)
    problems = manifest.check(bundle, weights=False)
    if args.device not in ("auto", bundle.device):
        problems.append(f"{bundle.root}: built for {bundle.target}; it runs on {bundle.device}, not on {args.device}")
    if problems:
        raise BundleError(*problems)
    return bundle


def bundle_argument(parser: argparse.ArgumentParser) -> None:
    """Add the argument that names a bundle."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="a bundle's directory")


def signature_argument(parser: argparse.ArgumentParser) -> None:
    """Add the option that names whose signature a bundle must have."""
    help_ = "PEM of the key that must have signed the bundle"
    parser.add_argument("--require-signature", type=Path, metavar="KEY", help=help_)


def rates(generation: Generation) -> str:
    """Return what a generation cost, on one line."""
    steps = generation.decode_steps  # one fewer than the tokens, the first of which prefill gives
    rate = f", {generation.decode_rate:.1f} tokens/s" if steps else ""
    return (
        f"{len(generation.ids)} tokens; prefill {generation.prefilled} tokens, {generation.prefill_rate:.1f} "
        f"tokens/s; decode {steps} steps{rate}; ended by {generation.finish}"
    )
