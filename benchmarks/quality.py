"""What schemes cost and take, beside llama.cpp's on the same weights: bits, KL divergence, top-1 agreement, perplexity.

Usage: python benchmarks/quality.py [CHECKPOINT...] [--tokens N] [--only WORD...] [--keep DIR]
Default: the two trained examples.

Nothing is built: transformers runs the checkpoint in float32, once as it is and once for each way of storing its
matrices, with what is left of each while it is used. The examples read text that they were not trained on, other
checkpoints verify's probes. ``bits`` is the mean over all matrices; a table that is also the head counts once.

ggml's types are quantized by the package gguf, those that it can; ``e8``: the embedding and the head in Q8_0. Mixtures
(Q4_K_M) are those of llama.cpp, by ggml's own quantizers (the package libggml-python, if it is there) with the
importance matrix that ``importance`` has too, of calibrate's samples (the examples: text they were trained on);
``filled``: as if whole blocks filled every row, where llama.cpp takes wider types. ``bits N``: rows that the stage
allocate chooses for N bits, scales gptq. Needs the extra verify. Exit status 1 if a scheme costs more than ggml's type
of the same form and groups, or bits more than the peer of :data:`BUDGETS`. A row takes one to three CPU minutes for
135M parameters: ``--keep`` keeps what was measured, so that a run that ends early, or another choice of rows, goes on.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import ggml_types
import kept
import multiplied
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from stages.quantization.calibrated import Calibrated
    from stages.quantization.rows import Row
    from stages.verification.loss import Loss

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = [str(ROOT / "examples" / name) for name in ("tiny-qwen", "tiny-llama")]
PAD = 0
CALIBRATED = 8192  # tokens that calibrate reads
sys.path += [str(ROOT), str(ROOT / "examples" / "tiny-qwen")]

# Schemes with how scales are chosen, and ggml's type that each must not cost more than.
OURS = [
    *(("q3f16_1", "max", ""), ("q3f16_1", "mse", "")),
    *(("q4f16_1", "max", ""), ("q4f16_1", "full", "Q4_0"), ("q4f16_1", "mse", "Q4_0")),
    *(("q4s128", "mse", ""), ("q4s64", "mse", ""), ("q4s32", "full", "Q4_0 e8"), ("q4s32", "mse", "Q4_0 e8")),
    *((name, "max", "") for name in ("q4a128", "q4a64", "q4k")),
    *(("q4k", "mse", ""), ("q4a32", "max", "Q4_1 e8"), ("q4a32", "mse", "Q4_1 e8")),
    *((name, scales, "") for name in ("q2k", "q3k", "q5k", "q6k") for scales in ("max", "mse")),
    *((name, "importance", "") for name in ("q3k", "q4s32", "q4a64", "q4a128", "q4k", "q5k")),
    *((name, "gptq", "") for name in ("q2k", "q3k", "q4s32", "q4a64", "q4a128", "q4k", "q5k")),
    ("q8f16_1", "max", ""),
]
AWQ = ("q3k", "q4s32", "q4a64", "q4k")  # schemes whose columns are multiplied, too
MIXTURES = ("Q2_K", "Q3_K_M", "Q4_0", "Q4_K_M")
# Bits a weight, None: as many as the peer takes, and the peer that must cost more.
BUDGETS = [
    (None, "llama.cpp Q2_K filled"),
    (3.5, "llama.cpp Q3_K_M filled"),
    (None, "llama.cpp Q3_K_M filled"),
    (4.25, "llama.cpp Q4_0"),
    (4.9, "llama.cpp Q4_K_M filled"),
    (None, "llama.cpp Q4_K_M filled"),
]
GGML = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
SLACK = 1.05  # times ggml's divergence: half steps go to the other side


class Matrix(NamedTuple):
    """A matrix [n, k]: its name, linear, embedding or head, how many layers the model has and query heads for each of
    keys, whether the matrix is the head, or the table in its place, the tensor of the checkpoint that it lies in, and
    what calibrate found.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    layers: int
    group: int
    makes_logits: bool
    tensor: str
    found: Calibrated

    @property
    def importance(self) -> np.ndarray | None:
        """How much an error of each column counts."""
        return self.found.importance.get(self.tensor)


