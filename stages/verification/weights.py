"""The weights that a bundle really holds, in the checkpoint's names and shapes, and how far from the checkpoint's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from stages.models import transforms
from stages.models.weights import NUMPY_DTYPES
from stages.quantization import group, layouts
from stages.quantization.blocks import row_blocks

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from stages.quantization.schemes import Scheme
    from stages.runtime.tensor_cache import Record

# Beside the half step of a code, by the dtype of the stored scale: the rounding of the scale, seven of which a code may
# be worth, with the division and the product in float32; and what a scale below the dtype's normal range is off by.
_SLACK = {"float32": (1e-5, 7 * 2.0**-149), "float16": (7 * 2.0**-11 + 1e-5, 7 * 2.0**-25)}


@dataclass(frozen=True)
class Held:
    """One checkpoint tensor as the bundle holds it: the mapped arrays that are stored for its rows."""

    name: str
    shape: tuple[int, ...]
    stored: Sequence[np.ndarray]
    quantized: bool
    scheme: Scheme

    def rows(self, rows: Any) -> np.ndarray:
        """Return the float32 values of ``rows``, a slice or a list of indices."""
        if not self.quantized:
            return self.stored[0][rows].astype(np.float32)
        q_weight, q_scale = self.stored
        return group.dequantize(q_weight[rows], q_scale[rows], self.scheme, self.shape[1])

    def values(self) -> np.ndarray:
        """Return the whole tensor in float32, made block by block."""
        whole = np.empty(self.shape, np.float32)
        for rows in row_blocks(self.shape):
            whole[rows] = self.rows(rows)
        return whole


def misplaced(registry: Mapping[str, Any], records: Mapping[str, Record]) -> list[str]:
    """Return which of the tensors of params.json the bundle does not hold, or holds in another shape or dtype."""
    wanted = {entry["name"]: f"{entry['dtype']} {entry['shape']}" for entry in registry["params"]}
    found = {name: f"{record.dtype} {list(record.shape)}" for name, record in records.items()}
    return [
        f"{name}: params.json has {text}, the bundle {found.get(name, 'none')}; verify must see the bundle's own params"
        for name, text in wanted.items()
        if found.get(name) != text
    ]


def mismatched(registry: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return which of the tensors that params.json is made of the checkpoint lacks, or has in another shape."""
    wanted = {
        name: shape
        for entry in registry["logical"]
        for name, shape in zip(entry["sources"], entry["source_shapes"], strict=True)
    }
    found = {name: tensor["shape"] for name, tensor in tensors.items() if tensor["dtype"] in NUMPY_DTYPES}
    return [
        f"{name}: params.json is made of {shape}, the checkpoint has {found.get(name, 'none that can be read')}; "
        "verify must see the checkpoint that param-register saw"
        for name, shape in wanted.items()
        if found.get(name) != shape
    ]


def held(registry: Mapping[str, Any], records: Mapping[str, Record], scheme: Scheme) -> Iterator[Held]:
    """Yield every checkpoint tensor of params.json as the bundle holds it; nothing is read before it is asked for."""
    for entry in registry["logical"]:
        arrays = [records[name].load() for name in entry["stored"]]
        if entry["kind"] in layouts.MATRICES:
            rows = entry["shape"][0]
            arrays = [layouts.restore(registry["layout"], array, rows, scheme.bits) for array in arrays]
        parts = [
            transforms.invert(
                entry["transform"], array, [[shape[0], *array.shape[1:]] for shape in entry["source_shapes"]]
            )
            for array in arrays
        ]
        for name, shape, stored in zip(entry["sources"], entry["source_shapes"], zip(*parts, strict=True), strict=True):
            yield Held(name, tuple(shape), stored, entry["quantize"], scheme)


def differences(
    registry: Mapping[str, Any],
    records: Mapping[str, Record],
    scheme: Scheme,
    checkpoint: Mapping[str, np.ndarray] | Any,
) -> list[str]:
    """Return every tensor whose held values are further from the checkpoint's than its storage explains.

    Unquantized parameters must be the checkpoint's values cast to the storage dtype, bit for bit. A quantized value may
    be off by half a step, and the step is what the checkpoint's own group gives: the bundle's scales prove nothing.
    """
    problems = []
    for tensor in held(registry, records, scheme):
        original, count, first = checkpoint[tensor.name], 0, ""
        for rows in row_blocks(tensor.shape):
            values, source = tensor.rows(rows), np.asarray(original[rows])
            if tensor.quantized:
                wanted = source.astype(np.float32)
                wrong = ~(np.abs(values - wanted) <= _allowed(wanted, scheme))
            else:
                wanted = source.astype(tensor.stored[0].dtype).astype(np.float32)
                wrong = values != wanted
            if wrong.any() and not first:
                at = tuple(int(i) for i in np.argwhere(wrong)[0])
                place = [at[0] + rows.start, *at[1:]]
                first = f"first at {place}: {values[at]:g} where it has {wanted[at]:g}"
            count += int(wrong.sum())
        if count:
            problems.append(
                f"{tensor.name}: {count:,} of {np.prod(tensor.shape):,} values are not the checkpoint's within what "
                f"{scheme.name} explains, {first}"
            )
    return problems


def _allowed(wanted: np.ndarray, scheme: Scheme) -> np.ndarray:
    """Return how far a held value may be from each of ``wanted`` [n, k]."""
    size, (relative, absolute) = scheme.group_size, _SLACK[scheme.storage_dtype]
    peak = np.maximum.reduceat(np.abs(wanted), np.arange(0, wanted.shape[1], size), axis=1)
    step = peak / np.float32(2 ** (scheme.bits - 1) - 1)
    allowed = step * np.float32(0.5 + relative) + np.float32(absolute)
    return np.repeat(allowed, size, axis=1)[:, : wanted.shape[1]]
