"""Small integers in uint32 words, low bits first."""

from __future__ import annotations

from functools import reduce

import numpy as np


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
