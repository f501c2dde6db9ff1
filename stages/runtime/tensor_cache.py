"""TVM's tensor-cache format, read side: tensor-cache.json lists the shards and where each tensor lies in them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from stages.runtime import backend
from stages.runtime.errors import BundleError
from stages.runtime.folder import parse

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from stages.runtime.documents import JsonObject
    from stages.runtime.folder import Folder

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
        """Return the tensor, unchecked; a read-only view of the mapped shard where bytes are stored as they are."""
        return self._array(lambda stored: np.memmap(self.shard, stored, "r", self.offset, self.shape))

    def of(self, data: bytearray) -> np.ndarray:
        """Return the tensor in ``data``, the content of its shard; a view where bytes are stored as they are."""
        count = math.prod(self.shape)
        return self._array(lambda stored: np.frombuffer(data, stored, count, self.offset).reshape(self.shape))

    def _array(self, read: Callable[[str], np.ndarray]) -> np.ndarray:
        stored = "uint16" if self.encoding == "f32-to-bf16" else self.dtype
        if stored in ("bfloat16", "float8_e4m3fn"):
            backend.tvm()  # makes NumPy know them
        array = read(stored)
        if self.encoding == "f32-to-bf16":
            return (array.astype(np.uint32) << 16).view(np.float32)
        return array


def records(folder: Folder) -> dict[str, Record]:
    """Return every tensor's record by name; :class:`BundleError` names each record that its shard cannot hold.

    No shard is read.
    """
    document = parse(folder.read(FILE), f"{folder.root / FILE}", strict=True)
    problems: list[str] = []
    found: dict[str, Record] = {}
    for shard, entry in _entries(document):
        try:
            record = _record(folder.root, shard, entry)
            problem = _problem(folder, shard, record)
        except (KeyError, TypeError, ValueError):
            what = f"{entry!r:.100} in {shard!r:.60} is no record of a tensor"
            raise BundleError(f"{folder.root / FILE}: {what}") from None
        if not problem and record.name in found:
            problem = f"{folder.root / FILE}: {record.name} is there twice"
        problems += [problem] if problem else []
        found[record.name] = record
    if problems:
        raise BundleError(*problems)
    return found


def upload(
    folder: Folder, known: Mapping[str, Record], names: Sequence[str], device: Any, *, digest: bool
) -> list[Any]:
    """Return the tensors ``names``, in that order, as TVM tensors on ``device``.

    Shards are read one at a time, digested on the way unless ``digest`` is false; :class:`BundleError` names each that
    is damaged.
    """
    where = folder.root / FILE
    missing = [name for name in names if name not in known]
    if missing:
        raise BundleError(*(f"{where}: no tensor named {name}, which the library needs" for name in missing))
    by_shard: dict[str, list[str]] = {}
    for name in names:
        by_shard.setdefault(known[name].shard.name, []).append(name)
    loaded: dict[str, Any] = {}
    problems: list[str] = []
    for shard, members in by_shard.items():
        try:
            data = folder.read(shard, digest=digest)
        except BundleError as error:
            problems += error.problems
            continue
        loaded |= {name: backend.tvm().runtime.tensor(known[name].of(data), device) for name in members}
    if problems:
        raise BundleError(*problems)
    return [loaded[name] for name in names]


def _entries(document: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the name of a shard and what is said of a tensor in it, whatever these are."""
    shards = document.get("records") if isinstance(document, dict) else None
    for shard in shards if isinstance(shards, list) else [None]:
        entries = shard.get("records") if isinstance(shard, dict) else None
        for entry in entries if isinstance(entries, list) else [None]:
            yield shard.get("dataPath") if isinstance(shard, dict) else shard, entry


def _record(root: Path, shard: str, entry: JsonObject) -> Record:
    texts = (entry["name"], entry["dtype"], entry["format"], shard)
    numbers = (entry["byteOffset"], entry["nbytes"], *entry["shape"])
    if not all(isinstance(text, str) for text in texts) or not all(type(number) is int for number in numbers):
        raise TypeError
    offset, nbytes, *shape = numbers
    return Record(texts[0], tuple(shape), texts[1], texts[2], root / shard, offset, nbytes)


def _problem(folder: Folder, shard: str, record: Record) -> str:
    where = f"{folder.root / FILE}: {record.name:.200}"
    if record.dtype not in _DTYPES:
        return f"{where}: dtype {record.dtype} is not one of {', '.join(_DTYPES)}"
    if record.encoding != "raw" and (record.encoding, record.dtype) != ("f32-to-bf16", "float32"):
        return f"{where}: {record.dtype} stored as {record.encoding} is not known here"
    if "/" in shard or shard not in folder:
        return f"{where}: its shard {shard!r:.200} is not among the files of the bundle"
    width = 2 if record.encoding != "raw" else _DTYPES[record.dtype]
    if record.nbytes != width * math.prod(record.shape) or record.offset < 0 or min(record.shape, default=1) < 1:
        return f"{where}: {record.nbytes} bytes at {record.offset} cannot be {record.dtype} {list(record.shape)}"
    size = record.shard.stat().st_size if folder.listed is None else folder.listed[shard].size
    return f"{where}: {shard} ends before the tensor does" if size < record.offset + record.nbytes else ""
