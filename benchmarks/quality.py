"""What schemes cost and take, beside ggml's types on the same weights: bits, KL divergence, first choices, perplexity.

Usage: python benchmarks/quality.py [CHECKPOINT...] [--tokens N] [--only WORD...]; default: the two trained examples.

Nothing is built: transformers runs the checkpoint in float32, once as it is and once for each way of storing its
matrices, with what is left of each while it is used. ggml's types are quantized and restored by the package gguf, those
that it can. The examples read text that they were not trained on, other checkpoints verify's probes. ``bits`` is the
mean over all matrices; a table that is also the head counts once. ``e8``: the embedding and the head in Q8_0.
Needs the extras verify and gguf. Exit status 1 if a scheme costs more than ggml's type of the same form and groups.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from stages.verification.loss import Loss

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = [str(ROOT / "examples" / name) for name in ("tiny-qwen", "tiny-llama")]
PAD = 0
sys.path += [str(ROOT), str(ROOT / "examples" / "tiny-qwen")]

# Schemes with how scales are chosen, and ggml's type that each must not cost more than.
OURS = [
    *(("q3f16_1", "max", ""), ("q3f16_1", "mse", "")),
    *(("q4f16_1", "max", ""), ("q4f16_1", "full", "Q4_0"), ("q4f16_1", "mse", "Q4_0")),
    *(("q4s128", "mse", ""), ("q4s64", "mse", ""), ("q4s32", "full", "Q4_0 e8"), ("q4s32", "mse", "Q4_0 e8")),
    *(
        ("q4a128", "max", ""),
        ("q4a64", "max", ""),
        ("q4k", "max", ""),
        ("q4k", "mse", ""),
        ("q4a32", "max", "Q4_1 e8"),
        ("q4a32", "mse", "Q4_1 e8"),
    ),
    ("q8f16_1", "max", ""),
]
GGML = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
SLACK = 1.05  # times ggml's divergence: half steps go to the other side


class Way(NamedTuple):
    """One way to store matrices: what is left of one, and the bits that it takes; of (weight float32 [n, k], kind)."""

    label: str
    left: Callable[[np.ndarray, str], np.ndarray]
    taken: Callable[[tuple[int, int], str], float]


def ours(name: str, scales: str) -> Way:
    """Return a scheme's way."""
    from stages.quantization.parameter import quantize, restored
    from stages.quantization.schemes import FLOAT_BITS, SCHEMES
    from stages.sizes import DTYPE_BYTES

    scheme = SCHEMES[name]

    def left(weight: np.ndarray, kind: str) -> np.ndarray:
        row = scheme.row(kind, weight.shape[1])
        return restored(quantize(weight, row, scales), row, weight.shape[1]) if row else weight

    def taken(shape: tuple[int, int], kind: str) -> float:
        row = scheme.row(kind, shape[1])
        if row is None:
            return FLOAT_BITS[scheme.storage_dtype] * float(np.prod(shape))
        return sum(8.0 * DTYPE_BYTES[dtype] * float(np.prod(each)) for _, each, dtype in row.stored(*shape))

    return Way(f"{name} {scales}", left, taken)


def ggml(name: str, table: str) -> Way:
    """Return the way of a type of ggml, with one for embedding and head."""
    import gguf

    types = {
        kind: gguf.GGMLQuantizationType[table if kind != "linear" else name] for kind in ("linear", "embedding", "head")
    }

    def left(weight: np.ndarray, kind: str) -> np.ndarray:
        found: np.ndarray = gguf.quants.dequantize(gguf.quants.quantize(weight, types[kind]), types[kind])
        return found

    def taken(shape: tuple[int, int], kind: str) -> float:
        values, size = gguf.GGML_QUANT_SIZES[types[kind]]
        return 8.0 * size / values * float(np.prod(shape))

    return Way(name if table == name else f"{name} e8", left, taken)


def ways() -> Iterator[Way]:
    """Yield every way."""
    for name in GGML:
        yield ggml(name, name)
        if name not in ("Q8_0", "Q5_1"):
            yield ggml(name, "Q8_0")
    for name, scales, _ in OURS:
        yield ours(name, scales)


