"""Byte dot products of a processor: in each lane four unsigned weights times four signed activations.

Every way gives the same integers. VNNI does it in one instruction. AVX2 multiplies and adds up pairs in 16 bits, which
saturate: sums of products with codes of few bits stay there for as many steps as cannot, and are widened then. Codes of
eight bits are taken as the distance from 128 instead, their magnitude by the activation with their sign: two products
of at most 128 * 127 are within 16 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as T  # noqa: N812

from stages.kernels.cpu.vectors import constant, get, put, span, splat, vector

LARGEST = 127  # magnitude of an activation as a byte
_MOST = (1 << 15) - 1  # of a signed integer of 16 bits


@dataclass(frozen=True)
class Vnni:
    """One instruction of ``lanes`` lanes, LLVM's ``name`` for it; ``tile`` and ``streams`` as in
    :class:`~stages.kernels.cpu.linear_float.LinearLayer`, of kernels whose integer and float sums share the registers.
    """

    name: str
    lanes: int
    tile: tuple[int, int]
    streams: int

    def centre(self, _bits: int) -> int:
        """Return what is taken off a code of so many bits before it is multiplied."""
        return 0

    def sums(self, begin: Any, _bits: int) -> VnniSums:
        """Return sums of int32 lanes that begin with ``begin``."""
        return VnniSums(self, begin)


class VnniSums:
    """Accumulators in int32, for any number of products."""

    run = 1 << 30  # products between :meth:`start` and :meth:`end`

    def __init__(self, dot: Vnni, begin: Any) -> None:
        self._dot, self._whole = dot, vector(dot.lanes, "int32")
        put(self._whole, begin, span(0, dot.lanes))

    def start(self) -> None:
        """Begin a run of products."""

    def add(self, codes: Any, word: Any) -> None:
        """Add the products of a vector of ``codes``, four to a word, and the four activations of ``word``."""
        lanes = self._dot.lanes
        weights, activations = _bytes("uint8", codes, lanes), _bytes("int8", splat(word, lanes), lanes)
        found = T.call_llvm_pure_intrin(f"int32x{lanes}", self._dot.name, get(self._whole, lanes), weights, activations)
        put(self._whole, found, span(0, lanes))

    def end(self) -> None:
        """End a run of products."""

    def total(self) -> Any:
        """Return the sums, int32 lanes."""
        return get(self._whole, self._dot.lanes)


@dataclass(frozen=True)
class Avx2:
    """Instructions of 32 bytes that every processor of level x86-64-v3 has."""

    tile: tuple[int, int]
    streams: int
    lanes = 8

    def centre(self, bits: int) -> int:
        """Return what is taken off a code of so many bits before it is multiplied."""
        return 128 if bits == 8 else 0

    def sums(self, begin: Any, bits: int) -> Avx2Sums:
        """Return sums of int32 lanes that begin with ``begin``."""
        return Avx2Sums(begin, bits)


class Avx2Sums:
    """Accumulators in int16 lanes for at most ``run`` products, then in int32."""

    def __init__(self, begin: Any, bits: int) -> None:
        self._signed = bits == 8
        largest = 128 if self._signed else (1 << bits) - 1
        self.run = _MOST // (2 * largest * LARGEST)
        self._whole, self._pairs = vector(8, "int32"), vector(16, "int16")
        put(self._whole, begin, span(0, 8))

    def start(self) -> None:
        """Begin a run of products."""
        put(self._pairs, constant(0, 16, "int16"), span(0, 16))

    def add(self, codes: Any, word: Any) -> None:
        """Add the products of a vector of ``codes``, four to a word, and the four activations of ``word``."""
        weights, activations = _bytes("int8", codes, 8), _bytes("int8", splat(word, 8), 8)
        if self._signed:
            weights, activations = _sign(weights, weights), _sign(activations, weights)
        products = T.call_llvm_pure_intrin("int16x16", "llvm.x86.avx2.pmadd.ub.sw", weights, activations)
        # Saturating ones, though none saturates: LLVM would reorder others, and run out of registers.
        added = T.call_llvm_pure_intrin("int16x16", "llvm.sadd.sat", get(self._pairs, 16), products)
        put(self._pairs, added, span(0, 16))

    def end(self) -> None:
        """End a run of products: neighbours are added up in 32 bits."""
        ones = constant(1, 16, "int16")
        found = T.call_llvm_pure_intrin("int32x8", "llvm.x86.avx2.pmadd.wd", get(self._pairs, 16), ones)
        put(self._whole, get(self._whole, 8) + found, span(0, 8))

    def total(self) -> Any:
        """Return the sums, int32 lanes."""
        return get(self._whole, 8)


def _bytes(dtype: str, words: Any, lanes: int) -> Any:
    return T.reinterpret(f"{dtype}x{4 * lanes}", words)


def _sign(values: Any, signs: Any) -> Any:
    """Return bytes with the signs of others: negated where those are negative, 0 where they are 0."""
    return T.call_llvm_pure_intrin("int8x32", "llvm.x86.avx2.psign.b", values, signs)


# By the feature that a processor needs, as stages/targets/processor.py names them.
DOTS: dict[str, Vnni | Avx2] = {
    "avx512vnni": Vnni("llvm.x86.avx512.vpdpbusd.512", 16, tile=(5, 32), streams=4),
    "avxvnni": Vnni("llvm.x86.avx512.vpdpbusd.256", 8, tile=(2, 16), streams=1),
    "avx2": Avx2(tile=(2, 16), streams=1),
}