class Way(NamedTuple):
    """One way to store matrices: what is left of the float32 values of one, and the bits that it takes."""

    label: str
    left: Callable[[np.ndarray, Matrix], np.ndarray]
    taken: Callable[[Matrix], float]


def ours(name: str, scales: str) -> Way:
    """Return a scheme's way."""
    from stages.quantization.schemes import FLOAT_BITS, SCHEMES

    scheme = SCHEMES[name]
    floats = FLOAT_BITS[scheme.storage_dtype]
    return stored(f"{name} {scales}", scales, lambda of: scheme.row(of.kind, of.shape[1]), floats)


def stored(label: str, scales: str, row_of: Callable[[Matrix], Row | None], floats: int) -> Way:
    """Return the way that stores each matrix in a row, or in ``floats`` bits a value where there is none."""
    from stages.quantization.budget import stored_bits

    def left(weight: np.ndarray, of: Matrix) -> np.ndarray:
        row = row_of(of)
        return replace(of.found, scales=scales).left(weight, row, of.tensor) if row else weight

    def taken(of: Matrix) -> float:
        row = row_of(of)
        return stored_bits(row, *of.shape) if row else floats * float(np.prod(of.shape))

    return Way(label, left, taken)


def ggml(name: str, table: str) -> Way:
    """Return the way of a type of ggml, with one for embedding and head."""
    import gguf

    def of_kind(of: Matrix) -> str:
        return name if of.kind == "linear" else table

    def left(weight: np.ndarray, of: Matrix) -> np.ndarray:
        kind = gguf.GGMLQuantizationType[of_kind(of)]
        found: np.ndarray = gguf.quants.dequantize(gguf.quants.quantize(weight, kind), kind)
        return found

    return Way(
        name if table == name else f"{name} e8", left, lambda of: ggml_types.bits(of_kind(of)) * np.prod(of.shape)
    )


def mixture(name: str, *, padded: bool) -> Way:
    """Return the way of a file of llama.cpp's, quantized with an importance matrix."""

    def of_matrix(of: Matrix) -> str:
        return ggml_types.chosen(name, of.name, of.makes_logits, of.shape[1], of.layers, of.group, padded=padded)

    return Way(
        f"llama.cpp {name}{' filled' if padded else ''}",
        lambda weight, of: ggml_types.left(weight, of_matrix(of), of.importance),
        lambda of: ggml_types.bits(of_matrix(of)) * np.prod(of.shape),
    )


def allocated(rows: dict[str, str], label: str) -> Way:
    """Return the way in which each tensor has the row of a scheme's body."""
    from stages.quantization.schemes import SCHEMES

    def row_of(of: Matrix) -> Row | None:
        body = SCHEMES[rows[of.tensor]].body
        return body and body.fitting(of.shape[1])

    return stored(label, "gptq", row_of, 16)


def ways(measured: Measured) -> Iterator[Way]:
    """Yield every way."""
    for name in GGML:
        yield ggml(name, name)
        if name not in ("Q8_0", "Q5_1"):
            yield ggml(name, "Q8_0")
    if ggml_types.library():
        for name in MIXTURES:
            yield mixture(name, padded=False)
            if "_K" in name:
                yield mixture(name, padded=True)
    for name, scales, _ in OURS:
        yield ours(name, scales)
    for name in AWQ:
        yield multiplied.way(ours(name, "awq"), name, *measured.of_awq)


def read(checkpoint: Path, tokens: int) -> list[list[int]]:
    """Return the token ids to be read, in pieces, about ``tokens`` in all."""
    if str(checkpoint.resolve()) in EXAMPLES:
        from vocabulary import read_documents

        pieces: list[list[int]] = []
        for document in read_documents("heldout.txt"):
            if sum(map(len, pieces)) < tokens:
                pieces.append([document[-1], *document])
        return pieces
    return ids_of(checkpoint, ROOT / "stages" / "verification" / "probes.jsonl", tokens, 256)


