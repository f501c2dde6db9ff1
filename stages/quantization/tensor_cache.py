"""Shards in TVM's tensor-cache format: which tensors lie in which file, and the tensor-cache.json that says so.

The format is what ``vm.builtin.tensor_cache.load`` of the TVM runtime reads: ``records`` lists the shards
(``dataPath``, ``format`` "raw-shard", ``nbytes``), each with the ``records`` of its tensors (``name``, ``shape``,
``dtype``, ``format`` "raw", ``nbytes``, ``byteOffset``), little-endian and row-major, in packed order.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stages.sizes import DTYPE_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from stages.documents.files import JsonObject

SHARD_BYTES = 32 * 2**20  # the loader reads a shard at once
OWN_SHARD_BYTES = 256 * 2**10


@dataclass(frozen=True)
class Tensor:
    """One stored tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


def shards(parameters: Sequence[Sequence[Tensor]]) -> list[list[int]]:
    """Return which parameters lie in which shard, all in packed order; a parameter's tensors are never parted.

    One of at least :data:`OWN_SHARD_BYTES` has a shard of its own, so that a file is the same for as long as the
    parameter is; smaller neighbours share one of up to :data:`SHARD_BYTES`.
    """
    found: list[list[int]] = []
    room = 0
    for index, tensors in enumerate(parameters):
        size = sum(tensor.nbytes for tensor in tensors)
        alone = size >= OWN_SHARD_BYTES
        if alone or size > room:
            found.append([])
            room = 0 if alone else SHARD_BYTES
        found[-1].append(index)
        room -= 0 if alone else size
    return found


def shard_name(number: int) -> str:
    """Return the file name of a shard."""
    return f"params_shard_{number}.bin"


def write_index(folder: Path, contents: Sequence[Sequence[Tensor]], metadata: JsonObject) -> None:
    """Write tensor-cache.json for shards that hold ``contents``, each back to back; it is what makes them a cache."""
    records = []
    for number, tensors in enumerate(contents):
        entries, end = [], 0
        for tensor in tensors:
            entry = {"name": tensor.name, "shape": [*tensor.shape], "dtype": tensor.dtype, "format": "raw"}
            entries.append({**entry, "nbytes": tensor.nbytes, "byteOffset": end})
            end += tensor.nbytes
        records.append({"dataPath": shard_name(number), "format": "raw-shard", "nbytes": end, "records": entries})
    (folder / "tensor-cache.json").write_text(listing({"metadata": dict(metadata)}, "records", records), "utf-8")


def listing(fields: JsonObject, name: str, items: Iterable[Any]) -> str:
    """Return the JSON of an object: ``fields``, and under ``name`` a list with a line for each item."""
    lines = ",\n".join(json.dumps(item, allow_nan=False, sort_keys=True) for item in items)
    return f'{json.dumps(fields, allow_nan=False)[:-1]}, "{name}": [\n{lines}\n]}}\n'
