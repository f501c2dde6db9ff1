"""The command that continues a prompt: its arguments and its run, for ``python -m`` and for the verb ``generate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from stages.runtime import serving
from stages.runtime.errors import RequestError

if TYPE_CHECKING:
    import argparse

    from stages.runtime.documents import JsonObject
    from stages.runtime.generation import Generation
    from stages.runtime.manifest import Manifest

MAX_TOKENS = 128


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command to ``parser``."""
    serving.bundle_argument(parser)
    add = parser.add_argument
    add("--prompt", metavar="TEXT", help="the text to continue; - reads standard input")
    add("--prompt-file", type=Path, metavar="FILE", help="a file with the text; its last line break is left out")
    add("--chat", action="store_true", help="wrap the prompt in the model's chat format")
    serving.add_arguments(parser, max_tokens=str(MAX_TOKENS))
    add("--json", action="store_true", help="print one JSON document instead of the text")


def run(args: argparse.Namespace, *streams: TextIO) -> int:
    """Run the command: text goes to stdout as it is made, rates and errors to stderr, or to the two ``streams``.

    Returns 0, 2 for a request or a bundle that cannot be served here, 130 after Ctrl-C, which ends the text, or 141
    where the reader of the text has gone.
    """
    return serving.guarded(_run, args, *streams)


def _run(args: argparse.Namespace, out: TextIO, err: TextIO) -> int:
    prompt = _prompt(args)
    served = serving.serve(args, chat=args.chat, max_tokens=MAX_TOKENS)
    ids = _ids(args, served, prompt)
    from stages.runtime.generation import Generation

    pieces = []
    with served.engine() as engine, serving.interrupts() as interrupted:
        generation = Generation(ids, served.options, args.seed, interrupted)
        for piece in generation.text(engine):
            pieces.append(piece)
            if not args.json:
                out.write(piece)
                out.flush()
    if args.json:
        document = {"prompt": prompt, "text": "".join(pieces), **_counts(generation, served.manifest)}
        out.write(serving.json_text({**document, "sampling": served.sampling}) + "\n")
    else:
        out.write("\n")
        sampling = f"; {served.sampling}" if args.chat or served.sampling != "greedy" else ""
        err.write(f"{serving.rates(generation)}{sampling}\n")
    out.flush()
    return serving.INTERRUPTED if generation.finish == "interrupt" else 0


def _prompt(args: argparse.Namespace) -> str:
    if (args.prompt is None) == (args.prompt_file is None):
        raise RequestError("give the text with --prompt TEXT (--prompt - reads standard input) or --prompt-file FILE")
    if args.prompt_file is not None:
        try:
            prompt = _without_break(serving.text_of(args.prompt_file.read_bytes(), str(args.prompt_file)))
        except OSError as error:
            raise RequestError(f"{args.prompt_file}: {error.strerror}") from None
    elif args.prompt == "-":
        prompt = _without_break(serving.standard_input())
    else:
        prompt = serving.text(args.prompt, "--prompt")
    if not prompt:
        raise RequestError("the prompt is empty: give a text to continue")
    if args.system is not None and not args.chat:
        raise RequestError("--system is a message of a chat: add --chat")
    return prompt


def _without_break(text: str) -> str:
    """Return ``text`` without the line break that editors and echo put at its end."""
    return text.removesuffix("\n").removesuffix("\r")


def _ids(args: argparse.Namespace, served: serving.Served, prompt: str) -> list[int]:
    if not args.chat:
        return served.tokenizer.prompt(prompt)
    system = serving.text(args.system, "--system") if args.system else None
    return served.tokenizer.chat(prompt, system=system)


def _counts(generation: Generation, manifest: Manifest) -> JsonObject:
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
        "bundle": manifest.name,
        "target": manifest.target,
        "device": manifest.device,
        "threads": backend.threads(),
    }
