"""TVM's tensor-cache format, read side: tensor-cache.json lists the shards and where each tensor lies in them."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from stages.runtime import backend
from stages.runtime.errors import BundleError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

FILE = "tensor-cache.json"
# dtype -> bytes of a value
_DTYPES = {
    "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "uint32": 4, "int32": 4, "uint8": 1, "int8": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Record:
    """Where one tensor lies: ``nbytes`` at ``offset`` of ``shard``, in ``encoding`` ``raw`` or ``f32-to-bf16``."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    encoding: str
    shard: Path
    offset: int
    nbytes: int

    def load(self) -> np.ndarray:
        """Return the tensor; a read-only view of the mapped shard where the bytes are stored as they are."""
        stored = "uint16" if self.encoding == "f32-to-bf16" else self.dtype
        if stored in ("bfloat16", "float8_e4m3fn"):
            backend.tvm()  # makes NumPy know them
        array = np.memmap(self.shard, dtype=stored, mode="r", offset=self.offset, shape=self.shape)
        if self.encoding == "f32-to-bf16":
            return (array.astype(np.uint32) << 16).view(np.float32)
        return array


def records(root: Path) -> dict[str, Record]:
    """Return every tensor's record by name; :class:`BundleError` names each record that its shard cannot hold."""
    try:
        document = json.loads((root / FILE).read_text(encoding="utf-8"))
        found = [_record(root, shard, entry) for shard in document["records"] for entry in shard["records"]]
        problems = [problem for record in found if (problem := _problem(root, record))]
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise BundleError(f"{root / FILE}: not a tensor cache: {type(error).__name__}: {error}") from None
    if problems:
        raise BundleError(*problems)
    return {record.name: record for record in found}


def read(root: Path) -> dict[str, np.ndarray]:
    """Return every tensor by name, in stored order."""
    return {name: record.load() for name, record in records(root).items()}


def upload(root: Path, names: Sequence[str], device: Any) -> Iterator[Any]:
    """Yield the tensors ``names``, in that order, as TVM tensors on ``device``; one host copy at a time."""
    known = records(root)
    missing = [name for name in names if name not in known]
    if missing:
        raise BundleError(*(f"{root / FILE}: no tensor named {name}, which the library needs" for name in missing))
    for name in names:
        yield backend.tvm().runtime.tensor(known[name].load(), device)


def _record(root: Path, shard: dict[str, Any], entry: dict[str, Any]) -> Record:
    return Record(
        name=str(entry["name"]),
        shape=tuple(int(n) for n in entry["shape"]),
        dtype=str(entry["dtype"]),
        encoding=str(entry["format"]),
        shard=root / shard["dataPath"],
        offset=int(entry["byteOffset"]),
        nbytes=int(entry["nbytes"]),
    )


def _problem(root: Path, record: Record) -> str:
    where = f"{root / FILE}: {record.name}"
    if record.dtype not in _DTYPES:
        return f"{where}: dtype {record.dtype} is not one of {', '.join(_DTYPES)}"
    if record.encoding != "raw" and (record.encoding, record.dtype) != ("f32-to-bf16", "float32"):
        return f"{where}: {record.dtype} stored as {record.encoding} is not known here"
    if record.shard.parent != root or not record.shard.resolve().is_relative_to(root.resolve()):
        return f"{where}: its shard {record.shard} is not in the bundle"
    width = 2 if record.encoding != "raw" else _DTYPES[record.dtype]
    if record.nbytes != width * math.prod(record.shape) or record.offset < 0 or min(record.shape, default=1) < 1:
        return f"{where}: {record.nbytes} bytes at {record.offset} cannot be {record.dtype} {list(record.shape)}"
    if not record.shard.is_file() or record.shard.stat().st_size < record.offset + record.nbytes:
        return f"{where}: {record.shard.name} ends before the tensor does"
    return ""
