"""The TIR kernels behind quantization: group codes and scales, and casts, each with the error it makes, row by row.

A kernel takes plain addresses and strides, so that a library of kernels is called without TVM and works on mapped
files as they lie. What it stores equals group.py bit by bit: exact divisions, half to even. ``stats`` float32 [rows, 4]
gets sum of squared errors, sum of squares, largest |error| and largest |value| of each row; the last is taken from the
bits, so that a NaN or an infinity shows there.

    python -m stages.quantization.kernels LIBRARY CPU CXX NAME...
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from typing import TYPE_CHECKING, Any

import tvm
from tvm.script import tirx as T  # noqa: N812 - the name TVMScript is written with

from stages.quantization.group import PARTS, TRIED
from stages.quantization.native import ROW, parse_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tvm import tirx

CODE = {"float32": "uint32", "float16": "uint16", "bfloat16": "uint16"}  # the integers that are as wide
MAGNITUDE = {"float32": 0x7FFFFFFF, "float16": 0x7FFF, "bfloat16": 0x7FFF}  # all bits but the sign
CAST_LANES = 16


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
    """Return ``value`` rounded half to even and clipped."""
    return T.max(T.min(T.nearbyint(value), T.float32(high)), T.float32(low))


def unless_zero(scale: Any, otherwise: Any) -> Any:
    """Return ``scale``, or ``otherwise`` where it is zero."""
    return T.Select(scale == T.float32(0), otherwise, scale)


def word_of(codes: Any, at: Any, bits: int) -> Any:
    """Return the four bytes of the uint32 that holds the codes from ``at`` on, low bits first."""
    word = T.Cast("uint32", codes[at])
    for j in range(1, 32 // bits):
        word = T.bitwise_or(word, T.shift_left(T.Cast("uint32", codes[at + j]), T.uint32(j * bits)))
    return T.reinterpret("uint8x4", word)


def halves_of(codes: Any, at: Any) -> Any:
    """Return 16 bytes of two four-bit codes each: in every pair of bytes, the second code moves next to the first."""
    pairs = T.reinterpret("uint16x16", codes[T.ramp(at, 1, 32)])
    moved = T.bitwise_or(pairs, T.shift_right(pairs, T.broadcast(T.uint16(4), 16)))
    return T.Cast("uint8x16", T.bitwise_and(moved, T.broadcast(T.uint16(255), 16)))


@T.inline
def clear(errors, squares, worst, lanes):
    """Begin the sums of a row."""
    for v in T.vectorized(lanes):
        errors[v] = T.float32(0)
        squares[v] = T.float32(0)
        worst[v] = T.float32(0)


@T.inline
def tally(errors, squares, worst, error, value, at, lanes):
    """Add ``lanes`` values from ``at`` on to the sums of a row."""
    for v in T.vectorized(lanes):
        errors[v] = errors[v] + error[v] * error[v]
        squares[v] = squares[v] + value[at + v] * value[at + v]
        worst[v] = T.max(worst[v], T.fabs(error[v]))


@T.inline
def report(stats, row, errors, squares, worst, highest, lanes):
    """Write the sums of a row."""
    for v in T.serial(lanes - 1):
        errors[0] = errors[0] + errors[v + 1]
        squares[0] = squares[0] + squares[v + 1]
        worst[0] = T.max(worst[0], worst[v + 1])
    stats[row * 4] = errors[0]
    stats[row * 4 + 1] = squares[0]
    stats[row * 4 + 2] = worst[0]
    stats[row * 4 + 3] = highest


@T.inline
def find_peak(src, at, peak, size, lanes, raw, mask):
    """Leave the largest magnitude of a group, as bits, in ``peak[0]``."""
    for v in T.vectorized(lanes):
        peak[v] = T.bitwise_and(src[at + v], T.Cast(raw, mask))
    for c in T.unroll(size // lanes - 1):
        for v in T.vectorized(lanes):
            peak[v] = T.max(peak[v], T.bitwise_and(src[at + (c + 1) * lanes + v], T.Cast(raw, mask)))
    if lanes == 16:
        for v in T.vectorized(8):
            peak[v] = T.max(peak[v], peak[v + 8])
    for v in T.vectorized(4):
        peak[v] = T.max(peak[v], peak[v + 4])
    for v in T.vectorized(2):
        peak[v] = T.max(peak[v], peak[v + 2])
    peak[0] = T.max(peak[0], peak[1])


@T.inline
def add_up(error, lanes):
    """Leave the sum of the lanes in ``error[0]``."""
    if lanes == 16:
        for v in T.vectorized(8):
            error[v] = error[v] + error[v + 8]
    for v in T.vectorized(4):
        error[v] = error[v] + error[v + 4]
    for v in T.vectorized(2):
        error[v] = error[v] + error[v + 2]
    error[0] = error[0] + error[1]


@T.inline
def search(value, scale, peak, size, lanes, top, stored):
    """Replace ``scale[0]`` by the tried scale of least squared error."""
    least = T.alloc_buffer((1,), "float32")
    least[0] = T.float32(3.4e38)
    for step in T.serial(len(TRIED)):
        for flip in T.unroll(2):
            tried = T.alloc_buffer((1,), "float32")
            inverse = T.alloc_buffer((1,), "float32")
            error = T.alloc_buffer((lanes,), "float32")
            rest = T.alloc_buffer((size,), "float32")
            tried[0] = peak * (T.Cast("float32", PARTS - step) / T.float32(PARTS)) / T.float32(top)
            tried[0] = widen(narrow(T.Select(flip == 0, tried[0], -tried[0]), stored), stored)
            inverse[0] = T.Select(tried[0] == T.float32(0), T.float32(0), T.float32(1) / tried[0])
            for v in T.vectorized(lanes):
                error[v] = T.float32(0)
            for c in T.unroll(size // lanes):
                for v in T.vectorized(lanes):
                    rest[c * lanes + v] = rounded(value[c * lanes + v] * inverse[0], -top, top + 1)
                for v in T.vectorized(lanes):
                    rest[c * lanes + v] = value[c * lanes + v] - rest[c * lanes + v] * tried[0]
                for v in T.vectorized(lanes):
                    error[v] = error[v] + rest[c * lanes + v] * rest[c * lanes + v]
            add_up(error, lanes)
            scale[0] = T.Select(error[0] < least[0], tried[0], scale[0])
            least[0] = T.min(error[0], least[0])


@T.inline
def write_codes(words, at, codes, size, bits):
    """Write a group's codes, packed."""
    if bits == 8:
        words[T.ramp(at, 1, size)] = codes[T.ramp(0, 1, size)]
    elif bits == 4:
        for half in T.unroll(size // 32):
            words[T.ramp(at + half * 16, 1, 16)] = halves_of(codes, half * 32)
    else:
        for j in T.unroll(size // (32 // bits)):
            words[T.ramp(at + j * 4, 1, 4)] = word_of(codes, j * (32 // bits), bits)


def make_cast(name: str, source: str, stored: str) -> tirx.PrimFunc:
    """Return the kernel (source, stored, stats, rows) that casts rows of :data:`ROW` values."""
    lanes, mask, raw, out = CAST_LANES, MAGNITUDE[source], CODE[source], CODE[stored]

    @T.prim_func(s_tir=True)
    def cast(src_: T.handle(raw), dst_: T.handle(out), stats_: T.handle("float32"), rows: T.int64):  # type: ignore[valid-type]
        T.func_attr({"global_symbol": name, "tirx.noalias": True})
        src = T.decl_buffer((rows * ROW,), raw, data=src_)
        dst = T.decl_buffer((rows * ROW,), out, data=dst_)
        stats = T.decl_buffer((rows * 4,), "float32", data=stats_)
        for i in T.serial(rows):
            errors = T.alloc_buffer((lanes,), "float32")
            squares = T.alloc_buffer((lanes,), "float32")
            worst = T.alloc_buffer((lanes,), "float32")
            peak = T.alloc_buffer((lanes,), raw)
            clear(errors, squares, worst, lanes)
            for v in T.vectorized(lanes):
                peak[v] = T.Cast(raw, 0)
            for c in T.serial(ROW // lanes):
                value = T.alloc_buffer((lanes,), "float32")
                error = T.alloc_buffer((lanes,), "float32")
                kept = T.alloc_buffer((lanes,), out)
                for v in T.vectorized(lanes):
                    value[v] = widen(src[i * ROW + c * lanes + v], source)
                    peak[v] = T.max(peak[v], T.bitwise_and(src[i * ROW + c * lanes + v], T.Cast(raw, mask)))
                for v in T.vectorized(lanes):
                    kept[v] = narrow(value[v], stored)
                for v in T.vectorized(lanes):
                    dst[i * ROW + c * lanes + v] = kept[v]
                    error[v] = value[v] - widen(kept[v], stored)
                tally(errors, squares, worst, error, value, 0, lanes)
            for v in T.serial(lanes - 1):
                peak[0] = T.max(peak[0], peak[v + 1])
            report(stats, i, errors, squares, worst, widen(peak[0], source), lanes)

    return cast


def make_quantize(name: str, source: str, stored: str, bits: int, size: int, scales_from: str) -> tirx.PrimFunc:
    """Return the kernel (source, words, scales, stats, rows, groups, row strides of the first three).

    It takes whole groups; strides are in values, words and scales.
    """
    lanes = 16 if size % 16 == 0 else 8
    top, searching = 2 ** (bits - 1) - 1, scales_from == "mse"
    mask, raw, out = MAGNITUDE[source], CODE[source], CODE[stored]

    @T.prim_func(s_tir=True)
    def quantize(
        src_: T.handle(raw), words_: T.handle("uint8"), scales_: T.handle(out), stats_: T.handle("float32"),  # type: ignore[valid-type]
        rows: T.int64, groups: T.int64, src_row: T.int64, words_row: T.int64, scales_row: T.int64,
    ):  # fmt: skip
        T.func_attr({"global_symbol": name, "tirx.noalias": True})
        src = T.decl_buffer((rows * src_row,), raw, data=src_)
        words = T.decl_buffer((rows * words_row * 4,), "uint8", data=words_)
        scales = T.decl_buffer((rows * scales_row,), out, data=scales_)
        stats = T.decl_buffer((rows * 4,), "float32", data=stats_)
        for i in T.serial(rows):
            errors = T.alloc_buffer((lanes,), "float32")
            squares = T.alloc_buffer((lanes,), "float32")
            worst = T.alloc_buffer((lanes,), "float32")
            highest = T.alloc_buffer((1,), raw)
            highest[0] = T.Cast(raw, 0)
            clear(errors, squares, worst, lanes)
            for g in T.serial(groups):
                value = T.alloc_buffer((size,), "float32")
                level = T.alloc_buffer((size,), "float32")
                codes = T.alloc_buffer((size,), "uint8")
                peak = T.alloc_buffer((lanes,), raw)
                error = T.alloc_buffer((lanes,), "float32")
                scale = T.alloc_buffer((1,), "float32")
                find_peak(src, i * src_row + g * size, peak, size, lanes, raw, mask)
                highest[0] = T.max(highest[0], peak[0])
                for c in T.unroll(size // lanes):
                    for v in T.vectorized(lanes):
                        value[c * lanes + v] = widen(src[i * src_row + g * size + c * lanes + v], source)
                scale[0] = widen(narrow(widen(peak[0], source) / T.float32(top), stored), stored)
                if searching:
                    search(value, scale, widen(peak[0], source), size, lanes, top, stored)
                scales[i * scales_row + g] = narrow(scale[0], stored)
                for c in T.unroll(size // lanes):
                    for v in T.vectorized(lanes):
                        level[c * lanes + v] = rounded(
                            value[c * lanes + v] / unless_zero(scale[0], T.float32(float("inf"))), -top, top + searching
                        )
                    for v in T.vectorized(lanes):
                        codes[c * lanes + v] = T.Cast("uint8", T.Cast("int32", level[c * lanes + v]) + top)
                        error[v] = value[c * lanes + v] - level[c * lanes + v] * scale[0]
                    tally(errors, squares, worst, error, value, c * lanes, lanes)
                write_codes(words, i * words_row * 4 + g * (size // (32 // bits)) * 4, codes, size, bits)
            report(stats, i, errors, squares, worst, widen(highest[0], source), lanes)

    return quantize


def build(library: str, cpu: str, cxx: str, names: Sequence[str]) -> None:
    """Compile the kernels ``names`` for the processor ``cpu`` (``x86-64-v4+gfni``) into a shared library."""
    mcpu, *features = cpu.split("+")
    kernels = {}
    for name in names:
        algorithm, arguments = parse_name(name)
        make = make_quantize if algorithm == "quantize" else make_cast
        kernels[name] = make(name, *arguments)
    target = {"kind": "llvm", "mtriple": f"{os.uname().machine}-unknown-linux-gnu", "mcpu": mcpu}
    module = tvm.compile(tvm.IRModule(kernels), tvm.target.Target(target | {"mattr": [f"+{f}" for f in features]}))

    def link(output: str, objects: Sequence[str]) -> None:
        subprocess.run([cxx, "-shared", "-fPIC", "-o", output, *objects], check=True)

    with tempfile.TemporaryDirectory() as folder:
        module.export_library(library, fcompile=link, workspace_dir=folder)


if __name__ == "__main__":
    build(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:])
