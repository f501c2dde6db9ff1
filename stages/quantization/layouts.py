"""How the stored tensors of a matrix [n, k] lie in memory, by the name that params.json, metadata and bundle record.

- ``nk``: row-major, rows are output features; the element i of a word of b bits at bit b * i. What the arithmetic of
  :mod:`.group` makes, and what GPU kernels read.
- ``kn``: an ``nk`` tensor transposed, [columns, n]: rows are columns of ``nk``, what is packed is the same.
- ``n32``: blocks of 32 output features side by side, [ceil(n / 32), columns, 32], where an ``nk`` tensor is
  [n, columns]; the last block is filled up with zeros. CPU kernels keep a feature in each lane. In a word of elements
  of b bits (1, 2 or 4), element i lies at bit 8 * (i % 4) + b * (i // 4): the lowest bits of its bytes are the first
  four elements, ready for instructions that multiply four bytes at once, and to be joined with those of other planes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from stages.sizes import N32_BLOCK as BLOCK

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from stages.quantization.rows import Row
    from stages.quantization.schemes import Scheme

_MATRICES = ("linear", "embedding", "head", "router")  # kinds of parameters that are matrices
_SCALES = ("float32", "float16", "uint8")  # dtypes of scales, and of floats, that its kernels read


def of(target: str, kind: str, scheme: Scheme, row: Row | None, dtype: str, k: int) -> str:
    """Return the layout of a parameter of ``kind`` with rows of ``k`` values on a target whose layout is ``target``.

    n32 is for matrices that its kernels read directly, of whole groups or of floats. ``row`` is what it is stored in,
    None for floats of ``dtype``.
    """
    if row:
        direct = row.packed and (row.levels or row.bits in (4, 8)) and k % row.group_size == 0
        dtype = row.scale_dtype
    else:
        direct = kind in _MATRICES
    return target if target != "nk" and direct and dtype in _SCALES else of_scheme(kind, scheme)


def of_scheme(kind: str, scheme: Scheme) -> str:
    """Return the layout of a parameter of ``kind`` where the target's kernels ask for none."""
    return scheme.linear_layout if scheme.row(kind) and kind in ("linear", "head") else "nk"


def side(layout: str, n: int) -> int:
    """Return how many of ``n`` rows lie side by side, column by column, before the next ones begin."""
    return {"nk": 1, "n32": BLOCK, "kn": n}[layout]


def shape(layout: str, nk: Sequence[int]) -> list[int]:
    """Return the stored shape of what has the shape ``nk`` in layout nk."""
    if layout == "nk":
        return [*nk]
    n, columns = nk
    return [columns, n] if layout == "kn" else [-(-n // BLOCK), columns, BLOCK]


def arrange(layout: str, tensor: np.ndarray, bits: Sequence[int] = ()) -> np.ndarray:
    """Return a stored tensor [n, columns] in ``layout``; ``bits`` are those of the elements of neighbouring words,
    again and again, as :attr:`.rows.Row.element_bits` has them.
    """
    if layout != "n32":
        return tensor.T if layout == "kn" else tensor
    n, columns = tensor.shape
    blocks = np.zeros((-(-n // BLOCK), columns, BLOCK), tensor.dtype)
    for number, block in enumerate(blocks):  # block by block: nothing of the tensor's size is made beside the result
        rows = tensor[number * BLOCK : (number + 1) * BLOCK]
        block[:, : len(rows)] = _word_by_word(_spread, rows, bits).T
    return blocks


def restore(layout: str, stored: np.ndarray, rows: int, bits: Sequence[int] = ()) -> np.ndarray:
    """Return what :func:`arrange` was given, of ``rows`` rows."""
    if layout != "n32":
        return stored.T if layout == "kn" else stored
    tensor = stored.transpose(0, 2, 1).reshape(-1, stored.shape[1])[:rows]
    return _word_by_word(_gather, tensor, bits)


def _word_by_word(move: Callable[[np.ndarray, int], np.ndarray], words: np.ndarray, bits: Sequence[int]) -> np.ndarray:
    """Return rows of words, those of elements of so many bits moved."""
    if len(set(bits)) < 2:
        return move(words, bits[0]) if bits else words
    moved = np.empty_like(words)
    for place, width in enumerate(bits):
        moved[:, place :: len(bits)] = move(words[:, place :: len(bits)], width)
    return moved


def _spread(words: np.ndarray, bits: int) -> np.ndarray:
    """Move element i of each word from bit bits * i to bit 8 * (i % 4) + bits * (i // 4)."""
    result = np.zeros_like(words)
    for first in range(0, 8, bits):
        fours = (words >> np.uint32(4 * first)) & np.uint32(2 ** (4 * bits) - 1)
        result |= _apart(fours, bits) << np.uint32(first)
    return result


def _gather(words: np.ndarray, bits: int) -> np.ndarray:
    """Undo :func:`_spread`."""
    result = np.zeros_like(words)
    for first in range(0, 8, bits):
        result |= _together(words >> np.uint32(first), bits) << np.uint32(4 * first)
    return result


def _apart(fours: np.ndarray, bits: int) -> np.ndarray:
    """Move four elements from the lowest bits of a word to the lowest bits of its bytes."""
    twos = (fours | (fours << np.uint32(16 - 2 * bits))) & np.uint32(0x00010001 * (2 ** (2 * bits) - 1))
    result: np.ndarray = (twos | (twos << np.uint32(8 - bits))) & np.uint32(0x01010101 * (2**bits - 1))
    return result


def _together(words: np.ndarray, bits: int) -> np.ndarray:
    """Undo :func:`_apart`, whatever the other bits of the bytes hold."""
    words = words & np.uint32(0x01010101 * (2**bits - 1))
    twos = (words | (words >> np.uint32(8 - bits))) & np.uint32(0x00010001 * (2 ** (2 * bits) - 1))
    result: np.ndarray = (twos | (twos >> np.uint32(16 - 2 * bits))) & np.uint32(2 ** (4 * bits) - 1)
    return result
