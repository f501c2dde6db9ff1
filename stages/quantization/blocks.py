"""Work through an array in blocks of rows that fit a core's L2 cache as float32."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from stages.quantization.dtypes import numpy_dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

BLOCK_BYTES = 256 * 1024


class UnfitError(ValueError):
    """A value that cannot be stored: at ``index`` of the array there is ``value``, and ``reason`` if it is finite."""

    def __init__(self, index: Sequence[int], value: Any, reason: str = "") -> None:
        self.index, self.value, self.reason = [*map(int, index)], value, reason if np.isfinite(value) else ""
        super().__init__(f"the value at {self.index} is {value:g}{self.reason}")


def row_blocks(shape: Sequence[int]) -> Iterator[slice]:
    """Yield slices of axis 0 that cover ``shape``, each of at most :data:`BLOCK_BYTES` as float32 (or one row)."""
    step = max(1, BLOCK_BYTES // max(1, 4 * math.prod(shape[1:])))
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def cast(array: np.ndarray, dtype: str) -> np.ndarray:
    """Return ``array`` as ``dtype``, rounded half to even; :class:`UnfitError` for a value that is not finite."""
    stored = np.empty(array.shape, numpy_dtype(dtype))
    with np.errstate(over="ignore"):
        for rows in row_blocks(array.shape):
            stored[rows] = array[rows]
            if not np.isfinite(stored[rows]).all():
                first = np.argwhere(~np.isfinite(stored[rows]))[0]
                place = [first[0] + rows.start, *first[1:]]
                raise UnfitError(place, float(array[tuple(place)]), f", which does not fit {dtype}")
    return stored


def relative_error(source: np.ndarray, restored: Callable[[slice], np.ndarray]) -> tuple[float, float]:
    """Compare what is stored with ``source``, block by block: ``restored(rows)`` returns those rows as float32.

    Returns (RMSE over the source's root mean square, largest |difference| over the largest |value|); 0 for zeros.
    """
    squares = power = worst = peak = 0.0
    for rows in row_blocks(source.shape):
        # The squares of a float32 need not fit one.
        values = source[rows].astype(np.float64).reshape(-1)
        power += float(np.dot(values, values))
        peak = max(peak, float(np.abs(values).max()))
        values -= restored(rows).reshape(-1)
        squares += float(np.dot(values, values))
        worst = max(worst, float(np.abs(values).max()))
    return (math.sqrt(squares / power), worst / peak) if power else (0.0, 0.0)