def calibration(checkpoint: Path) -> list[list[int]]:
    """Return the token ids that calibrate reads: nothing of what :func:`read` returns."""
    from stages.calibration import asking

    if str(checkpoint.resolve()) in EXAMPLES:
        from vocabulary import read_documents

        pieces: list[list[int]] = []
        for document in read_documents("train.txt.xz"):
            if sum(map(len, pieces)) < CALIBRATED:
                pieces.append([document[-1], *document])
        return pieces
    return ids_of(checkpoint, asking.DEFAULT, CALIBRATED, 512)


def ids_of(checkpoint: Path, corpus: Path, tokens: int, window: int) -> list[list[int]]:
    """Return ids of a corpus in pieces of at most ``window``, ``tokens`` in all."""
    from stages.verification import probes

    if str(checkpoint.resolve()) == EXAMPLES[0]:
        from vocabulary import encode
    else:
        import transformers

        tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)

        def encode(text: str) -> list[int]:
            return [*tokenizer.encode(text, add_special_tokens=False)]

    def chat(messages: Sequence[Any]) -> list[int]:
        return encode("\n\n".join(each["content"] for each in messages))

    found = probes.of(corpus, tokens, window=window, prefix=(), encode=encode, chat=chat)
    return [[*piece] for piece in found.pieces]


class Measured:
    """A checkpoint that is run as it is and in every way."""

    def __init__(self, checkpoint: Path, tokens: int, work: Path, keep: kept.Kept) -> None:
        import torch

        from stages.calibration import moments
        from stages.config_parse import ConfigParse
        from stages.quantization.calibrated import Calibrated
        from stages.verification import advice, streaming
        from stages.verification.original import OriginalRequest
        from tests.support.local_context import run_stage

        parsed = run_stage(ConfigParse(), work / "parsed", {"checkpoint": str(checkpoint)}).out
        files = {path.name: path for path in checkpoint.glob("*.safetensors")}
        self._described, self._listed = (parsed / name for name in ("model.json", "tensors.json"))
        self._mapped, self._model, _ = streaming.load(checkpoint, files, self._described, work)
        self._matrices = advice.matrices_of(self._model)
        self._request = OriginalRequest(checkpoint, files, self._described, calibration(checkpoint), 0, work)
        self._keep = keep
        folder = keep.calibrated(self._calibrate)
        self._importance, self._feedback = folder / "importance.npz", folder / "feedback"
        self.of_awq = self._described, self._listed, files, self._importance
        found = Calibrated.read("gptq", self._importance, self._feedback)
        config, head = self._model.config, self._model.get_output_embeddings()
        names = moments.names_of(self._model, self._mapped.tensors)
        self.matrices = [
            Matrix(
                name,
                kind,
                tuple(modules[0].weight.shape),
                int(config.num_hidden_layers),
                int(config.num_attention_heads) // int(config.num_key_value_heads),
                head in modules,
                names.get(id(modules[0].weight), ""),
                found,
            )
            for name, (kind, modules) in self._matrices.items()
        ]
        pieces = read(checkpoint, tokens)
        longest = max(map(len, pieces))
        padded = torch.tensor([[*piece, *[PAD] * (longest - len(piece))] for piece in pieces])
        self._ids, self._following = padded[:, :-1], padded[:, 1:]
        self._valid = torch.tensor([[at < len(piece) - 1 for at in range(longest - 1)] for piece in pieces])
        self._wanted = self._run(None)

    def _calibrate(self, folder: Path) -> None:
        """Write what the stage calibrate does into ``folder``."""
        from stages.calibration import moments

        (folder / "feedback").mkdir(exist_ok=True)
        found = moments.compute(self._request, lambda *_: None, folder / "feedback")
        np.savez(folder / "importance.npz", **found)  # type: ignore[arg-type]

    @functools.cached_property
    def _choices(self) -> list[Any]:
        from stages import allocate
        from stages.calibration import sensitivity

        described = self._model_json(), json.loads(self._listed.read_bytes())
        files, joined = (str(self._importance), str(self._feedback)), [*allocate.sources_of(*described).values()]
        asked = sensitivity.SensitivityRequest(asdict(self._request), allocate.ROWS, "gptq", *files, joined)
        costs = self._keep.costs(lambda: sensitivity.compute(asked, lambda *_: None))
        return allocate.choices_of(*described, costs)

    def allocated(self, bits: float) -> dict[str, str]:
        """Return the scheme whose row each tensor has, as the stage allocate chooses for so many ``bits``."""
        from stages.allocate import ROWS, sources_of
        from stages.quantization.budget import allocate

        taken = allocate(self._choices, bits)
        sources = sources_of(self._model_json(), json.loads(self._listed.read_bytes()))
        return {source: ROWS[taken[name]] for name in taken for source in sources[name]}

    def _model_json(self) -> Any:
        return json.loads(self._described.read_bytes())

    def _run(self, way: Way | None) -> Any:
        import torch

        from stages.verification import advice, streaming

        by_name = {matrix.name: matrix for matrix in self.matrices}

        def change(weight: Any, name: str) -> Any:
            return torch.from_numpy(way.left(weight.numpy(), by_name[name])) if way else weight

        with (
            torch.inference_mode(),
            streaming.weights_in_float32(self._model, self._mapped),
            advice.changed(self._matrices, change),
        ):
            return advice.log_probs(self._model, self._ids)[self._valid]

    def figures(self, way: Way) -> Loss:
        """Return what a way costs."""
        from stages.verification import advice

        following = self._following[self._valid]
        return self._keep.figures(way.label, lambda: advice.figures_of(self._wanted, self._run(way), following))

    def bits(self, way: Way) -> float:
        """Return how many bits a value of a matrix takes."""
        return sum(way.taken(each) for each in self.matrices) / sum(
            float(np.prod(each.shape)) for each in self.matrices
        )


