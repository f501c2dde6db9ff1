"""The TIR kernels behind quantization: group codes and scales, and casts, each with the error it makes.

A kernel takes plain addresses and strides, so that a library of kernels is called without TVM and works on mapped
files as they lie. What it stores equals group.py bit by bit: exact divisions, half to even. ``stats`` float32
[parts, 4] gets sum of squared errors, sum of squares, largest |error| and largest |value| of each part of the weight (a
row of a cast, a tile of what is quantized); the last is taken from the bits, so that a NaN or an infinity shows there.

    python -m stages.quantization.tir_kernels LIBRARY CPU CXX NAME...
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from typing import TYPE_CHECKING, Any

import tvm
from tvm.script import tirx as T  # noqa: N812 - the name TVMScript is written with

from stages.quantization.expressions import (
    divisor_of,
    largest,
    level_of,
    narrow,
    quotient,
    rounded,
    spread_words_of,
    widen,
    word_of,
    words_of,
)
from stages.quantization.group import PARTS, TRIED
from stages.quantization.kernel_names import ROW, TILE_GROUPS, TILE_ROWS, parse_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tvm import tirx

CODE = {"float32": "uint32", "float16": "uint16", "bfloat16": "uint16"}  # the integers that are as wide
MAGNITUDE = {"float32": 0x7FFFFFFF, "float16": 0x7FFF, "bfloat16": 0x7FFF}  # all bits but the sign
CAST_LANES = 16
WITHOUT_FMA = ("x86-64", "x86-64-v2")  # processors that do not multiply and add in one step


@T.inline
def clear(errors, squares, worst, lanes):
    """Begin the sums of a part."""
    for v in T.vectorized(lanes):
        errors[v] = T.float32(0)
        squares[v] = T.float32(0)
        worst[v] = T.float32(0)


@T.inline
def clear_peaks(peaks, highest, raw):
    """Begin the peaks of a tile."""
    for v in T.serial(TILE_GROUPS):
        peaks[v] = T.Cast(raw, 0)
    for v in T.vectorized(CAST_LANES):
        highest[v] = T.Cast(raw, 0)


@T.inline
def tally(errors, squares, worst, error, value, at, lanes):
    """Add ``lanes`` values from ``at`` on to the sums of a part."""
    for v in T.vectorized(lanes):
        errors[v] = errors[v] + error[v] * error[v]
        squares[v] = squares[v] + value[at + v] * value[at + v]
        worst[v] = T.max(worst[v], T.fabs(error[v]))


@T.inline
def report(stats, part, errors, squares, worst, highest, lanes):
    """Write the sums of a part."""
    for v in T.serial(lanes - 1):
        errors[0] = errors[0] + errors[v + 1]
        squares[0] = squares[0] + squares[v + 1]
        worst[0] = T.max(worst[0], worst[v + 1])
    stats[part * 4] = errors[0]
    stats[part * 4 + 1] = squares[0]
    stats[part * 4 + 2] = worst[0]
    stats[part * 4 + 3] = highest


@T.inline
def find_peak(src, at, peaks, g, size, lanes, raw, mask):
    """Leave the largest magnitude of a group, as bits, in ``peaks[g]``."""
    peak = T.alloc_buffer((lanes,), raw)
    for v in T.vectorized(lanes):
        peak[v] = T.bitwise_and(src[at + v], T.Cast(raw, mask))
    for c in T.unroll(size // lanes - 1):
        for v in T.vectorized(lanes):
            peak[v] = T.max(peak[v], T.bitwise_and(src[at + (c + 1) * lanes + v], T.Cast(raw, mask)))
    peaks[g] = largest(peak, lanes, raw)


@T.inline
def find_scales(peaks, count, kept, scales, divisors, highest, top, source, stored, inverts):
    """Leave the scales that ``count`` peaks ask for in ``kept``, as their bits, and in ``scales``; what values are
    divided by in ``divisors``, and the largest of the peaks, before and now, in ``highest``.

    A row's groups at once: from peak to divisor is a long chain, and groups one by one would wait for it.
    """
    for c in T.serial((count + CAST_LANES - 1) // CAST_LANES):
        at = T.meta_var(c * CAST_LANES)
        for v in T.vectorized(CAST_LANES):
            highest[v] = T.max(highest[v], peaks[at + v])
        for v in T.vectorized(CAST_LANES):
            kept[at + v] = narrow(widen(peaks[at + v], source) / T.float32(top), stored)
        for v in T.vectorized(CAST_LANES):
            scales[at + v] = widen(kept[at + v], stored)
        for v in T.vectorized(CAST_LANES):
            divisors[at + v] = divisor_of(scales[at + v], inverts)


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
def search(value, kept, scales, divisors, o, peak, size, lanes, top, source, stored, inverts):
    """Replace the scale of group ``o`` by the tried one of least squared error, and what values are divided by."""
    least = T.alloc_buffer((1,), "float32")
    least[0] = T.float32(3.4e38)
    for step in T.serial(len(TRIED)):
        for flip in T.unroll(2):
            tried = T.alloc_buffer((1,), "float32")
            inverse = T.alloc_buffer((1,), "float32")
            error = T.alloc_buffer((lanes,), "float32")
            rest = T.alloc_buffer((size,), "float32")
            tried[0] = widen(peak, source) * (T.Cast("float32", PARTS - step) / T.float32(PARTS)) / T.float32(top)
            tried[0] = widen(narrow(T.Select(flip == 0, tried[0], -tried[0]), stored), stored)
            inverse[0] = T.Select(tried[0] == T.float32(0), T.float32(0), T.float32(1) / tried[0])
            for v in T.vectorized(lanes):
                error[v] = T.float32(0)
            for c in T.unroll(size // lanes):
                for v in T.vectorized(lanes):
                    rest[c * lanes + v] = rounded(value[c * lanes + v] * inverse[0], -top, top + 1)
                for v in T.vectorized(lanes):
                    rest[c * lanes + v] = value[c * lanes + v] - level_of(rest[c * lanes + v]) * tried[0]
                for v in T.vectorized(lanes):
                    error[v] = error[v] + rest[c * lanes + v] * rest[c * lanes + v]
            add_up(error, lanes)
            scales[o] = T.Select(error[0] < least[0], tried[0], scales[o])
            least[0] = T.min(error[0], least[0])
    kept[o] = narrow(scales[o], stored)
    divisors[o] = divisor_of(scales[o], inverts)


@T.inline
def pack(word, codes, size, bits, spread):
    """Leave a group's codes, packed, in ``word``."""
    if bits == 8:
        word[T.ramp(0, 1, size // 4)] = T.reinterpret(f"uint32x{size // 4}", codes[T.ramp(0, 1, size)])
    elif bits == 4:
        for part in T.unroll(size // 32):
            if spread:
                word[T.ramp(part * 4, 1, 4)] = spread_words_of(codes, part * 32)
            else:
                word[T.ramp(part * 4, 1, 4)] = words_of(codes, part * 32)
    else:
        for j in T.unroll(size // (32 // bits)):
            word[j] = word_of(codes, j * (32 // bits), bits)


@T.inline
def load(value, src, at, size, lanes, source):
    """Leave a group in float32 in ``value``."""
    for c in T.unroll(size // lanes):
        for v in T.vectorized(lanes):
            value[c * lanes + v] = widen(src[at + c * lanes + v], source)


@T.inline
def encode(value, scale, divisor, codes, errors, squares, worst, size, lanes, top, most, inverts):
    """Leave a group's codes, of levels from -top to ``most``, in ``codes``; add its errors to the sums of a part."""
    levels = T.alloc_buffer((size,), "float32")
    error = T.alloc_buffer((lanes,), "float32")
    for c in T.unroll(size // lanes):
        for v in T.vectorized(lanes):
            exact = T.meta_var(quotient(value[c * lanes + v], scale, divisor, inverts))
            levels[c * lanes + v] = rounded(exact, -top, most)
        for v in T.vectorized(lanes):
            codes[c * lanes + v] = T.Cast("uint8", T.reinterpret("uint32", levels[c * lanes + v]) + T.uint32(top))
            error[v] = value[c * lanes + v] - level_of(levels[c * lanes + v]) * scale
        tally(errors, squares, worst, error, value, c * lanes, lanes)


def at_side(row: Any, column: Any, columns: Any, side: Any) -> Any:
    """Return where a row's column is if ``side`` rows lie side by side, ``columns`` each."""
    return (T.floordiv(row, side) * columns + column) * side + T.floormod(row, side)


@T.inline
def write(words, word, row, column, columns, count, layout, side):
    """Write a group's words to where they lie in a layout."""
    if layout == "nk":
        words[T.ramp(row * columns + column, 1, count)] = word[T.ramp(0, 1, count)]
    else:
        for j in T.unroll(count):
            words[at_side(row, column + j, columns, side)] = word[j]


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
            report(stats, i, errors, squares, worst, widen(largest(peak, lanes, raw), source), lanes)

    return cast


def make_quantize(
    name: str, source: str, stored: str, bits: int, size: int, scales_from: str, layout: str, *, fuses: bool
) -> tirx.PrimFunc:
    """Return the kernel (source, words, scales, stats, rows, groups, values of a source row, words and scales of a
    stored row, stored rows side by side, number of the first row).

    It takes whole groups, in tiles of so many rows and groups that the results fit a core's first cache; ``stats``
    [tile rows * tile columns, 4]. ``side`` rows lie side by side in memory (layouts.py): one in nk, 32 in n32, all in
    kn. ``fuses`` says that the processor multiplies and adds in one step.
    """
    lanes, packed, inverts = 16 if size % 16 == 0 else 8, size // (32 // bits), fuses and stored == "float16"
    top, searching, mask = 2 ** (bits - 1) - 1, scales_from == "mse", MAGNITUDE[source]
    most, raw, out = top + searching, CODE[source], CODE[stored]

    @T.prim_func(s_tir=True)
    def quantize(
        src_: T.handle(raw), words_: T.handle("uint32"), scales_: T.handle(out), stats_: T.handle("float32"),  # type: ignore[valid-type]
        rows: T.int64, groups: T.int64, src_row: T.int64, words_row: T.int64, scales_row: T.int64,
        side: T.int64, first: T.int64,
    ):  # fmt: skip
        T.func_attr({"global_symbol": name, "tirx.noalias": True})
        tiles = T.meta_var((groups + TILE_GROUPS - 1) // TILE_GROUPS)
        src = T.decl_buffer((rows * src_row,), raw, data=src_)
        words = T.decl_buffer(((first + rows + side) * words_row,), "uint32", data=words_)
        scales = T.decl_buffer(((first + rows + side) * scales_row,), out, data=scales_)
        stats = T.decl_buffer(((rows + TILE_ROWS - 1) // TILE_ROWS * tiles * 4,), "float32", data=stats_)
        for b, t in T.grid((rows + TILE_ROWS - 1) // TILE_ROWS, tiles):
            errors = T.alloc_buffer((lanes,), "float32")
            squares = T.alloc_buffer((lanes,), "float32")
            worst = T.alloc_buffer((lanes,), "float32")
            highest = T.alloc_buffer((CAST_LANES,), raw)
            peaks = T.alloc_buffer((TILE_GROUPS,), raw)
            kept = T.alloc_buffer((TILE_GROUPS,), out)
            scale = T.alloc_buffer((TILE_GROUPS,), "float32")
            divisors = T.alloc_buffer((TILE_GROUPS,), "float32")
            clear_peaks(peaks, highest, raw)
            clear(errors, squares, worst, lanes)
            for r in T.serial(T.min(T.int64(TILE_ROWS), rows - b * TILE_ROWS)):
                row = T.meta_var(first + b * TILE_ROWS + r)
                count = T.meta_var(T.min(T.int64(TILE_GROUPS), groups - t * TILE_GROUPS))
                begin = T.meta_var((b * TILE_ROWS + r) * src_row + t * TILE_GROUPS * size)
                for o in T.serial(count):
                    find_peak(src, begin + o * size, peaks, o, size, lanes, raw, mask)
                find_scales(peaks, count, kept, scale, divisors, highest, top, source, stored, inverts)
                for o in T.serial(count):
                    value = T.alloc_buffer((size,), "float32")
                    codes = T.alloc_buffer((size,), "uint8")
                    word = T.alloc_buffer((packed,), "uint32")
                    load(value, src, begin + o * size, size, lanes, source)
                    if searching:
                        search(value, kept, scale, divisors, o, peaks[o], size, lanes, top, source, stored, inverts)
                    encode(value, scale[o], divisors[o], codes, errors, squares, worst, size, lanes, top, most, inverts)
                    pack(word, codes, size, bits, layout == "n32")
                    scales[at_side(row, t * TILE_GROUPS + o, scales_row, side)] = kept[o]
                    write(words, word, row, (t * TILE_GROUPS + o) * packed, words_row, packed, layout, side)
            peak = T.meta_var(widen(largest(highest, CAST_LANES, raw), source))
            report(stats, b * tiles + t, errors, squares, worst, peak, lanes)

    return quantize


def build(library: str, cpu: str, cxx: str, names: Sequence[str]) -> None:
    """Compile the kernels ``names`` for the processor ``cpu`` (``x86-64-v4+gfni``) into a shared library."""
    mcpu, *features = cpu.split("+")
    fuses = mcpu not in WITHOUT_FMA
    kernels = {}
    for name in names:
        algorithm, arguments = parse_name(name)
        if algorithm == "quantize":
            kernels[name] = make_quantize(name, *arguments, fuses=fuses)
        else:
            kernels[name] = make_cast(name, *arguments)
    target = {"kind": "llvm", "mtriple": f"{os.uname().machine}-unknown-linux-gnu", "mcpu": mcpu}
    module = tvm.compile(tvm.IRModule(kernels), tvm.target.Target(target | {"mattr": [f"+{f}" for f in features]}))

    def link(output: str, objects: Sequence[str]) -> None:
        subprocess.run([cxx, "-shared", "-fPIC", "-o", output, *objects], check=True)

    with tempfile.TemporaryDirectory() as folder:
        module.export_library(library, fcompile=link, workspace_dir=folder)


if __name__ == "__main__":
    build(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:])
