"""The weights that a bundle really holds, in the checkpoint's names and shapes, and how far from the checkpoint's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from stages.models import transforms
from stages.quantization import group

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from stages.quantization.schemes import Scheme
    from stages.runtime.tensor_cache import Record

# Rounding beside the half step of a code: the division and the product in float32, and the stored scale in float16.
_SLACK = {"float32": 1e-5, "float16": 7 * 2.0**-11 + 1e-5}


def held(
    registry: Mapping[str, Any], records: Mapping[str, Record], scheme: Scheme
) -> Iterator[tuple[Mapping[str, Any], np.ndarray]]:
    """Yield every logical parameter of params.json with the float32 array that the bundle holds for it."""
    for entry in registry["logical"]:
        stored = [records[name].load() for name in entry["stored"]]
        if entry["quantize"]:
            q_weight, q_scale = stored
            yield entry, group.dequantize(q_weight, q_scale, scheme, entry["shape"][1])
        else:
            yield entry, stored[0].astype(np.float32)


def by_source(entry: Mapping[str, Any], array: np.ndarray) -> dict[str, np.ndarray]:
    """Return one parameter's array as the checkpoint tensors it was made of."""
    parts = transforms.invert(entry["transform"], array, entry["source_shapes"])
    return dict(zip(entry["sources"], parts, strict=True))


def differences(
    registry: Mapping[str, Any],
    records: Mapping[str, Record],
    scheme: Scheme,
    checkpoint: Mapping[str, np.ndarray] | Any,
) -> list[str]:
    """Return every tensor whose held values are further from the checkpoint's than its storage explains.

    Unquantized parameters must be the checkpoint's values cast to the storage dtype, bit for bit; a quantized value
    may be off by half a step of its group.
    """
    problems = []
    for entry, array in held(registry, records, scheme):
        allowed = _allowed(entry, records, scheme)
        bounds = by_source(entry, allowed) if allowed is not None else {}
        for name, values in by_source(entry, array).items():
            original = np.asarray(checkpoint[name])
            if allowed is None:
                wanted = original.astype(entry["dtype"]).astype(np.float32)
                wrong = values != wanted
            else:
                wanted = original.astype(np.float32)
                wrong = ~(np.abs(values - wanted) <= bounds[name])
            if wrong.any():
                at = tuple(int(i) for i in np.argwhere(wrong)[0])
                problems.append(
                    f"{name}: {int(wrong.sum()):,} of {wrong.size:,} values are not the checkpoint's within what "
                    f"{scheme.name} explains, first at {list(at)}: {values[at]:g} where it has {wanted[at]:g}"
                )
    return problems


def _allowed(entry: Mapping[str, Any], records: Mapping[str, Record], scheme: Scheme) -> np.ndarray | None:
    if not entry["quantize"]:
        return None
    scale = records[entry["stored"][1]].load().astype(np.float32)
    # A scale below float16's normal range is stored with an absolute error.
    allowed = scale * np.float32(0.5 + _SLACK[scheme.storage_dtype]) + np.float32(7 * 2.0**-25)
    return np.repeat(allowed, scheme.group_size, axis=1)[:, : entry["shape"][1]]
