"""Shows that stored weights are the checkpoint's, tile by tile, in half the time that a comparison of each value takes.

What it cannot show, :mod:`.weights` compares value by value, and words what it finds. A tile is some blocks of 32 rows
by some columns. Quantized ones are compared as [blocks, columns of a group / 4, groups, 32 rows, 4 columns]: in layout
n32 the bytes of words lie nearly so, and the checkpoint's values get there four at a time.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

from stages.quantization import layouts, two_level
from stages.quantization.rows import Row
from stages.sizes import N32_BLOCK as BLOCK
from stages.verification import allowed

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from stages.documents.params import Parameter

VALUES = 1 << 18  # of a tile: of fewer, calls of NumPy cost more than what they do; more leave the caches
FOUR = {2: "u8", 4: "c16"}  # bytes of a value -> a dtype that moves four
IN_ORDER = ("copy", "concat0", "stacked_copy", "scalar")  # transforms that put rows one under the other


def agree(entry: Parameter, stored: Sequence[np.ndarray], originals: Sequence[np.ndarray], scales: str) -> bool:
    """Say whether each value that is ``stored`` for a parameter is as near to the checkpoint's ``originals`` as it must
    be; False also where this cannot be told here.
    """
    if entry["transform"] not in IN_ORDER or len({array.dtype for array in originals}) > 1:
        return False
    row = Row(**entry["quantize"]) if entry["quantize"] else None
    stored = [np.asarray(array) for array in stored]  # a mapping's slices are slow
    whole = [array.reshape(-1, *entry["shape"][1:]) for array in originals]
    with np.errstate(all="ignore"):  # what is no number agrees with nothing
        if row is None:
            return all(_equal(part, wanted) for part, wanted in _floats(entry, stored[0], whole))
        k = entry["shape"][1]
        if row.kind != "group" or k % row.group_size or 8 % max(row.planes) or whole[0].itemsize not in FOUR:
            return False
        tiles = _Tiles(row, whole[0].dtype, scales)
        return all(tiles.within(part, wanted) for part, wanted in _quantized(entry, stored, whole, row))


def _bands(whole: Sequence[np.ndarray], most: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the rows of ``whole``, arrays one under the other, ``most`` at a time, after the number of the first."""
    starts = [0, *np.cumsum([len(array) for array in whole]).tolist()]
    for first in range(0, starts[-1], most):
        parts = [
            array[max(first - start, 0) : max(first + most - start, 0)]
            for array, start in zip(whole, starts, strict=False)
        ]
        parts = [part for part in parts if len(part)]
        yield first, parts[0] if len(parts) == 1 else np.concatenate(parts)


