"""One parameter from its values to the tensors stored for it, and the error that makes; compiled kernels or NumPy."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from stages.quantization import feedback as error_feedback
from stages.quantization import float4, float8, group, minimum, two_level
from stages.quantization import layouts as arrangement
from stages.quantization.blocks import cast, relative_error
from stages.quantization.dtypes import numpy_dtype
from stages.quantization.kernel_names import cast_name, compiled, quantize_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from stages.quantization.compiled import Kernels, Sums
    from stages.quantization.feedback import Feedback
    from stages.quantization.rows import Row


@dataclass(frozen=True)
class Converted:
    """What is stored for a parameter, and its relative error: RMSE over root mean square, largest over largest."""

    stored: Sequence[np.ndarray]
    rmse: float
    worst: float


def kernel_names(source: str, quantizing: Iterable[tuple[Row, str]], scales: str, dtypes: Iterable[str]) -> list[str]:
    """Return the kernels that conversions from dtype ``source`` may call: ``quantizing`` are rows and layouts of what
    is quantized, ``dtypes`` those of what is not.
    """
    named = [quantize_name(source, row, scales, layout) for row, layout in quantizing if compiled(row, scales)]
    return [*named, *(cast_name(source, dtype) for dtype in dtypes)]


def convert(
    parts: Iterable[np.ndarray],
    row: Row | None,
    *,
    shape: Sequence[int],
    dtype: str,
    scales: str,
    layout: str = "nk",
    kernels: Kernels | None = None,
    whole: Callable[[], np.ndarray] | None = None,
    into: np.ndarray | None = None,
    importance: np.ndarray | None = None,
    feedback: Feedback | None = None,
) -> Converted:
    """Convert a parameter of ``shape``, made of ``parts`` one under the other, to what ``row`` stores; without one it
    is cast to ``dtype``.

    Kernels take part by part: the buffer of one may be reused for the next if ``whole`` returns all of it for
    NumPy, which does what kernels cannot. What is stored lies one after the other in the bytes of ``into`` (by
    default new memory), and is the same with and without ``kernels``. ``importance`` [k] is how much an error of each
    column counts where ``scales`` is importance or gptq, which takes ``feedback`` too.
    :class:`~stages.quantization.blocks.UnfitError` for a value that is not finite or does not fit.
    """
    described = [(shape, dtype)]
    if row:
        n, k = shape
        described = [(found, dtype) for _, found, dtype in row.stored(n, k)]
    stored = _tensors([(arrangement.shape(layout, found), numpy_dtype(dtype)) for found, dtype in described], into)
    sums = _by_kernels(parts, shape, row, stored, scales, layout, kernels) if kernels else None
    error = sums.relative() if sums else None
    if error is None:
        array = whole() if whole else np.concatenate([*parts])
        error = _by_numpy(array, row, stored, scales, layout, importance, feedback)
    return Converted(stored, *error)


def _tensors(described: Sequence[tuple[Sequence[int], np.dtype]], into: np.ndarray | None) -> list[np.ndarray]:
    """Return tensors of these shapes and dtypes, one after the other in the bytes of ``into``."""
    sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in described]
    bounds = [*itertools.accumulate(sizes, initial=0)]
    if into is None:
        into = np.empty(bounds[-1], np.uint8)
    places = zip(described, itertools.pairwise(bounds), strict=True)
    return [into[begin:end].view(dtype).reshape(shape) for (shape, dtype), (begin, end) in places]


def _by_kernels(
    parts: Iterable[np.ndarray],
    shape: Sequence[int],
    row: Row | None,
    stored: Sequence[np.ndarray],
    scales: str,
    layout: str,
    kernels: Kernels,
) -> Sums | None:
    parts = (
        part if part.flags.c_contiguous and part.flags.aligned else np.require(part, None, ("C", "A")) for part in parts
    )
    if row:
        return kernels.quantize(parts, shape[0], row, scales, layout, stored) if compiled(row, scales) else None
    if layout == "nk":
        return kernels.cast(parts, stored[0])
    rows = np.empty(shape, stored[0].dtype)
    sums = kernels.cast(parts, rows)
    stored[0][...] = arrangement.arrange(layout, rows)
    return sums


def _by_numpy(
    array: np.ndarray,
    row: Row | None,
    stored: Sequence[np.ndarray],
    scales: str,
    layout: str,
    importance: np.ndarray | None,
    feedback: Feedback | None,
) -> tuple[float, float]:
    if row:
        made = quantize(array, row, scales, importance, feedback)
        scale_of_all = [*made[1:]] if row.kind == "tensor" else []

        def values(rows: slice) -> np.ndarray:
            by_row = made[: len(made) - len(scale_of_all)]
            return restored([*(each[rows] for each in by_row), *scale_of_all], row, array.shape[1])

        error = relative_error(array, values)
    else:
        made = [cast(array, stored[0].dtype.name)]
        error = relative_error(array, lambda rows: made[0][rows].astype(np.float32))
    for target, tensor, bits in zip(stored, made, row.element_bits if row else [()], strict=True):
        target[...] = arrangement.arrange(layout, tensor, bits)
    return error


def quantize(
    array: np.ndarray,
    row: Row,
    scales: str,
    importance: np.ndarray | None = None,
    feedback: Feedback | None = None,
) -> Sequence[np.ndarray]:
    """Return what a weight [n, k] is stored as, by NumPy, in layout nk; with ``feedback``, scales are searched by
    importance before codes are chosen.
    """
    if row.kind == "tensor":
        return float8.quantize(array)
    if row.kind == "float8":
        return float8.quantize_groups(array, row)
    if row.kind == "mxfp4":
        return float4.quantize(array, row)
    room = two_level if row.levels else minimum if row.minimum else group
    if feedback is None:
        made: Sequence[np.ndarray] = room.quantize(array, row, scales, importance)
        return made
    return error_feedback.applied(array, room.quantize(array, row, "importance", importance), row, feedback)


def restored(stored: Sequence[np.ndarray], row: Row, k: int) -> np.ndarray:
    """Return the float32 weight [n, k] that quantized ``stored`` tensors, or some of their rows, stand for."""
    values, scale, *least = stored
    if row.kind == "tensor":
        return float8.dequantize(values, scale)
    if row.kind == "float8":
        return float8.dequantize_groups(values, scale, row)
    if row.kind == "mxfp4":
        return float4.dequantize(values, scale, row, k)
    if row.levels:
        return two_level.dequantize(values, scale, least[0], row, k)
    if row.minimum:
        return minimum.dequantize(values, scale, least[0], row, k)
    return group.dequantize(values, scale, row, k)
