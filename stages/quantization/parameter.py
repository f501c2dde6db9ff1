"""One parameter from its values to the tensors stored for it, and the error that makes; compiled kernels or NumPy."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from stages.quantization import float8, group
from stages.quantization import layouts as arrangement
from stages.quantization.blocks import cast, relative_error
from stages.quantization.dtypes import numpy_dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from stages.quantization.compiled import Kernels, Sums
    from stages.quantization.schemes import Scheme


@dataclass(frozen=True)
class Converted:
    """What is stored for a parameter, and its relative error: RMSE over root mean square, largest over largest."""

    stored: Sequence[np.ndarray]
    rmse: float
    worst: float


def kernel_names(
    source: str, scheme: Scheme, scales: str, *, layouts: Iterable[str], dtypes: Iterable[str]
) -> list[str]:
    """Return the kernels that conversions from dtype ``source`` may call: ``layouts`` of what is quantized, ``dtypes``
    of what is not.
    """
    from stages.quantization.kernel_names import cast_name, quantize_name

    quantizing = [quantize_name(source, scheme, scales, layout) for layout in layouts if scheme.kind == "group"]
    return [*quantizing, *(cast_name(source, dtype) for dtype in dtypes)]


def convert(
    parts: Iterable[np.ndarray],
    scheme: Scheme,
    kind: str,
    *,
    shape: Sequence[int],
    dtype: str,
    scales: str,
    layout: str = "nk",
    kernels: Kernels | None = None,
    whole: Callable[[], np.ndarray] | None = None,
    into: np.ndarray | None = None,
) -> Converted:
    """Convert a parameter of ``kind`` and ``shape``, made of ``parts`` one under the other; one that the scheme does
    not quantize is cast to ``dtype``.

    Kernels take part by part: the buffer of one may be reused for the next if ``whole`` returns all of it for
    NumPy, which does what kernels cannot. What is stored lies one after the other in the bytes of ``into`` (by
    default new memory), and is the same with and without ``kernels``.
    :class:`~stages.quantization.blocks.UnfitError` for a value that is not finite or does not fit.
    """
    quantizes = scheme.quantizes(kind)
    described = [(shape, dtype)]
    if quantizes:
        n, k = shape
        described = [(found, dtype) for _, found, dtype in scheme.stored(n, k)]
    stored = _tensors([(arrangement.shape(layout, found), numpy_dtype(dtype)) for found, dtype in described], into)
    sums = _by_kernels(parts, shape, scheme, stored, quantizes, scales, layout, kernels) if kernels else None
    error = sums.relative() if sums else None
    if error is None:
        array = whole() if whole else np.concatenate([*parts])
        error = _by_numpy(array, scheme, stored, quantizes, scales, layout)
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
    scheme: Scheme,
    stored: Sequence[np.ndarray],
    quantizes: bool,
    scales: str,
    layout: str,
    kernels: Kernels,
) -> Sums | None:
    parts = (
        part if part.flags.c_contiguous and part.flags.aligned else np.require(part, None, ("C", "A")) for part in parts
    )
    if quantizes:
        return kernels.quantize(parts, shape[0], scheme, scales, layout, stored) if scheme.kind == "group" else None
    if layout == "nk":
        return kernels.cast(parts, stored[0])
    rows = np.empty(shape, stored[0].dtype)
    sums = kernels.cast(parts, rows)
    stored[0][...] = arrangement.arrange(layout, rows, scheme.bits)
    return sums


def _by_numpy(
    array: np.ndarray,
    scheme: Scheme,
    stored: Sequence[np.ndarray],
    quantizes: bool,
    scales: str,
    layout: str,
) -> tuple[float, float]:
    if not quantizes:
        made = [cast(array, stored[0].dtype.name)]
        error = relative_error(array, lambda rows: made[0][rows].astype(np.float32))
    elif scheme.kind == "tensor":
        codes, scale = made = [*float8.quantize(array)]
        error = relative_error(array, lambda rows: float8.dequantize(codes[rows], scale))
    else:
        words, scale = made = [*group.quantize(array, scheme, scales)]
        error = relative_error(array, lambda rows: group.dequantize(words[rows], scale[rows], scheme, array.shape[1]))
    for target, tensor in zip(stored, made, strict=True):
        target[...] = arrangement.arrange(layout, tensor, scheme.bits)
    return error


def restored(stored: Sequence[np.ndarray], scheme: Scheme, k: int) -> np.ndarray:
    """Return the float32 weight [n, k] that quantized ``stored`` tensors, or some of their rows, stand for."""
    values, scale = stored
    return float8.dequantize(values, scale) if scheme.kind == "tensor" else group.dequantize(values, scale, scheme, k)
