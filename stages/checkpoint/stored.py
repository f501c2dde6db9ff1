"""The tensors of a checkpoint's files as they are stored, of whatever format, read some rows at a time."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from stages.checkpoint.gguf import container, is_named
from stages.checkpoint.safetensors import TensorInfo, read_header

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from stages.documents.model import StoredPart

NUMPY_DTYPES: dict[str, Any] = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F64": np.float64,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}
# What parts of packed tensors are of besides.
PART_DTYPES = NUMPY_DTYPES | {"I8": np.int8, "U8": np.uint8, "I32": np.int32, "I64": np.int64, "F8_E8M0": np.uint8}


def header(path: Path, name: str) -> dict[str, TensorInfo]:
    """Return tensor name -> info of a file; :class:`ValueError` calling it ``name`` if it is damaged.

    Those of GGUF are bytes: a row of them for each row of the tensor, or for each value of a vector.
    """
    if not is_named(name):
        return read_header(path, name)
    return {tensor: _bytes(stored) for tensor, stored in container.read(path, name).tensors.items()}


def _bytes(stored: container.GgufTensor) -> TensorInfo:
    rows = stored.shape[0] if len(stored.shape) == 1 else stored.nbytes // stored.row_bytes
    return TensorInfo("U8", (rows, stored.nbytes // rows), stored.offset)


class StoredParts:
    """The stored parts of one packed tensor; parts that are read whole stay in memory as long as this object."""

    def __init__(self, parts: Mapping[str, StoredPart], infos: Mapping[str, TensorInfo], files: Mapping[str, Path]):
        self._parts, self._infos, self._files = parts, infos, files
        self._whole: dict[str, np.ndarray] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._parts

    def whole(self, key: str) -> np.ndarray:
        """Return a part with all its rows."""
        if key not in self._whole:
            self._whole[key] = self.rows(key, 0, self._infos[key].shape[0] if self._infos[key].shape else 1)
        return self._whole[key]

    def rows(self, key: str, start: int, stop: int) -> np.ndarray:
        """Return the rows ``start`` to ``stop`` of a part; :class:`ValueError` if the file has become shorter."""
        info, name = self._infos[key], self._parts[key]["file"]
        width = info.nbytes // (info.shape[0] if info.shape else 1)
        data = bytearray((stop - start) * width)
        with self._files[name].open("rb", buffering=0) as file:
            done = 0
            while done < len(data):
                view = memoryview(data)[done : done + 2**30]
                count = os.preadv(file.fileno(), [view], info.offset + start * width + done)
                if not count:
                    raise ValueError(f"{name}: the file ends before its tensor {self._parts[key]['name']} does")
                done += count
        return np.frombuffer(data, PART_DTYPES[info.dtype]).reshape(-1, *info.shape[1:])
