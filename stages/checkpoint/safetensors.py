"""Headers of safetensors files, read without their weights: 8-byte length, a JSON table of contents, bounds checked.

Format: https://huggingface.co/docs/safetensors (little-endian u64 length, JSON, then the tensors back to back).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stages.checkpoint import misplaced, strict_json
from stages.checkpoint.strict_json import shown

if TYPE_CHECKING:
    from pathlib import Path

MAX_HEADER = 100_000_000  # bytes; the reference implementation's limit
MAX_RANK = 8  # dimensions; no weight has more than four
DTYPE_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "C64": 64, "BOOL": 8} | {
    f"{sign}{bits}": bits for sign in "IU" for bits in (8, 16, 32, 64)
}
DTYPE_BITS |= {"F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: safetensors dtype name, shape, and its first byte's offset in the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


def read_header(path: Path, name: str) -> dict[str, TensorInfo]:
    """Return tensor name -> info, in file order; :class:`ValueError` calling the file ``name`` if it is damaged."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if instead := misplaced.pointer(file.read(misplaced.HEAD)):
            raise ValueError(f"{name}: {instead}")
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"{name}: truncated: a header of {length} bytes does not fit a file of {size} bytes")
        if length > MAX_HEADER:
            raise ValueError(f"{name}: not a safetensors file: its header claims {length} bytes")
        try:
            header = strict_json.parse(file.read(length))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{name}: damaged header: {error}") from None
    if not isinstance(header, dict):
        raise ValueError(f"{name}: damaged header: expected a JSON object")
    header.pop("__metadata__", None)
    payload, expected = 8 + length, 0
    tensors = {}
    for tensor, entry in sorted(header.items(), key=lambda item: _begin(item[1])):
        info, end = _tensor_info(entry, payload, f"{name}: tensor {tensor[:200]}")
        if info.offset != payload + expected:
            raise ValueError(f"{name}: tensor {tensor} begins at byte {info.offset - payload}, not {expected}")
        tensors[tensor] = info
        expected = end
    if payload + expected != size:
        state = "truncated" if payload + expected > size else "has trailing bytes"
        raise ValueError(f"{name}: {state}: its header describes {payload + expected} bytes, the file has {size}")
    return tensors


def _begin(entry: Any) -> int:
    """Return the sort key of a header entry, before it is known to be well formed."""
    try:
        begin = entry["data_offsets"][0]
    except (TypeError, KeyError, IndexError):
        return -1
    return begin if type(begin) is int else -1


def _tensor_info(entry: Any, payload: int, where: str) -> tuple[TensorInfo, int]:
    """Return the info of one header entry and where it ends in the payload."""
    if not (isinstance(entry, dict) and {"dtype", "shape", "data_offsets"} <= entry.keys()):
        raise ValueError(f"{where}: needs dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise ValueError(f"{where}: unknown dtype {shown(dtype)}; known: {', '.join(sorted(DTYPE_BITS))}")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        found = f"shape {shown(shape)} and data_offsets {shown(offsets)}"
        raise ValueError(f"{where}: {found} must be lists of sizes, of at most {MAX_RANK} dimensions")
    info = TensorInfo(dtype, tuple(shape), payload + offsets[0])
    if offsets[1] - offsets[0] != info.nbytes:
        raise ValueError(f"{where}: {dtype} {shape} takes {info.nbytes} bytes, its offsets {offsets} say otherwise")
    return info, offsets[1]


def _are_sizes(value: Any) -> bool:
    fits = isinstance(value, list) and len(value) <= MAX_RANK
    return fits and all(type(size) is int and 0 <= size < 2**63 for size in value)