def read(checkpoint: Path, tokens: int) -> list[list[int]]:
    """Return the token ids to be read, in pieces, about ``tokens`` in all."""
    if str(checkpoint.resolve()) in EXAMPLES:
        from vocabulary import read_documents

        pieces: list[list[int]] = []
        for document in read_documents("heldout.txt"):
            if sum(map(len, pieces)) < tokens:
                pieces.append([document[-1], *document])
        return pieces
    import transformers

    from stages.verification import probes

    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    corpus = ROOT / "stages" / "verification" / "probes.jsonl"

    def chat(messages: Sequence[Any]) -> list[int]:
        return [*tokenizer.encode("\n\n".join(each["content"] for each in messages), add_special_tokens=False)]

    def encode(text: str) -> list[int]:
        return [*tokenizer.encode(text, add_special_tokens=False)]

    found = probes.of(corpus, tokens, window=256, prefix=(), encode=encode, chat=chat)
    return [[*piece] for piece in found.pieces]


class Measured:
    """A checkpoint that is run as it is and in every way."""

    def __init__(self, checkpoint: Path, tokens: int, work: Path) -> None:
        import torch

        from stages.config_parse import ConfigParse
        from stages.verification import advice, streaming
        from tests.local_context import run_stage

        parsed = run_stage(ConfigParse(), work / "parsed", {"checkpoint": str(checkpoint)}).out
        files = {path.name: path for path in checkpoint.glob("*.safetensors")}
        self._mapped, self._model, _ = streaming.load(checkpoint, files, parsed / "model.json", work)
        self._matrices = advice.matrices_of(self._model)
        pieces = read(checkpoint, tokens)
        longest = max(map(len, pieces))
        padded = torch.tensor([[*piece, *[PAD] * (longest - len(piece))] for piece in pieces])
        self._ids, self._following = padded[:, :-1], padded[:, 1:]
        self._valid = torch.tensor([[at < len(piece) - 1 for at in range(longest - 1)] for piece in pieces])
        self._wanted = self._run(None)

    def _run(self, way: Way | None) -> Any:
        import torch

        from stages.verification import advice, streaming

        def change(weight: Any, kind: str) -> Any:
            return torch.from_numpy(way.left(weight.numpy(), kind)) if way else weight

        with (
            torch.inference_mode(),
            streaming.weights_in_float32(self._model, self._mapped),
            advice.changed(self._matrices, change),
        ):
            return advice.log_probs(self._model, self._ids)[self._valid]

    def figures(self, way: Way) -> Loss:
        """Return what a way costs."""
        from stages.verification import advice

        return advice.figures_of(self._wanted, self._run(way), self._following[self._valid])

    def bits(self, way: Way) -> float:
        """Return how many bits a value of a matrix takes."""
        shapes = [(tuple(modules[0].weight.shape), kind) for kind, modules in self._matrices.values()]
        return sum(way.taken(shape, kind) for shape, kind in shapes) / sum(float(np.prod(shape)) for shape, _ in shapes)


def table(checkpoint: Path, tokens: int, only: Sequence[str]) -> list[str]:
    """Print the table of a checkpoint; return what costs more than it may."""
    with tempfile.TemporaryDirectory() as work:
        return _table(Measured(checkpoint, tokens, Path(work)), checkpoint.name, only)


def _table(measured: Measured, name: str, only: Sequence[str]) -> list[str]:
    costs: dict[str, float] = {}
    print(f"\n{name}\n\n| stored as | bits | KL mean | KL 99 % | top-1 | perplexity |")
    print("|---|---:|---:|---:|---:|---:|")
    chosen = [way for way in ways() if not only or any(word in way.label for word in only)]
    for way in sorted(chosen, key=measured.bits):
        found = measured.figures(way)
        costs[way.label] = found.kl_mean
        figures = f"{found.kl_mean:.5f} | {found.kl_99:.4f} | {found.top1:.4f} | {found.perplexity:.4f}"
        print(f"| {way.label} | {measured.bits(way):.3f} | {figures} |", flush=True)
    print(f"| float32 | 32 | 0 | 0 | 1 | {found.perplexity_original:.4f} |", flush=True)
    return [
        f"{name}: {ours} costs {costs[ours]:.5f}, {peer} {costs[peer]:.5f}"
        for ours, peer in ((f"{scheme} {scales}", peer) for scheme, scales, peer in OURS)
        if ours in costs and peer in costs and costs[ours] > costs[peer] * SLACK + 1e-6
    ]


def main() -> int:
    """Print a table for each checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="*", default=EXAMPLES)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--only", nargs="*", default=[])
    asked = parser.parse_args()
    missed = [line for each in asked.checkpoints for line in table(Path(each), asked.tokens, asked.only)]
    print(*(f"missed: {line}" for line in missed), sep="\n")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
