"""The few ways a graph parameter is made from checkpoint tensors, and back. NumPy arrays in, NumPy arrays out.

A transform is a row's name, with an argument after a colon where it takes one: ``interleaved_qkv:32``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Arrays = Sequence[np.ndarray]
Shapes = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Transform:
    """``apply(tensors, argument)`` makes the parameter; ``invert(array, source shapes, argument)`` undoes it."""

    apply: Callable[[Arrays, str], np.ndarray]
    invert: Callable[[np.ndarray, Shapes, str], list[np.ndarray]]


def apply(transform: str, tensors: Arrays) -> np.ndarray:
    """Return the parameter made of ``tensors``; :class:`ValueError` for a transform that is not in the table."""
    name, _, argument = transform.partition(":")
    return _row(name).apply(tensors, argument)


def invert(transform: str, array: np.ndarray, source_shapes: Shapes) -> list[np.ndarray]:
    """Return the tensors, of ``source_shapes``, that :func:`apply` made ``array`` of."""
    name, _, argument = transform.partition(":")
    parts = _row(name).invert(array, source_shapes, argument)
    if [part.shape for part in parts] != [tuple(shape) for shape in source_shapes]:
        raise ValueError(f"{[part.shape for part in parts]} are not the shapes {[*map(tuple, source_shapes)]}")
    return parts


def source_of(transform: str, place: Sequence[int], source_shapes: Shapes) -> tuple[int, list[int]]:
    """Return which of the tensors that :func:`apply` was given has what is at ``place`` of what it made, and where."""
    if transform == "scalar":
        return 0, []
    if transform == "transpose":
        return 0, [*place][::-1]
    if transform == "stacked_transpose":
        expert, feature = divmod(place[0], source_shapes[0][2])
        return 0, [expert, place[1], feature]
    outer = [shape[:-1] or shape for shape in source_shapes]
    parts = invert(transform, np.arange(sum(map(math.prod, outer))), outer)
    number, part = next((number, part) for number, part in enumerate(parts) if place[0] in part)
    return number, [*(int(at[0]) for at in np.nonzero(part == place[0])), *place[1:]]


def _row(name: str) -> Transform:
    if name not in TRANSFORMS:
        raise ValueError(f"unknown transform {name!r}; known: {', '.join(TRANSFORMS)}")
    return TRANSFORMS[name]


def _only(tensors: Arrays, _argument: str) -> np.ndarray:
    (tensor,) = tensors
    return tensor


def _split_rows(array: np.ndarray, source_shapes: Shapes, _argument: str) -> list[np.ndarray]:
    ends = np.cumsum([shape[0] for shape in source_shapes])
    if ends[-1] != array.shape[0]:
        raise ValueError(f"concat0 of {[*map(tuple, source_shapes)]} has {ends[-1]} rows, not {array.shape[0]}")
    return list(np.split(array, ends[:-1]))


def _stacked(tensors: Arrays, _argument: str) -> np.ndarray:
    (tensor,) = tensors
    return tensor.reshape(-1, tensor.shape[-1])


def _unstacked(array: np.ndarray, source_shapes: Shapes, _argument: str) -> list[np.ndarray]:
    return [array.reshape(tuple(source_shapes[0]))]


def _transposed(tensors: Arrays, _argument: str) -> np.ndarray:
    (tensor,) = tensors
    return np.ascontiguousarray(tensor.T)


def _transposed_back(array: np.ndarray, _source_shapes: Shapes, _argument: str) -> list[np.ndarray]:
    return [np.ascontiguousarray(array.T)]


def _stacked_transposed(tensors: Arrays, _argument: str) -> np.ndarray:
    (tensor,) = tensors
    return np.ascontiguousarray(tensor.swapaxes(1, 2)).reshape(-1, tensor.shape[1])


def _stacked_transposed_back(array: np.ndarray, source_shapes: Shapes, _argument: str) -> list[np.ndarray]:
    experts, _, features = source_shapes[0]
    return [np.ascontiguousarray(array.reshape(experts, features, -1).swapaxes(1, 2))]


def _by_part(tensors: Arrays, heads: str) -> np.ndarray:
    (tensor,) = tensors
    return _swap(tensor, int(heads), 3)


def _by_head(array: np.ndarray, _source_shapes: Shapes, heads: str) -> list[np.ndarray]:
    return [_swap(array, 3, int(heads))]


def _swap(array: np.ndarray, outer: int, inner: int) -> np.ndarray:
    """Reorder rows [outer][inner][d] to [inner][outer][d]."""
    if array.shape[0] % (outer * inner):
        raise ValueError(f"{array.shape[0]} rows are not {outer} x {inner} equal parts")
    split = array.reshape(outer, inner, -1, *array.shape[1:])
    return np.ascontiguousarray(split.swapaxes(0, 1)).reshape(array.shape)


# copy: the one tensor (a view). concat0: one under the other. stacked_copy: matrices [e, n, k] one under the other (a
# view); stacked_transpose: the transposes of [e, k, n]. transpose: columns become rows. interleaved_qkv:HEADS: rows
# that go head by head, each with its q, k and v, become all q, all k, all v. scalar: a number [] becomes [1].
TRANSFORMS: dict[str, Transform] = {
    "copy": Transform(_only, lambda array, _shapes, _argument: [array]),
    "scalar": Transform(
        lambda tensors, _argument: _only(tensors, "").reshape(1), lambda array, _shapes, _argument: [array.reshape(())]
    ),
    "concat0": Transform(lambda tensors, _argument: np.concatenate(list(tensors), axis=0), _split_rows),
    "stacked_copy": Transform(_stacked, _unstacked),
    "stacked_transpose": Transform(_stacked_transposed, _stacked_transposed_back),
    "transpose": Transform(_transposed, _transposed_back),
    "interleaved_qkv": Transform(_by_part, _by_head),
}
