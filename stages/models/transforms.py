"""The few ways a graph parameter is made from checkpoint tensors, and back. NumPy arrays in, NumPy arrays out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence


def apply(transform: str, tensors: Sequence[np.ndarray]) -> np.ndarray:
    """Return the parameter made of ``tensors``: ``copy`` of exactly one (a view), or ``concat0`` along axis 0."""
    if transform == "copy":
        (tensor,) = tensors
        return tensor
    if transform == "concat0":
        return np.concatenate(list(tensors), axis=0)
    raise ValueError(f"unknown transform {transform!r}; known: copy, concat0")


def invert(transform: str, array: np.ndarray, source_shapes: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Return the tensors, of ``source_shapes``, that :func:`apply` made ``array`` of; views of it."""
    if transform == "copy":
        parts = [array]
    elif transform == "concat0":
        ends = np.cumsum([shape[0] for shape in source_shapes])
        if ends[-1] != array.shape[0]:
            raise ValueError(f"concat0 of {[*map(tuple, source_shapes)]} has {ends[-1]} rows, not {array.shape[0]}")
        parts = np.split(array, ends[:-1])
    else:
        raise ValueError(f"unknown transform {transform!r}; known: copy, concat0")
    if [part.shape for part in parts] != [tuple(shape) for shape in source_shapes]:
        raise ValueError(f"{[part.shape for part in parts]} are not the shapes {[*map(tuple, source_shapes)]}")
    return parts
