"""The command that continues a prompt: its arguments and its run, for ``python -m`` and for the verb ``generate``."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from stages.runtime.errors import BundleError, RequestError

if TYPE_CHECKING:
    import argparse

    from stages.runtime.generation import Generation
    from stages.runtime.session import Session
    from stages.runtime.tokenizer import BundleTokenizer

# With --quick, larger files are weights: their size is checked and their digest is not.
_QUICK_LIMIT = 16 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command to ``parser``."""
    add = parser.add_argument
    add("bundle", type=Path, metavar="BUNDLE", help="a bundle's directory, or one with a bundle/ in it")
    add("--prompt", required=True, help="the text to continue")
    add("--max-tokens", type=int, default=128, metavar="N", help="stop after N tokens (default 128)")
    add("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy, the default")
    add("--top-p", type=float, default=1.0, metavar="P", help="draw from this share of probability (default 1)")
    add("--seed", type=int, default=0, metavar="N", help="seed of the draws (default 0)")
    add("--chat", action="store_true", help="the prompt is a user's message: wrap it in the model's chat format")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: what the bundle is built for")
    add("--quick", action="store_true", help="check the weights' sizes only, not their digests")
    add("--json", action="store_true", help="print one JSON document instead of the text")


def run(args: argparse.Namespace, out: TextIO | None = None, err: TextIO | None = None) -> int:
    """Run the command: text goes to ``out`` as it is made, rates and errors to ``err``.

    Returns 0, 2 for a request or a bundle that cannot be served here, or 141 where the reader of the text has gone.
    """
    out, err = out or sys.stdout, err or sys.stderr
    try:
        return _run(args, out, err)
    except BrokenPipeError:
        # Who read the text has gone. What Python still holds for stdout must go somewhere when the process ends.
        if out is sys.stdout:
            os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
        return 128 + signal.SIGPIPE
    except (BundleError, RequestError) as error:
        for problem in getattr(error, "problems", (error,)):
            err.write(f"error: {problem}\n")
        return 2


def _run(args: argparse.Namespace, out: TextIO, err: TextIO) -> int:
    if not args.prompt:
        raise RequestError("the prompt is empty: give a text to continue")
    session, tokenizer = _open(args)
    generation, text = _generate(args, session, tokenizer, out)
    if args.json:
        document = {"prompt": args.prompt, "text": text, **_counts(generation, session)}
        out.write(json.dumps(document, ensure_ascii=False, indent=1) + "\n")
        out.flush()
    else:
        out.write("\n")
        out.flush()
        err.write(_rates(generation))
    return 0


def _open(args: argparse.Namespace) -> tuple[Session, BundleTokenizer]:
    from stages.runtime import manifest

    bundle = manifest.read(args.bundle)
    problems = manifest.check(bundle, digest_limit=_QUICK_LIMIT if args.quick else None)
    if args.device not in ("auto", bundle.device):
        problems.append(f"{bundle.root}: built for {bundle.target}; it runs on {bundle.device}, not on {args.device}")
    if problems:
        raise BundleError(*problems)
    # What they import may be absent, which the check above has said by now.
    from stages.runtime.session import Session
    from stages.runtime.tokenizer import BundleTokenizer

    return Session(bundle), BundleTokenizer(bundle.root)


def _generate(
    args: argparse.Namespace, session: Session, tokenizer: BundleTokenizer, out: TextIO
) -> tuple[Generation, str]:
    from stages.runtime.generation import Generation
    from stages.runtime.sampling import Sampler

    active = min(tokenizer.active_vocab_size, session.vocab_size)
    sampler = Sampler(active, temperature=args.temperature, top_p=args.top_p, seed=args.seed)
    generation = Generation(tokenizer.chat(args.prompt) if args.chat else tokenizer.prompt(args.prompt))
    pieces = []
    for piece in generation.text(session, tokenizer, sampler, args.max_tokens):
        pieces.append(piece)
        if not args.json:
            out.write(piece)
            out.flush()
    return generation, "".join(pieces)


def _counts(generation: Generation, session: Session) -> dict[str, Any]:
    from stages.runtime import backend

    return {
        "ids": generation.ids,
        "finish": generation.finish,
        "prompt_tokens": len(generation.prompt),
        "generated_tokens": len(generation.ids),
        "prefill_seconds": round(generation.prefill_seconds, 6),
        "decode_seconds": round(generation.decode_seconds, 6),
        "prefill_tokens_per_second": round(generation.prefill_rate, 2),
        "decode_steps": generation.decode_steps,
        "decode_tokens_per_second": round(generation.decode_rate, 2) if generation.decode_steps else None,
        "bundle": session.manifest.name,
        "target": session.manifest.target,
        "device": session.manifest.device,
        "threads": backend.threads(),
    }


def _rates(generation: Generation) -> str:
    steps = generation.decode_steps  # one fewer than the tokens, the first of which prefill gives
    rate = f", {generation.decode_rate:.1f} tokens/s" if steps else ""
    return (
        f"{len(generation.ids)} tokens; prefill {len(generation.prompt)} tokens, {generation.prefill_rate:.1f} "
        f"tokens/s; decode {steps} steps{rate}; ended by {generation.finish}\n"
    )
