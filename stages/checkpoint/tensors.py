"""Checkpoint tensors as NumPy arrays: a tensor at once, or block by block, of which only one is in memory.

What is stored as it is is mapped; what is packed is made of its parts as it is asked for.
"""

from __future__ import annotations

import errno
import math
import mmap
import os
from typing import TYPE_CHECKING

import numpy as np

from stages.checkpoint import packed
from stages.checkpoint.safetensors import DTYPE_BITS, TensorInfo
from stages.checkpoint.stored import NUMPY_DTYPES, StoredParts, header

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from stages.documents.model import CheckpointTensor, StoredPart
    from stages.documents.params import Parameter

BLOCK = 2**20  # bytes of a block, or a quarter more: what a core's second cache holds
WINDOW = 2**24  # bytes: pages are released in batches of so many, which is faster than one by one
STEP = 32  # rows of a block are a multiple of it
POPULATE_READ = 22  # MADV_POPULATE_READ of Linux 5.14, for which Python has no name
# What is worked on as it is; the others are widened to float32.
WORKED_ON = ("F32", "F16", "BF16")


def working_dtype(dtypes: Iterable[str]) -> np.dtype:
    """Return the dtype that tensors of these safetensors dtypes are worked on as, together.

    Their own if it is one; float32 for several, which holds float16, bfloat16 and float8 exactly, for float8 alone, and
    for float64, which it does not hold: transformers loads a float32 model the same way.
    """
    kinds = {*dtypes}
    return np.dtype(NUMPY_DTYPES[kinds.pop()] if len(kinds) == 1 and kinds <= {*WORKED_ON} else np.float32)


