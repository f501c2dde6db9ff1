"""How a matrix lies in memory for the CPU kernels (layout n32), and how its values are taken out of it.

Blocks of 32 output features lie side by side, so that features are lanes and nothing is summed across lanes. What is
stored of a feature, along k: words of packed elements and the scales of groups, or plain floats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as T  # noqa: N812

from stages.kernels.cpu.vectors import as_float, constant, span
from stages.sizes import N32_BLOCK as BLOCK


@dataclass(frozen=True)
class Stored:
    """A matrix [n, k]: ``bits`` per element and ``group`` elements per scale of ``dtype``, or, where ``bits`` is 0,
    floats of ``dtype``. With ``minimum`` a group has one too, which is added to element * scale; without, the element
    in the middle means zero.
    """

    n: int
    k: int
    dtype: str
    bits: int = 0
    group: int = 0
    minimum: bool = False

    @property
    def blocks(self) -> int:
        """Blocks of features; the last one is filled up with zeros."""
        return -(-self.n // BLOCK)

    @property
    def per_word(self) -> int:
        """Elements in one word."""
        return 32 // self.bits

    @property
    def tensors(self) -> list[tuple[str, tuple[int, ...], str]]:
        """Name, shape and dtype of what is stored."""
        if not self.bits:
            return [("weight", (self.blocks, self.k, BLOCK), self.dtype)]
        words, groups = self.k // self.per_word, self.k // self.group
        scales = [(name, (self.blocks, groups, BLOCK), self.dtype) for name in ("q_scale", "q_min")]
        return [("q_weight", (self.blocks, words, BLOCK), "uint32"), *scales[: 1 + self.minimum]]

    @property
    def middle(self) -> int:
        """The element that is worth nothing."""
        return 0 if self.minimum else (1 << (self.bits - 1)) - 1

    def place(self, element: int) -> int:
        """Return the bit at which an element of a word begins: bytes hold every fourth element, low bits first."""
        return 8 * (element % 4) + self.bits * (element // 4) if self.bits < 8 else 8 * element

    def mantissa(self, word: Any, element: int) -> Any:
        """Return 1 + element / 2 ** bits of each lane of a word: the element moved into the mantissa of 1."""
        moved = 23 - self.bits - self.place(element)
        shift = T.shift_left if moved > 0 else T.shift_right
        shifted = shift(word, constant(abs(moved), BLOCK, "uint32")) if moved else word
        mask = ((1 << self.bits) - 1) << (23 - self.bits)
        kept = T.bitwise_or(
            T.bitwise_and(shifted, constant(mask, BLOCK, "uint32")), constant(0x3F800000, BLOCK, "uint32")
        )
        return T.reinterpret(f"float32x{BLOCK}", kept)

    @property
    def mantissa_middle(self) -> float:
        """What :meth:`mantissa` is for the element that is worth nothing."""
        return 1 + self.middle / (1 << self.bits)

    def scale(self, q_scale: Any, block: Any, group: Any) -> Any:
        """Return the scales of a group times 2 ** bits: what a difference of mantissas is multiplied by."""
        return self.plain_scale(q_scale, block, group) * constant(float(1 << self.bits), BLOCK)

    def plain_scale(self, q_scale: Any, block: Any, group: Any) -> Any:
        """Return the scales of a group as float32."""
        return as_float(q_scale[block, group, span(0, BLOCK)], BLOCK)

    def least(self, weights: Sequence[Any], block: Any, group: Any, left: Any = 0, lanes: int = BLOCK) -> Any:
        """Return the minima of a group of ``weights`` as float32, ``lanes`` of them from ``left`` on."""
        return as_float(weights[2][block, group, span(left, lanes)], lanes)
