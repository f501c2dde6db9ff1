"""Runs the original model, transformers on the checkpoint's own files in float32: the baseline of a bundle's loss.

transformers reads config.json and the weights itself and with its own rules, so that nothing this project has misread
is wrong on both sides. Its weights stay in the files (:mod:`stages.verification.streaming`), and all tokens go through
a module before the next one is looked at, so that each is read once.

A family that transformers has no class of (the first Qwen) is run by the class that its family names, on our reading of
config.json.
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from blake3 import blake3

from stages.verification import lending, streaming

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from stages.documents.files import JsonObject
    from stages.memo import Memo
    from stages.verification.apart import Progress

KIND = "original"  # of part: what one checkpoint says of one set of probes, shared by all schemes and targets
TOP = 1024  # of the likeliest tokens of a place are kept by themselves, the others as one sum
# ids uint32 [n, TOP] and log_probs float32 [n, TOP], the likeliest first; chosen float32 [n]: the log probability of
# the token that stands there; what computes it in words; modules by name, and the largest magnitude that each reads or
# gives on the probes, float32.
ARRAYS = (
    *("original_ids", "original_log_probs", "original_chosen", "original_origin"),
    *("original_modules", "original_largest"),
)


@dataclass(frozen=True)
class OriginalRequest:
    """The request to the original model: the probabilities of the next token at each position of ``pieces``, token ids.

    The first ``skipped`` places of each piece are left out: they are those of what goes before every text.
    ``root`` is the checkpoint's folder, ``files`` are its weights by name, ``config`` is where config-parse's is, and
    ``scratch`` where files may be made.
    """

    root: Path
    files: Mapping[str, Path]
    config: Path
    pieces: Sequence[Sequence[int]]
    skipped: int
    scratch: Path = Path()


def compute(request: OriginalRequest, progress: Progress) -> dict[str, np.ndarray]:
    """Return :data:`ARRAYS`, the rows of all pieces one after the other."""
    import torch

    mapped, model, origin = streaming.load(request.root, request.files, request.config, request.scratch)
    pieces, longest = request.pieces, max(map(len, request.pieces))
    valid = torch.tensor([[at < len(piece) for at in range(longest)] for piece in pieces])
    places = [range(request.skipped, len(piece) - 1) for piece in pieces]
    largest: dict[str, float] = {}
    with (
        torch.inference_mode(),
        _watched(model, valid, largest),
        streaming.weights_in_float32(model, mapped, progress),
    ):
        found = [
            _likeliest(rows, torch.tensor(pieces[number][some.start + 1 : some.stop + 1]))
            for number, some, rows in lending.logits(model, pieces, places)
        ]
    columns = [np.concatenate(column) for column in zip(*found, strict=True)]
    ranges = np.array(list(largest)), np.array(list(largest.values()), np.float32)
    return dict(zip(ARRAYS, [*columns, np.array(origin), *ranges], strict=True))


def known(memo: Memo, document: JsonObject) -> dict[str, np.ndarray] | None:
    """Return the memoised results under the same ``document``, for any scheme and target."""
    part = memo.recall(KIND, document)
    if part is None:
        return None
    with np.load(part.path) as found:
        return dict(found)


def keep(memo: Memo, document: JsonObject, found: Mapping[str, np.ndarray], folder: Path) -> None:
    """Memoise results; ``folder`` is for a temporary file."""
    file = folder / "original.npz"
    np.savez(file, **dict(found))  # type: ignore[arg-type]
    memo.remember(KIND, document, file)
    file.unlink()


def document(request: OriginalRequest, digests: Mapping[str, str]) -> JsonObject:
    """Return everything that an answer depends on beside the code; ``digests`` are those of the request's files."""
    probes = json.dumps([request.pieces, request.skipped], separators=(",", ":"))
    return {
        "checkpoint": {name: digests[name] for name in sorted(request.files)},  # all that a model may be loaded from
        "config": blake3(Path(request.config).read_bytes()).hexdigest(),
        "probes": blake3(probes.encode()).hexdigest(),
        "tools": {name: version(name) for name in ("torch", "transformers", "numpy", "gguf")},
    }


@contextmanager
def _watched(model: Any, valid: Any, largest: dict[str, float]) -> Iterator[None]:
    """Keep the largest magnitude that each module with parameters reads or gives where ``valid`` bool [b, s] is."""
    import torch

    def note(name: str) -> Any:
        def after(_module: Any, inputs: Any, output: Any) -> None:
            for value in (*inputs, output):
                if isinstance(value, torch.Tensor) and value.is_floating_point():
                    here = value[valid] if value.shape[:2] == valid.shape else value
                    largest[name] = max(largest.get(name, 0.0), float(here.abs().max()))

        return after

    named = [(name, module) for name, module in lending.owners(model).items()]
    hooks = [module.register_forward_hook(note(name)) for name, module in named]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _likeliest(logits: Any, following: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the :data:`TOP` likeliest ids of each row, their log probabilities, and those of ``following``."""
    log_probs = logits.log_softmax(-1)
    top = log_probs.topk(min(TOP, logits.shape[-1]), dim=-1)
    chosen = log_probs.gather(-1, following[:, None])[:, 0]
    return top.indices.numpy().astype(np.uint32), top.values.numpy(), chosen.numpy()
