"""The memory layout n32 of matrices for the CPU kernels, and the unpacking of their values.

Blocks of 32 output features lie side by side, so that features are lanes and nothing is summed across lanes. What is
stored of a feature, along k: words of packed elements and the scales of groups, or plain floats.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as T  # noqa: N812

from stages.kernels.cpu.vectors import as_float, constant, lanes_of, span, splat
from stages.sizes import FLOAT4_MOST, LEVEL_BITS, LEVELED, LEVELS_PER_WORD, PLANES, SHARING, level_blocks, level_words
from stages.sizes import N32_BLOCK as BLOCK


@dataclass(frozen=True)
class Stored:
    """A matrix [n, k]: ``bits`` per element and ``group`` elements per scale of ``dtype``, or, where ``bits`` is 0,
    floats of ``dtype``. With ``minimum`` a group has one too, which is added to element * scale; without, the element
    in the middle means zero. With ``levels`` both are integers, and several groups share two floats for them; elements
    may then lie in two planes: the words of a group's lowest bits, and after them those of the others. Of ``mxfp4``
    elements are floats of four bits and scales powers of two (stages/quantization/float4.py): kernels get integers of
    five bits, as of symmetric groups.
    """

    n: int
    k: int
    dtype: str
    bits: int = 0
    group: int = 0
    minimum: bool = False
    levels: bool = False
    mxfp4: bool = False

    @property
    def blocks(self) -> int:
        """Blocks of features; the last one is filled up with zeros."""
        return -(-self.n // BLOCK)

    @property
    def per_word(self) -> int:
        """Elements in one word, of those that hold their lowest bits."""
        return 32 // self.planes[0]

    @property
    def planes(self) -> tuple[int, ...]:
        """Bits of an element that each plane holds, the lowest first."""
        return PLANES[self.bits] if self.levels else (self.bits,)

    @property
    def words(self) -> int:
        """Words of a group."""
        return sum(self.group // (32 // bits) for bits in self.planes)

    @property
    def tensors(self) -> list[tuple[str, tuple[int, ...], str]]:
        """Name, shape and dtype of what is stored."""
        if not self.bits:
            return [("weight", (self.blocks, self.k, BLOCK), self.dtype)]
        groups = self.k // self.group
        words = groups * self.words
        if self.levels:
            return [
                ("q_weight", (self.blocks, words, BLOCK), "uint32"),
                ("q_scale", (self.blocks, level_words(groups, self.bits), BLOCK), "uint32"),
                ("q_outer", (self.blocks, 2 * level_blocks(groups, self.bits), BLOCK), self.dtype),
            ]
        scales = [(name, (self.blocks, groups, BLOCK), self.dtype) for name in ("q_scale", "q_min")]
        return [("q_weight", (self.blocks, words, BLOCK), "uint32"), *scales[: 1 + self.minimum]]

    @property
    def width(self) -> int:
        """Bits of an element that kernels multiply."""
        return 5 if self.mxfp4 else self.bits

    @property
    def middle(self) -> int:
        """The element that is worth nothing."""
        if self.mxfp4:
            return FLOAT4_MOST
        return 0 if self.minimum else (1 << (self.bits - 1)) - 1

    def place(self, element: int) -> int:
        """Return the bit at which an element of a word of the lowest bits begins: bytes hold every fourth element."""
        return 8 * (element % 4) + self.planes[0] * (element // 4)

    def shift(self, element: int) -> int:
        """Return by how many bits :meth:`code` leaves an element to the left, where it is or in :meth:`fours`."""
        place = 8 * (element % 4) if self._joined else self.place(element)
        return place if place + self.width < 32 else 0

    @property
    def _joined(self) -> bool:
        """Whether elements are made of more than some bits of a word: four at once, as bytes."""
        return len(self.planes) > 1 or self.mxfp4

    def code(self, word: Callable[[Any], Any], number: Any, element: int, lanes: int) -> Any:
        """Return element * 2 ** shift(element) of each of ``lanes``, float32: where it can, it stays at its place.

        It is an ``element`` of word ``number`` of a group, whose words ``word(number)`` gives; where elements lie in
        several planes, ``number`` is known when the kernel is made.
        """
        return self._moved(self.shift(element), word, number, element, lanes)

    def element(self, word: Callable[[Any], Any], number: Any, element: int) -> Any:
        """Return an element of each lane of a block, float32; arguments are those of :meth:`code`."""
        return self._moved(0, word, number, element, BLOCK)

    def _moved(self, to: int, word: Callable[[Any], Any], number: Any, element: int, lanes: int) -> Any:
        """Return element * 2 ** ``to`` of each of ``lanes``, float32."""
        source, place = word(number), self.place(element)
        if self._joined:
            source, place = _once(self.fours(word, number, element // 4, lanes), lanes), 8 * (element % 4)
        bits = _bits(source, place, to, (1 << self.width) - 1, lanes)
        return as_float(T.reinterpret(f"int32x{lanes}", bits), lanes)

    def fours(self, word: Callable[[Any], Any], number: Any, part: int, lanes: int) -> Any:
        """Return elements 4 * part to 4 * part + 3 of a word as the bytes of each of ``lanes``, uint32; the other
        arguments are those of :meth:`code`.
        """
        low, *others = self.planes
        found = _bits(word(number), low * part, 0, _in_bytes(low), lanes)
        first, below = self.group * low // 32, low
        for bits in others:
            at, place = divmod(number * self.per_word // 4 + part, 8 // bits)
            more = _bits(word(first + at), bits * place, below, _in_bytes(bits), lanes)
            found, first, below = T.bitwise_or(found, more), first + self.group * bits // 32, below + bits
        return _integers(found, lanes) if self.mxfp4 else found

    def each_word(self, loop: Any, count: int, body: Callable[[Any], None]) -> None:
        """Emit ``body(number)`` for each of ``count`` words, or runs of words, of a group: in a ``loop`` of TVM's where
        elements lie in one plane, else one after the other.
        """
        if len(self.planes) > 1:
            for number in range(count):
                body(number)
        else:
            with loop(0, count) as number:
                body(number)

    def scale(self, weights: Sequence[Any], block: Any, group: Any, left: Any = 0, lanes: int = BLOCK) -> Any:
        """Return the scales of a group as float32, ``lanes`` of them from ``left`` on."""
        if self.levels:
            return self._of_levels(weights, block, group, 0, left, lanes)
        stored = weights[1][block, group, span(left, lanes)]
        if self.mxfp4:  # the exponent where a float32 has it; integers count halves
            power = T.shift_left(T.Cast(lanes_of("uint32", lanes), stored), constant(23, lanes, "uint32"))
            return T.reinterpret(lanes_of("float32", lanes), power) * constant(0.5, lanes)
        return as_float(stored, lanes)

    def least(self, weights: Sequence[Any], block: Any, group: Any, left: Any = 0, lanes: int = BLOCK) -> Any:
        """Return the minima of a group as float32, ``lanes`` of them from ``left`` on."""
        if self.levels:
            return -self._of_levels(weights, block, group, 1, left, lanes)
        return as_float(weights[2][block, group, span(left, lanes)], lanes)

    @property
    def eights(self) -> tuple[int, int]:
        """How often there are eight groups, and how many are left."""
        return divmod(self.k // self.group, LEVELED)

    def of_levels(self, weights: Sequence[Any], block: Any, outer: Any, number: int) -> tuple[Any, Any]:
        """Return the scales, and the minima to be taken off, of group ``number`` of the eight from ``8 * outer`` on, or
        of those that are left where ``outer`` is the number of eights.
        """
        level = self._nibble if LEVEL_BITS[self.bits] == 4 else self._level
        scale, least = (
            as_float(T.Cast(f"int32x{BLOCK}", level(weights[1], block, outer, number, which)), BLOCK)
            * self._shared(weights, block, outer, which, 0, BLOCK)
            for which in range(2)
        )
        return scale, least

    def _shared(self, weights: Sequence[Any], block: Any, outer: Any, which: int, left: Any, lanes: int) -> Any:
        """Return the floats that levels of the groups from ``8 * outer`` on are multiplied by."""
        last = level_blocks(self.k // self.group, self.bits) - 1
        number = T.min(outer // (SHARING[self.bits] // LEVELED), last)
        return as_float(weights[2][block, number * 2 + which, span(left, lanes)], lanes)

    def _nibble(
        self, levels: Any, block: Any, outer: Any, number: Any, which: int, left: Any = 0, lanes: int = BLOCK
    ) -> Any:
        """Return levels of four bits: a byte of a word holds those of a group, the scale's in its lower half."""
        word = levels[block, outer * (LEVELED // 4) + number // 4, span(left, lanes)]
        place = T.Cast("uint32", number % 4 * 8 + 4 * which)
        return T.bitwise_and(T.shift_right(word, splat(place, lanes)), constant(15, lanes, "uint32"))

    def _level(self, levels: Any, block: Any, outer: Any, number: int, which: int) -> Any:
        """Return levels of six bits, of a group whose number in its eight is known."""
        whole, rest = self.eights
        count = rest if isinstance(outer, int) and outer == whole else LEVELED
        level = number + count * which
        if level == 2 * LEVELED - 1:
            return _last_level([levels[block, outer * 3 + i, span(0, BLOCK)] for i in range(3)], BLOCK)
        word = levels[block, outer * 3 + level // LEVELS_PER_WORD, span(0, BLOCK)]
        place = constant(level % LEVELS_PER_WORD * 6, BLOCK, "uint32")
        return T.bitwise_and(T.shift_right(word, place), constant(63, BLOCK, "uint32"))

    def _any_level(self, levels: Any, block: Any, outer: Any, number: Any, which: int, left: Any, lanes: int) -> Any:
        """Return levels of six bits, of a group that is known at run time."""
        whole, rest = self.eights
        level = number + LEVELED * which
        level = T.Select(outer < whole, level, number + rest * which) if rest else level
        word, bit = level // LEVELS_PER_WORD, T.Cast("uint32", level % LEVELS_PER_WORD * 6)
        # The last level has no word: where it is asked for, bits of another one are read and thrown away.
        at = outer * 3 + T.min(word, 2) if which else outer * 3 + word
        moved = T.shift_right(levels[block, at, span(left, lanes)], splat(bit, lanes))
        found = T.bitwise_and(moved, constant(63, lanes, "uint32"))
        if which and whole:
            first = T.min(outer, whole - 1) * 3  # the words of what is left may be fewer
            words = [levels[block, first + i, span(left, lanes)] for i in range(3)]
            found = T.Select(splat(level == 2 * LEVELED - 1, lanes), _last_level(words, lanes), found)
        return found

    def _of_levels(self, weights: Sequence[Any], block: Any, group: Any, which: int, left: Any, lanes: int) -> Any:
        """Return the scales (``which`` is 0) or minima (1) of a group that is known at run time."""
        level = self._nibble if LEVEL_BITS[self.bits] == 4 else self._any_level
        outer = group // LEVELED
        found = level(weights[1], block, outer, group % LEVELED, which, left, lanes)
        return as_float(T.Cast(f"int32x{lanes}", found), lanes) * self._shared(
            weights, block, outer, which, left, lanes
        )


def _bits(word: Any, place: int, to: int, mask: int, lanes: int) -> Any:
    """Return the bits of ``mask`` of each lane, moved from bit ``place`` to bit ``to``, and nothing else."""
    shift = T.shift_right if place > to else T.shift_left
    word = shift(word, constant(abs(place - to), lanes, "uint32")) if place != to else word
    return T.bitwise_and(word, constant(mask << to, lanes, "uint32"))


def _once(words: Any, lanes: int) -> Any:
    """Return ``words`` as they are, behind a fence: LLVM would put the bits of each byte together separately."""
    dtype = f"float32x{lanes}"
    fenced = T.call_llvm_pure_intrin(dtype, "llvm.arithmetic.fence", T.reinterpret(dtype, words))
    return T.reinterpret(f"uint32x{lanes}", fenced)


def _integers(floats: Any, lanes: int) -> Any:
    """Return what floats of four bits, each in a byte, are worth in halves, and :data:`FLOAT4_MOST` more: 0 to 24.

    The lower three bits are 0, 1, 2, 3, 4, 6, 8, 12 halves: themselves, what they are above 4, and twice what they are
    above 6. Nothing is carried from byte to byte.
    """

    def word(number: int) -> Any:
        return constant(0x01010101 * number, lanes, "uint32")

    def bit(place: int) -> Any:
        return T.bitwise_and(T.shift_right(floats, constant(place, lanes, "uint32")), word(1))

    above_four = T.bitwise_and(floats, bit(2) * constant(3, lanes, "uint32"))
    above_six = T.bitwise_and(T.bitwise_and(bit(0), bit(1)), bit(2))
    halves = T.bitwise_and(floats, word(7)) + above_four + above_six * constant(2, lanes, "uint32")
    negative = T.bitwise_and(halves, bit(3) * constant(255, lanes, "uint32"))
    return word(FLOAT4_MOST) + halves - negative * constant(2, lanes, "uint32")


def _in_bytes(bits: int) -> int:
    """Return the lowest ``bits`` of all four bytes of a word."""
    return 0x01010101 * ((1 << bits) - 1)


def _last_level(words: Sequence[Any], lanes: int) -> Any:
    """Return the last level of three ``words``, two bits of each."""
    parts = []
    for number, word in enumerate(words):
        moved = T.shift_right(word, constant(30 - 2 * number, lanes, "uint32"))
        parts.append(T.bitwise_and(moved, constant(3 << 2 * number, lanes, "uint32")))
    return T.bitwise_or(T.bitwise_or(parts[0], parts[1]), parts[2])
