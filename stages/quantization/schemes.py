"""The quantization schemes, as data: named choices of rows. Norms and biases are never quantized, whatever the scheme.

Schemes of MLC-LLM have its names and store what it does; in the others the embedding and the head, which cost a small
model most, keep eight bits, and every group is whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from stages.quantization.rows import Row

if TYPE_CHECKING:
    from stages.documents.params import Parameter, Register

FloatType = Literal["float16", "bfloat16", "float32"]
FLOAT_BITS = {"float32": 32, "float16": 16, "bfloat16": 16}
LEAST, MOST = 2.3, 16  # bits a weight that one can ask for: the fewest of a row, and as many as a float has


@dataclass(frozen=True)
class Scheme:
    """How weights are stored; the arithmetic is in docs/quantization.md.

    ``body``, ``embedding`` and ``head`` are the rows of linear layers, of the token table (also where it is the head)
    and of a head of its own; None stores floats of ``storage_dtype``, as are all other parameters. ``model_dtype`` is
    the dtype of activations where the target computes in it. ``scales`` is how scales are chosen unless the user says
    otherwise. ``whole`` makes groups smaller where a row's length asks for it, so that all are full.
    ``holds`` names a form that ``body`` stores exactly: where some matrices of a checkpoint have it, the other linear
    layers take the embedding's row. ``linear_layout`` is how the tensors of linear layers and the head lie in memory
    (layouts.py) unless a target's kernels read them in a layout of their own.
    """

    name: str
    body: Row | None
    embedding: Row | None
    head: Row | None
    storage_dtype: FloatType
    model_dtype: FloatType
    scales: str = "max"
    whole: bool = False
    linear_layout: Literal["nk", "kn"] = "nk"
    holds: str = ""

    def row(self, kind: str, k: int = 0) -> Row | None:
        """Return the row of parameters of ``kind`` (linear, embedding, head, norm, bias) with rows of ``k`` values;
        None for what stays floats.
        """
        row = {"linear": self.body, "embedding": self.embedding, "head": self.head}.get(kind)
        return row.fitting(k) if row and self.whole else row

    @property
    def rows(self) -> list[Row]:
        """The rows in use."""
        return [row for row in (self.body, self.embedding, self.head) if row]

    @property
    def bits(self) -> int:
        """The fewest bits that a matrix keeps."""
        return min((row.bits for row in self.rows), default=FLOAT_BITS[self.storage_dtype])


def _float(name: str, dtype: FloatType) -> Scheme:
    return Scheme(name, None, None, None, dtype, dtype)


def _same(name: str, bits: int, group: int, dtype: FloatType, layout: Literal["nk", "kn"] = "nk") -> Scheme:
    """Return a scheme that has one row for every matrix, as most of MLC-LLM's."""
    row = Row("group", bits, group, dtype)
    return Scheme(name, row, row, row, dtype, dtype, linear_layout=layout)


def _mixed(name: str, scales: str, body: Row, *, holds: str = "") -> Scheme:
    """Return a scheme whose embedding and head keep eight bits."""
    eight = Row("group", 8, 32, "float16")
    return Scheme(name, body, eight, eight, "float16", "float16", scales, whole=True, holds=holds)


SCHEMES: dict[str, Scheme] = {
    "q0f32": _float("q0f32", "float32"),
    "q0f16": _float("q0f16", "float16"),
    "q0bf16": _float("q0bf16", "bfloat16"),
    "q3f16_1": _same("q3f16_1", 3, 40, "float16"),
    "q4f16_0": _same("q4f16_0", 4, 32, "float16", "kn"),
    "q4f16_1": _same("q4f16_1", 4, 32, "float16"),
    "q4f16_2": Scheme("q4f16_2", Row("group", 4, 32, "float16"), None, None, "float16", "float16"),
    "q4bf16_1": _same("q4bf16_1", 4, 32, "bfloat16"),
    "q4f32_1": _same("q4f32_1", 4, 32, "float32"),
    "q8f16_1": _same("q8f16_1", 8, 32, "float16"),
    "q8f32_1": _same("q8f32_1", 8, 32, "float32"),
    "e4m3_f16": Scheme("e4m3_f16", Row("tensor", 8, 0, "float32"), None, None, "float16", "float16"),
    "e4m3_128": Scheme(
        "e4m3_128", Row("float8", 8, 128, "float32"), None, None, "float16", "float16", holds="fp8 with scales"
    ),
    "mxfp4": _mixed("mxfp4", "max", Row("mxfp4", 4, 32, "uint8"), holds="MXFP4"),
    "q4s16": _mixed("q4s16", "mse", Row("group", 4, 16, "float16")),
    "q4s32": _mixed("q4s32", "mse", Row("group", 4, 32, "float16")),
    "q4s64": _mixed("q4s64", "mse", Row("group", 4, 64, "float16")),
    "q4s128": _mixed("q4s128", "mse", Row("group", 4, 128, "float16")),
    "q4a16": _mixed("q4a16", "max", Row("group", 4, 16, "float16", minimum=True)),
    "q4a32": _mixed("q4a32", "max", Row("group", 4, 32, "float16", minimum=True)),
    "q4a64": _mixed("q4a64", "max", Row("group", 4, 64, "float16", minimum=True)),
    "q2k": _mixed("q2k", "mse", Row("group", 2, 32, "float16", minimum=True, levels=True)),
    "q3k": _mixed("q3k", "mse", Row("group", 3, 32, "float16", minimum=True, levels=True)),
    "q4k": _mixed("q4k", "max", Row("group", 4, 32, "float16", minimum=True, levels=True)),
    "q5k": _mixed("q5k", "max", Row("group", 5, 32, "float16", minimum=True, levels=True)),
    "q6k": _mixed("q6k", "max", Row("group", 6, 32, "float16", minimum=True, levels=True)),
    "q4a128": _mixed("q4a128", "max", Row("group", 4, 128, "float16", minimum=True)),
}


def own_rows(register: Register) -> list[Parameter]:
    """Return the parameters that are stored in other rows than the register's scheme says."""
    scheme = SCHEMES[register["scheme"]]

    def is_own(entry: Parameter) -> bool:
        row = Row(**entry["quantize"]) if entry["quantize"] else None
        return row != scheme.row(entry["kind"], entry["shape"][-1])

    return [entry for entry in register["logical"] if is_own(entry)]


def why_no_budget(bits: float) -> str:
    """Say why no choice of rows comes to ``bits`` a weight; nothing if one may."""
    known = LEAST <= bits <= MOST
    return "" if known else f"{bits:g}: expected {LEAST} to {MOST}; rows take from 2.3 to 8.5 bits a weight"
