"""The arithmetic of the quantizing kernels, on one lane or all: each function returns an expression of TIR."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T  # noqa: N812 - the name TVMScript is written with

UNIT = 1.5 * 2**23  # a float so large that neighbours are integers; with up to 2**22 added or taken off as well


def widen(bits: Any, dtype: str) -> Any:
    """Return the float32 of a value of ``dtype`` given as its bits; exact."""
    if dtype == "float32":
        return T.reinterpret("float32", bits)
    if dtype == "float16":
        return T.Cast("float32", T.reinterpret("float16", bits))
    return T.reinterpret("float32", T.shift_left(T.Cast("uint32", bits), T.uint32(16)))


def narrow(value: Any, dtype: str) -> Any:
    """Return the bits of a finite float32 ``value`` rounded half to even to ``dtype``."""
    if dtype == "float32":
        return T.reinterpret("uint32", value)
    if dtype == "float16":
        return T.reinterpret("uint16", T.Cast("float16", value))
    bits = T.reinterpret("uint32", value)
    odd = T.bitwise_and(T.shift_right(bits, T.uint32(16)), T.uint32(1))
    return T.Cast("uint16", T.shift_right(bits + T.uint32(0x7FFF) + odd, T.uint32(16)))


def rounded(value: Any, low: int, high: int) -> Any:
    """Return ``value`` clipped, rounded half to even, plus :data:`UNIT`: a level that is an integer in the low bits."""
    return T.max(T.min(value, T.float32(high)), T.float32(low)) + T.float32(UNIT)


def level_of(biased: Any) -> Any:
    """Return the level that :func:`rounded` made, as a float."""
    return biased - T.float32(UNIT)


def divisor_of(scale: Any, inverts: bool) -> Any:
    """Return what :func:`quotient` takes beside the scale, its inverse or itself, made so that zero gives zeros."""
    if inverts:
        return T.Select(scale == T.float32(0), T.float32(0), T.float32(1) / scale)
    return T.Select(scale == T.float32(0), T.float32(float("inf")), scale)


def quotient(value: Any, scale: Any, divisor: Any, inverts: bool) -> Any:
    """Return ``value / scale``, correctly rounded.

    A division takes a processor as long as ten other steps. A product with the inverse is off by at most 2**-23 of it.
    What it leaves of the value is exact in one fused step, since the scale has 11 bits; a second step adds that, 2**-47
    off before it is rounded. No quotient by 11 bits is closer than 2**-36 to the middle between two floats without
    being there, so it is rounded as the true one is (Markstein, IBM J. Res. Dev. 34(1), 1990).
    """
    if not inverts:
        return value / divisor
    near = value * divisor
    return fused(fused(-near, scale, value), divisor, near)


def fused(a: Any, b: Any, c: Any) -> Any:
    """Return ``a * b + c``, rounded once."""
    return T.call_llvm_pure_intrin("float32", "llvm.fma", a, b, c)


def largest(codes: Any, lanes: int, raw: str) -> Any:
    """Return the largest of ``lanes`` unsigned integers."""
    return T.call_llvm_pure_intrin(raw, "llvm.vector.reduce.umax", codes[T.ramp(0, 1, lanes)])


def word_of(codes: Any, at: Any, bits: int) -> Any:
    """Return the uint32 that holds the codes from ``at`` on, low bits first."""
    word = T.Cast("uint32", codes[at])
    for j in range(1, 32 // bits):
        word = T.bitwise_or(word, T.shift_left(T.Cast("uint32", codes[at + j]), T.uint32(j * bits)))
    return word


def words_of(codes: Any, at: Any) -> Any:
    """Return four words of eight four-bit codes each, low bits first."""
    pairs = T.reinterpret("uint16x16", codes[T.ramp(at, 1, 32)])
    moved = T.bitwise_or(pairs, T.shift_right(pairs, T.broadcast(T.uint16(4), 16)))
    return T.reinterpret("uint32x4", T.Cast("uint8x16", T.bitwise_and(moved, T.broadcast(T.uint16(255), 16))))


def spread_words_of(codes: Any, at: Any) -> Any:
    """Return four words of eight four-bit codes each, the last four in the high halves of the first four's bytes."""
    eights = T.reinterpret("uint64x4", codes[T.ramp(at, 1, 32)])
    return T.Cast("uint32x4", T.bitwise_or(eights, T.shift_right(eights, T.broadcast(T.uint64(28), 4))))
