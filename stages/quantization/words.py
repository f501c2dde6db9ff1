"""Small integers in uint32 words, low bits first."""

from __future__ import annotations

from functools import reduce
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack uint8 codes [n, m] of ``bits`` into uint32 words; m is a multiple of a word's codes."""
    per_word = 32 // bits
    if 32 % bits:
        by_word = codes.reshape(len(codes), -1, per_word).astype(np.uint32)
        return reduce(np.bitwise_or, (by_word[..., i] << (i * bits) for i in range(per_word)))
    while bits < 8:
        codes = codes[:, 0::2] | (codes[:, 1::2] << bits)
        bits *= 2
    words: np.ndarray = np.ascontiguousarray(codes).view("<u4")
    return words


def unpack(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Return the first ``count`` codes of each row of ``words``, uint32 [n, count]."""
    shifts = np.arange(32 // bits, dtype=np.uint32) * np.uint32(bits)
    codes: np.ndarray = (words[..., None] >> shifts) & np.uint32(2**bits - 1)
    return codes.reshape(len(words), -1)[:, :count]


def pack_planes(codes: np.ndarray, planes: Sequence[int], size: int) -> np.ndarray:
    """Pack uint8 codes [n, groups * size]: of each group the words of its lowest bits, then those of the next plane."""
    parts, below = [], 0
    for bits in planes:
        words = pack((codes >> below) & (2**bits - 1), bits)
        parts.append(words.reshape(len(codes), codes.shape[1] // size, -1))
        below += bits
    return np.concatenate(parts, axis=-1).reshape(len(codes), -1)


def unpack_planes(words: np.ndarray, planes: Sequence[int], size: int, count: int) -> np.ndarray:
    """Undo :func:`pack_planes`: the first ``count`` codes of each row, uint32 [n, count]."""
    n, each = len(words), [size * bits // 32 for bits in planes]
    by_group = words.reshape(n, -1, sum(each))
    codes, first, below = np.zeros((n, by_group.shape[1] * size), np.uint32), 0, 0
    for bits, length in zip(planes, each, strict=True):
        plane = np.ascontiguousarray(by_group[..., first : first + length]).reshape(n, -1)
        codes |= unpack(plane, bits, codes.shape[1]) << np.uint32(below)
        first, below = first + length, below + bits
    return codes[:, :count]