def table(checkpoint: Path, tokens: int, only: Sequence[str], keep: Path | None) -> list[str]:
    """Print the table of a checkpoint; return what costs more than it may."""
    with tempfile.TemporaryDirectory() as work:
        known = kept.Kept(keep or Path(work), checkpoint, tokens)
        return _table(Measured(checkpoint, tokens, Path(work), known), checkpoint.name, only)


def budgets(measured: Measured, by_label: dict[str, Way]) -> Iterator[tuple[Way, str]]:
    """Yield the ways of :data:`BUDGETS` whose peers are known, each with its peer."""
    for asked, peer in BUDGETS:
        if peer in by_label:
            bits = asked or measured.bits(by_label[peer])
            yield allocated(measured.allocated(bits), f"bits {bits:.2f} gptq"), peer


def _table(measured: Measured, name: str, only: Sequence[str]) -> list[str]:
    known = {way.label: way for way in ways(measured)}
    chosen = {label: way for label, way in known.items() if not only or any(word in label for word in only)}
    if not chosen:
        raise SystemExit(f"quality.py: no way is called as --only says ({' '.join(only)}): {', '.join(known)}")
    budgeted = [*budgets(measured, chosen)]
    costs: dict[str, float] = {}
    print(f"\n{name}\n\n| stored as | bits | KL mean | KL 99 % | top-1 | perplexity |")
    print("|---|---:|---:|---:|---:|---:|")
    for way in sorted([*chosen.values(), *(way for way, _ in budgeted)], key=measured.bits):
        found = measured.figures(way)
        costs[way.label] = found.kl_mean
        figures = f"{found.kl_mean:.5f} | {found.kl_99:.4f} | {found.top1:.4f} | {found.perplexity:.4f}"
        print(f"| {way.label} | {measured.bits(way):.3f} | {figures} |", flush=True)
    print(f"| float32 | 32 | 0 | 0 | 1 | {found.perplexity_original:.4f} |", flush=True)
    pairs = [(f"{scheme} {scales}", peer, SLACK) for scheme, scales, peer in OURS]
    pairs += [(way.label, peer, 1) for way, peer in budgeted]
    return [
        f"{name}: {ours} costs {costs[ours]:.5f}, {peer} {costs[peer]:.5f}"
        for ours, peer, slack in pairs
        if ours in costs and peer in costs and costs[ours] > costs[peer] * slack + 1e-6
    ]


def main() -> int:
    """Print a table for each checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="*", default=EXAMPLES)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--keep", type=Path, metavar="DIR", help="where figures are kept for the next run")
    asked = parser.parse_args()
    missed = [line for each in asked.checkpoints for line in table(Path(each), asked.tokens, asked.only, asked.keep)]
    print(*(f"missed: {line}" for line in missed), sep="\n")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