def _floats(
    entry: Parameter, stored: np.ndarray, whole: Sequence[np.ndarray]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield what is stored for some rows of a parameter, and the checkpoint's values in the same places."""
    width = math.prod(entry["shape"][1:])
    by_block = entry["layout"] == "n32"
    most = BLOCK * max(1, VALUES // max(1, BLOCK * width))
    for first, wanted in _bands(whole, most):
        if by_block:
            part = stored[first // BLOCK : first // BLOCK + -(-len(wanted) // BLOCK)]
            yield part, np.ascontiguousarray(_filled(wanted).reshape(-1, BLOCK, width).swapaxes(1, 2))
        else:
            yield layouts.restore(entry["layout"], stored, entry["shape"][0])[first : first + len(wanted)], wanted


def _filled(rows: np.ndarray) -> np.ndarray:
    """Return rows of whole blocks, the last one filled up with zeros as what is stored is."""
    lacking = -len(rows) % BLOCK
    return np.concatenate([rows, np.zeros((lacking, *rows.shape[1:]), rows.dtype)]) if lacking else rows


def _equal(part: np.ndarray, wanted: np.ndarray) -> bool:
    """Say whether ``part`` is ``wanted`` in its own dtype, and finite. Only what is not equal as it is gets rounded."""
    bits = np.ascontiguousarray(part).view(f"u{part.itemsize}")
    infinite = np.asarray(np.inf, part.dtype).view(bits.dtype)
    if ((bits << 1) >= infinite << 1).any():  # without the sign
        return False
    if part.dtype == wanted.dtype:
        unlike = bits != wanted.view(bits.dtype)
    elif part.dtype == np.float16 and wanted.dtype == ml_dtypes.bfloat16:
        unlike = _widened(bits) != wanted.astype(np.float32)
    else:
        unlike = np.ones(part.shape, bool)
    found, rounded = part[unlike].astype(np.float32), wanted[unlike].astype(np.float32).astype(part.dtype)
    return bool((found == rounded.astype(np.float32)).all())


def _widened(bits: np.ndarray) -> np.ndarray:
    """Return finite float16 values, given by their bits, in float32: exactly, and faster than NumPy does it."""
    moved = bits.view(np.int16).astype(np.int32)
    moved <<= 13
    moved &= np.int32(-0x70002000)  # sign, and the exponent's lower five bits, and fraction
    found: np.ndarray = moved.view(np.float32)
    found *= np.float32(2.0**112)  # the exponents' biases differ by as much
    return found


def _quantized(
    entry: Parameter, stored: Sequence[np.ndarray], whole: Sequence[np.ndarray], row: Row
) -> Iterator[tuple[list[np.ndarray], np.ndarray]]:
    """Yield what is stored for some blocks of rows, in layout n32, and the checkpoint's values [rows, k]."""
    n, k = entry["shape"]
    layout = entry["layout"]
    for first, wanted in _bands(whole, BLOCK * max(1, VALUES // (BLOCK * k))):
        if layout == "n32":
            part = [array[first // BLOCK : first // BLOCK + -(-len(wanted) // BLOCK)] for array in stored]
        else:
            rows = slice(first, first + len(wanted))
            each = zip(stored, row.element_bits, strict=True)
            part = [layouts.arrange("n32", layouts.restore(layout, array, n)[rows], bits) for array, bits in each]
        yield part, _filled(wanted)


class _Tiles:
    """Compares quantized rows with the checkpoint's, with buffers that are used again: new memory costs more than the
    arithmetic.
    """

    def __init__(self, row: Row, dtype: np.dtype, scales: str) -> None:
        self._row, self._dtype, self._scales = row, dtype, scales
        self._values = np.empty((2, VALUES), dtype)
        self._codes = np.empty((2, VALUES // 4), np.uint32)
        self._floats = np.empty(3 * VALUES, np.float32)
        self._halves = np.empty(3 * VALUES, np.float32)

    def within(self, stored: Sequence[np.ndarray], wanted: np.ndarray) -> bool:
        """Say whether the values ``stored`` for some blocks are all as near to ``wanted`` [rows, k] as they must be."""
        size, (words, *_) = self._row.group_size, stored
        blocks, groups = len(words), wanted.shape[1] // size
        words = words.reshape(blocks, groups, -1, BLOCK)
        fours = wanted.view(FOUR[wanted.itemsize]).reshape(blocks, BLOCK, groups, size // 4)
        steps = _steps(stored, self._row, groups)
        found = np.empty((3, blocks, groups, BLOCK), np.float32)  # of each group the largest of what _compare looks at
        at_once = max(1, VALUES // (blocks * BLOCK * size))
        for start in range(0, groups, at_once):
            part = slice(start, start + at_once)
            self._compare(words[:, part], [each[:, part] for each in steps], fours[:, :, part], found[:, :, part])
        far, high, negative = found[[0, 1, 2 if self._row.minimum else 1]].swapaxes(2, 3).reshape(3, -1, groups)
        return bool((far <= allowed.of_groups(-negative, high, self._row, self._scales)).all())

    def _compare(self, words: np.ndarray, steps: Sequence[np.ndarray], fours: np.ndarray, found: np.ndarray) -> None:
        """Note in ``found`` what is found of one tile."""
        blocks, groups, quarter = len(words), words.shape[1], self._row.group_size // 4
        shape = blocks, quarter, groups * BLOCK * 4  # few and long: what NumPy works on in one go
        count = math.prod(shape)
        near, turned = (buffer[:count] for buffer in self._values)
        away, values, negative = looked_at = self._floats[: 3 * count].reshape(3, *shape)
        near = near.view(fours.dtype).reshape(fours.shape)
        np.copyto(near, fours)  # row by row, as memory is read fastest
        np.copyto(turned.view(fours.dtype).reshape(blocks, quarter, groups, BLOCK), near.transpose(0, 3, 2, 1))
        np.copyto(values, turned.reshape(shape))
        self._restore(words, steps, away)
        away -= values
        if self._row.minimum:
            np.negative(values, out=negative)
            np.abs(away, out=away)
        else:
            looked_at = looked_at[:2]
            np.abs(looked_at, out=looked_at)
        found[: len(looked_at)] = self._largest(looked_at).reshape(-1, blocks, groups, BLOCK)

    def _restore(self, words: np.ndarray, steps: Sequence[np.ndarray], values: np.ndarray) -> None:
        """Put into ``values`` what ``words`` [blocks, groups, words, 32] stand for, by the operations of
        :func:`stages.quantization.parameter.restored`, so that each is the same number.
        """
        np.copyto(values, self._unpacked(words).view(np.uint8).reshape(values.shape))
        step, *least = (np.repeat(each.reshape(len(each), 1, -1), 4, axis=-1) for each in steps)
        if not least:
            values -= self._row.top
        values *= step
        if self._row.levels:
            values -= least[0]
        elif least:
            values += least[0]

    def _unpacked(self, words: np.ndarray) -> np.ndarray:
        """Return the codes of words in layout n32, as bytes of uint32 [blocks, columns of a group / 4, groups, 32]."""
        blocks, groups, _, _ = words.shape
        shape = blocks, self._row.group_size // 4, groups, BLOCK
        whole, plane = (buffer[: math.prod(shape)].reshape(shape) for buffer in self._codes)
        words, first, below = words.swapaxes(1, 2), 0, 0
        for bits in self._row.planes:
            count, codes = self._row.group_size * bits // 32, plane if below else whole
            by_word = codes.reshape(blocks, count, -1, groups, BLOCK)
            for number in range(8 // bits):
                np.right_shift(words[:, first : first + count], np.uint32(number * bits), out=by_word[:, :, number])
            codes &= np.uint32(0x01010101 * (2**bits - 1))
            if below:
                codes <<= np.uint32(below)
                whole |= codes
            first, below = first + count, below + bits
        return whole

    def _largest(self, values: np.ndarray) -> np.ndarray:
        """Return the largest value of each group, flat, of ``values`` [..., columns of a group / 4, groups * 32 * 4].

        By halves, and never in place, for which NumPy has no fast loops; its reductions run over few values at a time.
        """
        taken = 0
        while (length := values.shape[-2]) > 1:
            half = length - length // 2
            shape = *values.shape[:-2], half, values.shape[-1]
            into = self._halves[taken : taken + math.prod(shape)].reshape(shape)
            values, taken = np.maximum(values[..., :half, :], values[..., -half:, :], out=into), taken + into.size
        first, second, third, fourth = (values[..., place::4] for place in range(4))
        found: np.ndarray = np.maximum(np.maximum(first, second), np.maximum(third, fourth))
        return found


def _steps(stored: Sequence[np.ndarray], row: Row, groups: int) -> list[np.ndarray]:
    """Return what a code of each group is worth, and what is added or taken away, [blocks, groups, 32] each."""
    if not row.levels:
        return [array.astype(np.float32) for array in stored[1:]]
    levels, floats = (array.swapaxes(1, 2).reshape(-1, array.shape[1]) for array in stored[1:])
    found = two_level.steps_of_groups(levels, floats, row, groups)
    return [each.reshape(-1, BLOCK, groups).swapaxes(1, 2) for each in found]
