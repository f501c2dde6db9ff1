"""The perplexity of the example checkpoints in every scheme; needs torch and transformers, run by quantize.py.

Held-out text is that of examples/tiny-qwen/text, which none of the examples was trained on. The model is transformers'
in float32 on the weights as they are stored, dequantized.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from stages.quantization.schemes import Scheme

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ("tiny-qwen", "tiny-llama")
BATCH = 24  # documents
IGNORED = -100

sys.path.append(str(ROOT / "examples" / "tiny-qwen"))


class Example:
    """A checkpoint as arrays, and transformers' model of it."""

    def __init__(self, folder: Path) -> None:
        from stages.checkpoint.headers import read_headers
        from stages.checkpoint.tensors import Weights
        from stages.models import load_family

        raw = json.loads((folder / "config.json").read_text())
        self.family = load_family(raw["model_type"])
        self.config = self.family.parse(raw)
        files = {path.name: path for path in folder.glob("*.safetensors*")}
        tensors = read_headers(files).table()
        weights = Weights(files, tensors)
        self.arrays = {name: weights[name] for name in tensors}
        self.model: Any = None

    def stored(self, scheme_name: str, scales: str) -> dict[str, np.ndarray]:
        """Return the checkpoint's tensors in float32 as they are after a scheme."""
        from stages.models.transforms import apply, invert
        from stages.quantization.parameter import convert, restored
        from stages.quantization.schemes import SCHEMES

        scheme, found = SCHEMES[scheme_name], {}
        for param in self.family.params(self.config):
            array = apply(param.transform, [self.arrays[source] for source in param.sources])
            dtype = param.dtype or scheme.storage_dtype
            row = scheme.row(param.kind, array.shape[-1])
            kept = convert([array], row, shape=array.shape, dtype=dtype, scales=scales).stored
            array = restored(kept, row, array.shape[1]) if row else kept[0].astype(np.float32)
            found |= dict(zip(param.sources, invert(param.transform, array, param.source_shapes), strict=True))
        return found

    @torch.no_grad()
    def perplexity(self, tensors: dict[str, np.ndarray], documents: list[list[int]]) -> float:
        """Return the perplexity per token over whole documents, each begun behind its end-of-text token."""
        import transformers

        name, keywords, state = self.family.to_reference(self.config, tensors)
        if self.model is None:
            cls = getattr(transformers, name)
            self.model = cls(cls.config_class(**keywords)).eval()
        state = {key: torch.from_numpy(np.ascontiguousarray(array)) for key, array in state.items()}
        self.model.load_state_dict(state, strict=True)
        loss, by_length = 0.0, sorted(documents, key=len)
        for begin in range(0, len(by_length), BATCH):
            batch = by_length[begin : begin + BATCH]
            # Filled up behind the end, which attention to what came before does not see.
            longest = len(batch[-1])
            ids = torch.tensor([[document[-1], *document, *[0] * (longest - len(document))] for document in batch])
            wanted = torch.tensor([[*document, *[IGNORED] * (longest - len(document))] for document in batch])
            logits = self.model(ids[:, :-1]).logits.flatten(0, 1)
            each = torch.nn.functional.cross_entropy(logits, wanted.flatten(), ignore_index=IGNORED, reduction="none")
            loss += each.double().sum().item()
        return math.exp(loss / sum(map(len, documents)))


def _grouped(scheme: Scheme) -> bool:
    return any(row.kind == "group" for row in scheme.rows)


def table() -> list[tuple[str, str, str, bool]]:
    """Print the perplexity in every scheme; return what is required of the search for scales."""
    from vocabulary import read_documents

    from stages.quantization.schemes import SCHEMES

    documents, rows = read_documents("heldout.txt"), []
    for name in EXAMPLES:
        example, measured, known = Example(ROOT / "examples" / name), {}, {}
        for scheme in SCHEMES.values():
            grouped = _grouped(scheme)
            for scales in ("max", "mse") if grouped else ("max",):
                values = replace(scheme, name="", linear_layout="nk"), scales  # what decides the values
                if values not in known:
                    known[values] = example.perplexity(example.stored(scheme.name, scales), documents)
                found = measured[scheme.name, scales] = known[values]
                floor = measured["q0f32", "max"]
                more = f"+{100 * (found / floor - 1):.2f} %"
                print(f"{name:<11} {scheme.name:<9} {scales if grouped else '':<4} {found:8.4f}  {more}")
        for scheme in SCHEMES.values():
            if _grouped(scheme) and scheme.bits < 8:
                plain, searched = measured[scheme.name, "max"], measured[scheme.name, "mse"]
                shown = f"{searched:.4f}, max {plain:.4f}, float32 {measured['q0f32', 'max']:.4f}"
                rows.append((f"{name}, {scheme.name}, scales mse", shown, "below max", searched < plain))
    return rows
