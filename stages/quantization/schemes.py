"""The quantization schemes, by MLC-LLM's names, as data. Norms and biases are never quantized, whatever the scheme."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Scheme:
    """How weights are stored.

    ``kind`` "none" stores every parameter as ``storage_dtype``. ``kind`` "group" stores each ``group_size`` values of
    a weight's row as ``bits``-bit integers with one scale of ``storage_dtype`` (arithmetic: :mod:`.group`), and the
    rest as ``storage_dtype``. ``model_dtype`` is the dtype of activations where the target computes in it.
    """

    name: str
    kind: Literal["none", "group"]
    bits: int
    group_size: int
    storage_dtype: Literal["float16", "float32"]
    model_dtype: Literal["float16", "float32"]
    quantize_embedding: bool
    quantize_head: bool

    def quantizes(self, kind: str) -> bool:
        """Say whether parameters of ``kind`` (linear, embedding, head, norm, bias) are stored as integers."""
        takes_part = {"linear": True, "embedding": self.quantize_embedding, "head": self.quantize_head}
        return self.kind == "group" and takes_part.get(kind, False)


SCHEMES: dict[str, Scheme] = {
    "q0f32": Scheme("q0f32", "none", 32, 0, "float32", "float32", False, False),
    "q0f16": Scheme("q0f16", "none", 16, 0, "float16", "float16", False, False),
    "q4f32_1": Scheme("q4f32_1", "group", 4, 32, "float32", "float32", True, True),
    "q4f16_1": Scheme("q4f16_1", "group", 4, 32, "float16", "float16", True, True),
}
