"""Checkpoint tensors as NumPy arrays, read or mapped; one mapping per tensor, so that its pages leave with it."""

from __future__ import annotations

import math
import mmap
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from stages.models.safetensors import DTYPE_BYTES, TensorInfo, read_header

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path
    from typing import BinaryIO

BLOCK = 2**20  # bytes that are read at once: what a core's second cache holds
STEP = 32  # rows that are read at once are a multiple of it
NUMPY_DTYPES: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


class Weights:
    """Tensors by name. ``files`` are shard names -> paths, ``tensors`` config-parse's table: dtype, shape, file."""

    def __init__(self, files: Mapping[str, Path], tensors: Mapping[str, Mapping[str, Any]]) -> None:
        self._files = files
        self._tensors = tensors
        self._headers: dict[str, dict[str, TensorInfo]] = {}

    def __getitem__(self, name: str) -> np.ndarray:
        """Return a read-only array in the checkpoint's dtype; :class:`ValueError` if the file has it otherwise."""
        path, info = self._find(name)
        skipped = info.offset % mmap.ALLOCATIONGRANULARITY
        with path.open("rb", buffering=0) as file:
            start, length = info.offset - skipped, info.nbytes + skipped
            mapped = mmap.mmap(file.fileno(), length, offset=start, access=mmap.ACCESS_READ)
        data = np.frombuffer(mapped, np.uint8, info.nbytes, skipped)
        return data.view(NUMPY_DTYPES[info.dtype]).reshape(info.shape)

    def blocks(self, name: str, memory: Callable[[int], np.ndarray]) -> Iterator[np.ndarray]:
        """Yield a tensor's rows, some at once, each time read to where the last ones were: into bytes of ``memory``.

        That costs less than a mapping that is all read, and a block is in the processor's cache when it is used.
        """
        path, info = self._find(name)
        rows = info.shape[0] if info.shape else 1
        width = info.nbytes // max(rows, 1)
        step = max(BLOCK // max(width, 1) // STEP * STEP, STEP)
        data = memory(min(step, rows) * width)
        with path.open("rb", buffering=0) as file:
            file.seek(info.offset)
            for start in range(0, rows, step):
                block = data[: min(step, rows - start) * width]
                if missing := len(block) - _read(file, block.data):
                    left = info.nbytes - start * width - len(block) + missing
                    raise ValueError(f"{path.name}: the file ends {left:,} bytes before its tensor {name} does")
                yield block.view(NUMPY_DTYPES[info.dtype]).reshape(-1, *info.shape[1:])

    def _find(self, name: str) -> tuple[Path, TensorInfo]:
        """Return the file of a tensor and what it says of it."""
        wanted = self._tensors[name]
        file = wanted["file"]
        info = self._header(file).get(name)
        if info is None or [info.dtype, *info.shape] != [wanted["dtype"], *wanted["shape"]]:
            expected = f"{wanted['dtype']} {wanted['shape']}"
            raise ValueError(f"{file}: tensor {name} is not the {expected} that config-parse saw")
        return self._files[file], info

    def place(self, name: str) -> tuple[str, int]:
        """Return the file a tensor is in, and where there, to read tensors in the order in which they lie."""
        file = self._tensors[name]["file"]
        info = self._header(file).get(name)
        return file, info.offset if info else 0

    def _header(self, file: str) -> dict[str, TensorInfo]:
        if file not in self._headers:
            if file not in self._files:
                raise ValueError(f"{file}: the shard is missing")
            self._headers[file] = read_header(self._files[file], file)
        return self._headers[file]

    def nbytes(self, name: str) -> int:
        """Return the size of a tensor in its file."""
        tensor = self._tensors[name]
        return int(math.prod(tensor["shape"])) * DTYPE_BYTES[tensor["dtype"]]


def _read(file: BinaryIO, memory: memoryview) -> int:
    """Fill ``memory`` from a raw file; return how many bytes there were."""
    end = 0
    while count := file.readinto(memory[end:]):  # type: ignore[attr-defined]
        end += count
    return end