def as_dtype(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return ``array`` as ``dtype``, itself if it is; a float64 beyond float32 becomes an infinity."""
    with np.errstate(over="ignore"):
        return array.astype(dtype, copy=False)


class Weights:
    """Tensors by name. ``files`` are shard names -> paths, ``tensors`` config-parse's table."""

    def __init__(self, files: Mapping[str, Path], tensors: Mapping[str, CheckpointTensor]) -> None:
        self._files = files
        self._tensors = tensors
        self._headers: dict[str, dict[str, TensorInfo]] = {}
        self._stats: dict[str, tuple[int, ...]] = {}

    def __getitem__(self, name: str) -> np.ndarray:
        """Return a read-only array in the checkpoint's dtype; :class:`ValueError` if the file has it otherwise."""
        if "packed" in self._tensors[name]:
            return np.concatenate([*self._made(name)])
        path, info = self._find(name)
        _, _, data = _map(path, name, info)
        found: np.ndarray = data.view(NUMPY_DTYPES[info.dtype]).reshape(info.shape)
        return found

    def blocks(self, name: str) -> Iterator[np.ndarray]:
        """Yield a tensor's rows, some at once; a block leaves memory some blocks later.

        A mapping is read without copying: that takes two thirds of what reading and digesting a file does. Pages are
        made present before they are touched, so that a file that has become shorter is an error and no signal.
        """
        if "packed" in self._tensors[name]:
            yield from self._made(name)
            return
        path, info = self._find(name)
        rows, step = _steps(info.shape, info.nbytes)
        width = info.nbytes // max(rows, 1)
        mapped, skipped, data = _map(path, name, info)
        released = 0
        for start in range(0, rows, step):
            begin, end = start * width, min(start + step, rows) * width
            first = (skipped + begin) // mmap.PAGESIZE * mmap.PAGESIZE
            try:
                mapped.madvise(POPULATE_READ, first, skipped + end - first)
            except OSError as error:
                if error.errno == errno.EFAULT:
                    _check_end(path, name, info, path.stat().st_size)
                if error.errno != errno.EINVAL:  # a Linux that does not know it: pages come when they are touched
                    raise
            yield data[begin:end].view(NUMPY_DTYPES[info.dtype]).reshape(-1, *info.shape[1:])
            if first - released >= WINDOW:
                mapped.madvise(mmap.MADV_DONTNEED, released, first - released)
                released = first

    def _made(self, name: str) -> Iterator[np.ndarray]:
        """Yield a packed tensor's rows, some at once."""
        entry = self._tensors[name]
        found = {key: self._info(part["name"], part) for key, part in entry["packed"]["parts"].items()}
        parts = StoredParts(entry["packed"]["parts"], found, self._files)
        rows, step = _steps(entry["shape"], self.nbytes(name))
        for start in range(0, rows, step):
            yield packed.rows(entry["packed"], parts, start, min(start + step, rows))

    def _find(self, name: str) -> tuple[Path, TensorInfo]:
        """Return the file of a tensor and what it says of it."""
        wanted = self._tensors[name]
        return self._files[wanted["file"]], self._info(name, wanted)

    def _info(self, name: str, wanted: CheckpointTensor | StoredPart) -> TensorInfo:
        """Return what the file says of the tensor ``name`` in it."""
        file = wanted["file"]
        info = self._header(file).get(name)
        if info is None or [info.dtype, *info.shape] != [wanted["dtype"], *wanted["shape"]]:
            expected = f"{wanted['dtype']} {wanted['shape']}"
            raise ValueError(f"{file}: tensor {name} is not the {expected} that config-parse saw")
        return info

    def place(self, name: str) -> tuple[str, int]:
        """Return the file a tensor is in, and where there, to read tensors in the order in which they lie."""
        for part in self._stored(name):
            info = self._header(part["file"]).get(part["name"])
            return part["file"], info.offset if info else 0
        return "", 0

    def batches(self, entries: Iterable[Parameter], size: int) -> list[list[Parameter]]:
        """Split parameters, in their order, into lists that are made of about ``size`` bytes each."""
        batches: list[list[Parameter]] = []
        taken = size
        for entry in entries:
            if taken >= size:
                batches.append([])
                taken = 0
            batches[-1].append(entry)
            taken += sum(self.nbytes(name) for name in entry["sources"])
        return batches

    def files(self, name: str) -> set[str]:
        """Return the files that a tensor is read from."""
        return {part["file"] for part in self._stored(name)}

    def _stored(self, name: str) -> list[StoredPart]:
        """Return what of the files a tensor is made of."""
        entry = self._tensors[name]
        if "packed" in entry:
            return [*entry["packed"]["parts"].values()]
        return [{"name": name, "dtype": entry["dtype"], "shape": entry["shape"], "file": entry["file"]}]

    def _header(self, file: str) -> dict[str, TensorInfo]:
        if file not in self._headers:
            if file not in self._files:
                raise ValueError(f"{file}: the shard is missing")
            self._stats[file] = _stat(self._files[file])
            self._headers[file] = header(self._files[file], file)
        return self._headers[file]

    def check_unchanged(self, name: str) -> None:
        """Raise :class:`ValueError` if a tensor's file was written to since its header was read.

        What is mapped changes with the file: without this, one content could be digested and another one converted.
        """
        for file in self.files(name):
            if self._stats.get(file) != _stat(self._files[file]):
                raise ValueError(f"{file}: the file was changed while it was read; run again")

    def nbytes(self, name: str) -> int:
        """Return the size of a tensor's values."""
        tensor = self._tensors[name]
        return int(math.prod(tensor["shape"])) * DTYPE_BITS[tensor["dtype"]] // 8


def _steps(shape: Sequence[int], nbytes: int) -> tuple[int, int]:
    """Return how many rows a tensor has, and how many of them are a block."""
    rows = shape[0] if shape else 1
    count = -(-nbytes // (BLOCK + BLOCK // 4))
    return rows, -(-rows // max(count, 1) // STEP) * STEP


def _map(path: Path, name: str, info: TensorInfo) -> tuple[mmap.mmap, int, np.ndarray]:
    """Return a mapping of a tensor, the offset in it where the tensor begins, and the tensor's bytes."""
    skipped = info.offset % mmap.ALLOCATIONGRANULARITY
    file = os.open(path, os.O_RDONLY)
    try:
        _check_end(path, name, info, os.fstat(file).st_size)
        start, length = info.offset - skipped, info.nbytes + skipped
        mapped = mmap.mmap(file, length, offset=start, access=mmap.ACCESS_READ)
    finally:
        os.close(file)
    return mapped, skipped, np.frombuffer(mapped, np.uint8, info.nbytes, skipped)


def _stat(path: Path) -> tuple[int, ...]:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _check_end(path: Path, name: str, info: TensorInfo, size: int) -> None:
    """Raise :class:`ValueError` if a file of ``size`` bytes does not hold all of a tensor."""
    left = info.offset + info.nbytes - size
    if left > 0:
        raise ValueError(f"{path.name}: the file ends {left:,} bytes before its tensor {name} does")
