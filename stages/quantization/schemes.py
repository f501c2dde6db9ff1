"""The quantization schemes, by MLC-LLM's names, as data. Norms and biases are never quantized, whatever the scheme."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FloatType = Literal["float16", "bfloat16", "float32"]


@dataclass(frozen=True)
class Scheme:
    """How weights are stored; the arithmetic is in docs/quantization.md.

    ``kind`` "none" stores every parameter as ``storage_dtype``. "group" stores each ``group_size`` values of a weight's
    row as ``bits``-bit integers, packed into uint32 words, with one scale of ``storage_dtype``, "tensor" stores
    float8_e4m3fn with one float32 scale for the whole weight; both store the rest as ``storage_dtype``.
    ``model_dtype`` is the dtype of activations where the target computes in it. ``linear_layout`` is how the tensors of
    linear layers and the head lie in memory (layouts.py) unless a target's kernels read them in a layout of their own.
    """

    name: str
    kind: Literal["none", "group", "tensor"]
    bits: int
    group_size: int
    storage_dtype: FloatType
    model_dtype: FloatType
    quantize_embedding: bool
    quantize_head: bool
    linear_layout: Literal["nk", "kn"] = "nk"

    def quantizes(self, kind: str) -> bool:
        """Say whether parameters of ``kind`` (linear, embedding, head, norm, bias) are stored as integers."""
        takes_part = {"linear": True, "embedding": self.quantize_embedding, "head": self.quantize_head}
        return self.kind != "none" and takes_part.get(kind, False)

    @property
    def top(self) -> int:
        """The largest integer that a group's scale is made for: codes are integers with this added."""
        return int(2 ** (self.bits - 1) - 1)

    @property
    def per_word(self) -> int:
        """How many codes one uint32 holds, low bits first."""
        return 32 // self.bits

    def groups(self, k: int) -> int:
        """Return the number of groups in a row of ``k`` values, the last of which may be short."""
        return -(-k // self.group_size)

    def words(self, k: int) -> int:
        """Return the number of words in a row of ``k`` values: a short group takes as many as a full one."""
        return self.groups(k) * (self.group_size // self.per_word)

    def stored(self, n: int, k: int) -> tuple[tuple[str, tuple[int, ...], str], ...]:
        """Return what a quantized weight [n, k] is stored as: last part of the name, shape, dtype."""
        if self.kind == "tensor":
            return ("q_weight", (n, k), "float8_e4m3fn"), ("q_scale", (1,), "float32")
        return ("q_weight", (n, self.words(k)), "uint32"), ("q_scale", (n, self.groups(k)), self.storage_dtype)


SCHEMES: dict[str, Scheme] = {
    "q0f32": Scheme("q0f32", "none", 32, 0, "float32", "float32", False, False),
    "q0f16": Scheme("q0f16", "none", 16, 0, "float16", "float16", False, False),
    "q0bf16": Scheme("q0bf16", "none", 16, 0, "bfloat16", "bfloat16", False, False),
    "q3f16_1": Scheme("q3f16_1", "group", 3, 40, "float16", "float16", True, True),
    "q4f16_0": Scheme("q4f16_0", "group", 4, 32, "float16", "float16", True, True, "kn"),
    "q4f16_1": Scheme("q4f16_1", "group", 4, 32, "float16", "float16", True, True),
    "q4f16_2": Scheme("q4f16_2", "group", 4, 32, "float16", "float16", False, False),
    "q4bf16_1": Scheme("q4bf16_1", "group", 4, 32, "bfloat16", "bfloat16", True, True),
    "q4f32_1": Scheme("q4f32_1", "group", 4, 32, "float32", "float32", True, True),
    "q8f16_1": Scheme("q8f16_1", "group", 8, 32, "float16", "float16", True, True),
    "q8f32_1": Scheme("q8f32_1", "group", 8, 32, "float32", "float32", True, True),
    "e4m3_f16": Scheme("e4m3_f16", "tensor", 8, 0, "float16", "float16", False, False),
}
