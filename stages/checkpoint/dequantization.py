"""The arithmetic of quantized tensors that other tools store: some rows at a time, as each tool's library makes them.

A product is taken in float32 and rounded once to the dtype of the settings: in most forms that of the scales, which is
what a product in that dtype is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from stages.checkpoint.stored import NUMPY_DTYPES
from stages.sizes import FLOAT4

if TYPE_CHECKING:
    from stages.checkpoint.stored import StoredParts
    from stages.documents.files import JsonObject

INT8_STEP = np.float32(7.874015718698502e-3)  # a 127th, as bitsandbytes multiplies by it
FP4 = np.array(FLOAT4, np.float32)
AWQ_NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)  # which of a word's nibbles each of its eight columns is


def unpacked(words: np.ndarray, bits: int) -> np.ndarray:
    """Return int32 [n * 32 / bits, m] of words int32 [n, m] that hold a stream of bits down each column."""
    count, columns = words.shape
    words = words.astype(np.uint32, copy=False) if words.dtype != np.int32 else words.view(np.uint32)
    padded = -(-count // bits) * bits
    groups = np.zeros((padded, columns), np.uint32)
    groups[:count] = words
    groups = groups.reshape(-1, bits, columns)
    values = np.empty((len(groups), 32, columns), np.int32)
    for number in range(32):
        word, shift = divmod(number * bits, 32)
        found = groups[:, word] >> np.uint32(shift)
        if shift + bits > 32:
            found |= groups[:, word + 1] << np.uint32(32 - shift)
        values[:, number] = found & np.uint32(2**bits - 1)
    return values.reshape(-1, columns)


def gptq(parts: StoredParts, settings: JsonObject, start: int, stop: int) -> np.ndarray:
    """GPTQ: qweight [in * bits / 32, out], zeros and scales by group, g_idx the group of each input."""
    bits = settings["bits"]
    scales = parts.whole("scales")[:, start:stop].astype(np.float32)
    codes = unpacked(np.ascontiguousarray(parts.whole("qweight")[:, start:stop]), bits)
    if settings["sym"]:  # by definition; files that say v1 may store it as v2 does
        zeros: Any = np.int32(2 ** (bits - 1))
    else:
        stored = unpacked(np.ascontiguousarray(parts.whole("qzeros").T), bits)[start:stop].T
        zeros = stored if settings["v2"] else (stored + 1) & (2**bits - 1)
    group = parts.whole("g_idx") if "g_idx" in parts else _even(len(codes), len(scales))
    if group.min() < 0 or group.max() >= len(scales):
        raise ValueError(f"g_idx names groups {group.min()} to {group.max()} of {len(scales)}")
    taken = zeros if settings["sym"] else zeros[group]
    return _rounded(((codes - taken) * scales[group]).T, settings)


def awq(parts: StoredParts, settings: JsonObject, start: int, stop: int) -> np.ndarray:
    """AWQ (gemm): qweight [in, out / 8] and qzeros [groups, out / 8], nibbles in their own order."""
    scales = parts.whole("scales")[:, start:stop].astype(np.float32)
    codes, zeros = (_nibbles(parts.whole(key), start, stop) for key in ("qweight", "qzeros"))
    group = _even(len(codes), len(scales))
    return _rounded(((codes - zeros[group]) * scales[group]).T, settings)


def packed(parts: StoredParts, settings: JsonObject, start: int, stop: int) -> np.ndarray:
    """compressed-tensors, pack-quantized: weight_packed [out, in * bits / 32], codes from -2^(bits - 1)."""
    bits, columns = settings["bits"], settings["shape"][1]
    half = 2 ** (bits - 1)
    codes = unpacked(np.ascontiguousarray(parts.rows("weight_packed", start, stop).T), bits)[:columns].T - half
    scales = _by_rows(parts.whole("weight_scale"), start, stop).astype(np.float32)
    group = parts.whole("weight_g_idx") if "weight_g_idx" in parts else _even(columns, scales.shape[1])
    if group.min() < 0 or group.max() >= scales.shape[1]:
        raise ValueError(f"weight_g_idx names groups {group.min()} to {group.max()} of {scales.shape[1]}")
    if "weight_zero_point" in parts:
        zeros = unpacked(parts.whole("weight_zero_point"), bits)[start:stop] - half
        codes = codes - zeros[:, group]
    return _rounded(codes * scales[:, group], settings)


def scaled(parts: StoredParts, settings: JsonObject, start: int, stop: int) -> np.ndarray:
    """Values of int8 or float8 times the scale of their tensor, row, group of a row, or block."""
    values = parts.rows("weight", start, stop).astype(np.float32)
    high, wide = settings["block"]
    rows, columns = np.arange(start, stop) // high, np.arange(values.shape[1]) // wide

    def spread(key: str) -> np.ndarray:
        found = parts.whole(key)
        grid = found.reshape(found.shape if found.ndim == 2 else (-1, 1))
        taken: np.ndarray = grid[rows][:, columns]
        return taken

    scales = spread("scale")
    if settings["exponents"]:
        scales = np.exp2(scales.astype(np.float32) - 127)
    if "weight_zero_point" in parts:
        values = values - spread("weight_zero_point").astype(np.float32)
    return _rounded(values * scales.astype(np.float32), settings)


def int8(parts: StoredParts, settings: JsonObject, start: int, stop: int) -> np.ndarray:
    """bitsandbytes with int8: a row's codes times its largest value (SCB), over 127."""
    scales = parts.rows("SCB", start, stop)[:, None]
    return _rounded(parts.rows("weight", start, stop).astype(np.float32) * scales * INT8_STEP, settings)


