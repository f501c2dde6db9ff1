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
    from collections.abc import Iterable, Sequence

    from stages.quantization.native import Kernels, Sums
    from stages.quantization.schemes import Scheme

ALGORITHM = 1  # raised whenever the same values would be stored as other bytes


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
    from stages.quantization.native import cast_name, quantize_name

    quantizing = [quantize_name(source, scheme, scales, layout) for layout in layouts if scheme.kind == "group"]
    return [*quantizing, *(cast_name(source, dtype) for dtype in dtypes)]


def convert(
    parts: Sequence[np.ndarray],
    scheme: Scheme,
    kind: str,
    *,
    dtype: str,
    scales: str,
    layout: str = "nk",
    kernels: Kernels | None = None,
    into: np.ndarray | None = None,
) -> Converted:
    """Convert a parameter of ``kind``, made of ``parts`` one under the other; one that the scheme does not quantize is
    cast to ``dtype``.

    What is stored lies one after the other in the bytes of ``into`` (by default new memory), and is the same with and
    without ``kernels``. :class:`ValueError` for a value that is not finite or does not fit, naming its index.
    """
    parts = [np.require(part, requirements=("C", "A")) for part in parts]
    shape, quantizes = (sum(len(part) for part in parts), *parts[0].shape[1:]), scheme.quantizes(kind)
    described = [(shape, dtype)]
    if quantizes:
        described = [(found, dtype) for _, found, dtype in scheme.stored(*shape)]
    stored = _tensors([(arrangement.shape(layout, found), numpy_dtype(dtype)) for found, dtype in described], into)
    sums = _by_kernels(parts, scheme, stored, quantizes, scales, layout, kernels) if kernels else None
    error = sums.relative() if sums else None
    if error is None:
        error = _by_numpy(parts, scheme, stored, quantizes, scales, layout)
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
    parts: Sequence[np.ndarray],
    scheme: Scheme,
    stored: Sequence[np.ndarray],
    quantizes: bool,
    scales: str,
    layout: str,
    kernels: Kernels,
) -> Sums | None:
    if quantizes:
        alike = scheme.kind == "group" and len({part.dtype for part in parts}) == 1
        return kernels.quantize(parts, scheme, scales, layout, stored) if alike else None
    if layout == "nk":
        return kernels.cast(parts, stored[0])
    rows = np.empty((sum(len(part) for part in parts), *parts[0].shape[1:]), stored[0].dtype)
    sums = kernels.cast(parts, rows)
    stored[0][...] = arrangement.arrange(layout, rows, scheme.bits)
    return sums


def _by_numpy(
    parts: Sequence[np.ndarray],
    scheme: Scheme,
    stored: Sequence[np.ndarray],
    quantizes: bool,
    scales: str,
    layout: str,
) -> tuple[float, float]:
    array = np.concatenate(parts) if len(parts) > 1 else parts[0]
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
