"""What int8 activations cost in quality: the perplexity of bundles, each measured by its own runtime.

Usage: python benchmarks/activations.py [--schemes SCHEME...]

Both example checkpoints are built with float and with int8 activations. Held-out text is that of
examples/tiny-qwen/text, which neither was trained on: every document whole, begun behind its end-of-text token, read
one token at a time. Exit status 1 where int8 activations add more than 0.1 %.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stages.runtime.session import Session
    from stages.runtime.tokenizer import BundleTokenizer

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ("tiny-qwen", "tiny-llama")
HELD_OUT = ROOT / "examples" / "tiny-qwen" / "text" / "heldout.txt"
END_OF_TEXT = "<|endoftext|>"
MOST = 0.001  # of float activations' perplexity, added


def documents(tokenizer: BundleTokenizer) -> list[list[int]]:
    """Return the ids of every document, between two end-of-text tokens."""
    (end,) = tokenizer.encode(END_OF_TEXT, specials=True)
    texts = HELD_OUT.read_text("utf-8").split(f"{END_OF_TEXT}\n")
    return [[end, *tokenizer.encode(text.removesuffix("\n")), end] for text in texts]


def perplexity(session: Session, read: list[list[int]]) -> float:
    """Return the perplexity per token of what comes after each first token."""
    from stages.verification.checks import decode_all, mean_loss

    losses = [(mean_loss(decode_all(session, ids), ids), len(ids) - 1) for ids in read]
    return math.exp(sum(loss * count for loss, count in losses) / sum(count for _, count in losses))


def measured(example: str, scheme: str, activations: str) -> float:
    """Build a bundle and return its perplexity."""
    from stages.runtime import manifest
    from stages.runtime.session import Session
    from stages.runtime.tokenizer import BundleTokenizer
    from tests.support.bundles import build

    with tempfile.TemporaryDirectory() as folder:
        checkpoint = ROOT / "examples" / example
        bundle = build(Path(folder), scheme, checkpoint=checkpoint, activations=activations).bundle
        return perplexity(Session(manifest.read(bundle)), documents(BundleTokenizer(bundle)))


def main() -> int:
    """Print the table; say whether no scheme loses more than it may."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--schemes", nargs="+", default=["q4f16_1", "q8f16_1"])
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))  # for the helpers of tests/
    missed = False
    print(f"{'perplexity per token':<22}{'float':>8}{'int8':>9}")
    for example in EXAMPLES:
        for scheme in args.schemes:
            plain, rounded = (measured(example, scheme, activations) for activations in ("float", "int8"))
            more = rounded / plain - 1
            missed |= more > MOST
            print(f"{example:<11}{scheme:<11}{plain:8.4f}{rounded:9.4f}  {more:+.2%}", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