def mxfp4(parts: StoredParts, settings: JsonObject, start: int, stop: int) -> np.ndarray:
    """MXFP4 as gpt_oss has it: two codes of e2m1 a byte, the low one first; 32 share a power of two (e8m0)."""
    data, scales = parts.rows("blocks", start, stop), parts.rows("scales", start, stop)
    codes = np.stack([data & 15, data >> 4], -1).reshape(*data.shape[:-1], 32)
    values = np.ldexp(FP4[codes], scales.astype(np.int32)[..., None] - 127)
    return _rounded(values.reshape(*data.shape[:2], -1).swapaxes(1, 2), settings)


def nf4(parts: StoredParts, settings: JsonObject, start: int, stop: int) -> np.ndarray:
    """bitsandbytes with 4 bits: two codes a byte, the high nibble first, in blocks along the whole tensor."""
    columns, block = settings["shape"][1], settings["blocksize"]
    first, last = start * columns, stop * columns
    data = parts.rows("weight", first // 2, -(-last // 2)).reshape(-1)
    codes = np.stack([data >> 4, data & 15], 1).reshape(-1)[first % 2 :][: last - first]
    begin, end = first // block, -(-last // block)
    largest = parts.rows("absmax", begin, end)
    if "nested_absmax" in parts:
        outer = parts.whole("nested_absmax")[np.arange(begin, end) // settings["nested_blocksize"]]
        largest = parts.whole("nested_quant_map")[largest] * outer + np.float32(settings["nested_offset"])
    place = np.arange(first, last) // block - begin
    values = parts.whole("quant_map")[codes] * largest[place].astype(np.float32)
    return _rounded(values.reshape(stop - start, columns), settings)


def _rounded(values: np.ndarray, settings: JsonObject) -> np.ndarray:
    return np.ascontiguousarray(values.astype(np.float32, copy=False).astype(NUMPY_DTYPES[settings["dtype"]]))


def _even(count: int, groups: int) -> np.ndarray:
    """Return the group of each of ``count`` inputs in ``groups`` of one size, but the last."""
    return np.arange(count) // -(-count // groups)


def _by_rows(scales: np.ndarray, start: int, stop: int) -> np.ndarray:
    grid: np.ndarray = scales.reshape(scales.shape if scales.ndim == 2 else (-1, 1))
    return np.broadcast_to(grid, (stop - start, grid.shape[1])) if len(grid) == 1 else grid[start:stop]


def _nibbles(words: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Return columns ``start`` to ``stop`` of AWQ's words [n, m / 8]."""
    taken = words[:, start // 8 : -(-stop // 8)].view(np.uint32)
    split = (taken[:, :, None] >> (4 * np.array(AWQ_NIBBLES, np.uint32))) & np.uint32(15)
    return split.reshape(len(words), -1)[:, start % 8 :][:, : stop - start].astype(np.int32)
