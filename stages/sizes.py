"""Sizes that several rooms must agree on: bytes of dtypes, tokens of a page, rows of a block."""

from __future__ import annotations

# Of all dtypes that weights and caches are stored as, by TVM's names.
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "uint8": 1, "uint32": 4}
PAGE_SIZE = 16  # tokens of a page of the KV cache: all of TVM's kernels for it, CPU and GPU, are written for this one
LEVELED = 8  # groups whose scales and minima are integers, levels, that lie in whole words
LEVELS_PER_WORD = 5  # of six bits
# Bits of an element of a row in two levels -> those of a level, and how many groups share two floats; the last more.
LEVEL_BITS = {2: 4, 3: 4, 4: 6, 5: 6, 6: 6}
SHARING = {2: 16, 3: 16, 4: 8, 5: 8, 6: 8}
FLOAT4 = (0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6)  # floats of four bits (e2m1), sign last
FLOAT4_MOST = 12  # the largest of them in halves
N32_BLOCK = 32  # output features that lie side by side in the layout n32 (stages/quantization/layouts.py)
# Bits of an element of a row in two levels -> those of each of its planes, the lowest first: words of whole elements.
PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2)}


def words_of(context: int) -> int:
    """Return how many words say which of ``context`` tokens are attended to, one bit each and PAGE_SIZE in a word, and
    one word more: any PAGE_SIZE tokens in a row are then in two words.
    """
    return -(-context // PAGE_SIZE) + 1


def level_words(groups: int, bits: int) -> int:
    """Return the words of the levels of a row of ``groups`` with elements of ``bits``: of four bits, those of four
    groups are a word; of six, those of eight are three, and as few as hold the rest.
    """
    if LEVEL_BITS[bits] == 4:
        return -(-groups // 4)
    whole, rest = divmod(groups, LEVELED)
    return 3 * whole - (-2 * rest // LEVELS_PER_WORD)


def level_blocks(groups: int, bits: int) -> int:
    """Return how many blocks, with two floats each, a row of ``groups`` with elements of ``bits`` has: groups that fill
    none belong to the last one.
    """
    return max(1, groups // SHARING[bits])
