"""A storage format of quantized matrices as data: one row of the table in docs/quantization.md.

What a parameter is stored as is recorded with it in params.json, and everything that reads or writes stored weights
asks that record, never the scheme: parameters of one model may differ.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from stages.sizes import PLANES, level_blocks, level_words

if TYPE_CHECKING:
    from stages.documents.params import StoredRow

NARROWEST = 16  # values of a group: scales of fewer would take as much as what they scale


@dataclass(frozen=True)
class Row:
    """One way to store the values of a matrix [n, k].

    ``kind`` "group" stores each ``group_size`` values of a row as integers of ``bits``, packed into uint32 words, with
    one scale of ``scale_dtype``; where there is a ``minimum``, with a minimum of that dtype too. "mxfp4" stores them as
    floats of four bits, packed likewise, with the exponent of a power of two (:mod:`.float4`). "float8" stores
    float8_e4m3fn with one scale for each ``group_size`` values of a row, "tensor" with one for the whole weight. The
    value of an integer c is ``(c - top) * scale``, or ``c * scale + minimum``. With ``levels`` scale and minimum of a
    group are integers of :data:`~stages.sizes.LEVEL_BITS`, and several groups share two floats, s and m, for them:
    ``c * (s * scale) - m * minimum``.
    """

    kind: str
    bits: int
    group_size: int
    scale_dtype: str
    minimum: bool = False
    levels: bool = False

    @property
    def name(self) -> str:
        """A short name, for tables and messages."""
        if self.kind == "mxfp4":
            return f"MXFP4/{self.group_size}"
        if not self.packed:
            return "float8_e4m3fn" + (f"/{self.group_size}" if self.group_size else "")
        more = " with minimum" if self.minimum else ""
        return f"{self.bits} bits/{self.group_size} {self.scale_dtype}{more}{' in two levels' if self.levels else ''}"

    @property
    def packed(self) -> bool:
        """Whether codes are packed into words."""
        return self.kind in ("group", "mxfp4")

    @property
    def top(self) -> int:
        """The largest integer that a symmetric group's scale is made for: codes are integers with this added."""
        return int(2 ** (self.bits - 1) - 1)

    @property
    def most(self) -> int:
        """The largest code."""
        return int(2**self.bits - 1)

    @property
    def per_word(self) -> int:
        """How many codes one uint32 holds, low bits first; with planes, their lowest bits."""
        return 32 // self.planes[0]

    @property
    def planes(self) -> tuple[int, ...]:
        """How many bits of a code each plane holds, the lowest first: of a group, its words are one after the other."""
        return PLANES[self.bits] if self.levels else (self.bits,)

    @property
    def parts(self) -> tuple[str, ...]:
        """The last parts of the names of what is stored, in packed order."""
        return tuple(name for name, _, _ in self.stored(0, 0))

    @property
    def element_bits(self) -> tuple[tuple[int, ...], ...]:
        """Of each stored tensor, the bits of an element in each word of a group; empty where layouts move none."""
        moved = self.packed and all(bits in (1, 2, 4) for bits in self.planes)
        words = [bits for bits in self.planes for _ in range(self.group_size * bits // 32)] if moved else []
        return (tuple(words), *(() for _ in self.parts[1:]))

    def groups(self, k: int) -> int:
        """Return the number of groups in a row of ``k`` values, the last of which may be short."""
        return -(-k // self.group_size)

    def words(self, k: int) -> int:
        """Return the number of words in a row of ``k`` values: a short group takes as many as a full one."""
        return self.groups(k) * sum(self.group_size // (32 // bits) for bits in self.planes)

    def stored(self, n: int, k: int) -> tuple[tuple[str, tuple[int, ...], str], ...]:
        """Return what a weight [n, k] is stored as: last part of the name, shape, dtype."""
        if self.kind == "tensor":
            return ("q_weight", (n, k), "float8_e4m3fn"), ("q_scale", (1,), self.scale_dtype)
        if self.kind == "float8":
            return ("q_weight", (n, k), "float8_e4m3fn"), ("q_scale", (n, self.groups(k)), self.scale_dtype)
        words, groups = ("q_weight", (n, self.words(k)), "uint32"), self.groups(k)
        if self.levels:
            floats = "q_outer", (n, 2 * level_blocks(groups, self.bits)), self.scale_dtype
            return words, ("q_scale", (n, level_words(groups, self.bits)), "uint32"), floats
        scale = "q_scale", (n, groups), self.scale_dtype
        return (words, scale, ("q_min", *scale[1:])) if self.minimum else (words, scale)

    def fitting(self, k: int) -> Row:
        """Return the row whose groups fill rows of ``k`` values, if one of at most this group size does: this one
        with the group halved until they do. Kernels of processors read whole groups.

        Codes of two levels keep four or eight bits then: those of others have no words of their own in half a group.
        """
        size = self.group_size
        while size > NARROWEST and k % size:
            size //= 2
        if size == self.group_size and not k % size:
            return self
        size = self.group_size if k % size else size
        if self.levels and self.bits > 4:
            return replace(self, bits=8, minimum=False, levels=False, group_size=size)
        return replace(self, bits=4 if self.levels else self.bits, levels=False, group_size=size)

    def document(self) -> StoredRow:
        """Return the row as params.json records it; ``Row(**document)`` is the row again."""
        return {
            "kind": self.kind,
            "bits": self.bits,
            "group_size": self.group_size,
            "scale_dtype": self.scale_dtype,
            "minimum": self.minimum,
            "levels": self.levels,
        }
