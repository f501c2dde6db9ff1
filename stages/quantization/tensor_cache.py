"""Write weights in TVM's tensor-cache format: raw shards and the tensor-cache.json that names what is in them.

The format is what ``vm.builtin.tensor_cache.load`` of the TVM runtime reads: ``records`` lists the shards
(``dataPath``, ``format`` "raw-shard", ``nbytes``), each with the ``records`` of its tensors (``name``, ``shape``,
``dtype``, ``format`` "raw", ``nbytes``, ``byteOffset``), little-endian and row-major, in packed order. ``md5sum`` is
for downloaders.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from typing import TYPE_CHECKING, Any, BinaryIO, Self

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

SHARD_BYTES = 32 * 2**20  # the loader reads a shard at once


class TensorCacheWriter:
    """Streams tensors into ``folder``; as a context manager, it removes the folder if an exception leaves it.

    A tensor larger than ``shard_bytes`` gets a shard of its own. Nothing is readable as a cache before
    :meth:`finish`, which writes tensor-cache.json last.
    """

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        folder.mkdir()
        self.folder = folder
        self.shard_bytes = shard_bytes
        self.nbytes = 0
        self._shards: list[dict[str, Any]] = []
        self._file: BinaryIO | None = None
        self._md5 = hashlib.md5(usedforsecurity=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            try:
                if self._file:
                    self._file.close()  # may fail again on a full disk
            finally:
                shutil.rmtree(self.folder, ignore_errors=True)

    def add(self, name: str, array: np.ndarray) -> None:
        """Append one tensor."""
        array = np.ascontiguousarray(array)
        file, shard = self._shard_for(array.nbytes)
        data = array.reshape(-1).view(np.uint8).data
        file.write(data)
        self._md5.update(data)
        record = {"name": name, "shape": [*array.shape], "dtype": str(array.dtype), "format": "raw"}
        shard["records"].append({**record, "nbytes": array.nbytes, "byteOffset": shard["nbytes"]})
        shard["nbytes"] += array.nbytes
        self.nbytes += array.nbytes

    def finish(self, metadata: Mapping[str, Any]) -> None:
        """Close the last shard and write tensor-cache.json with ``metadata``."""
        self._close_shard()
        text = json.dumps({"metadata": dict(metadata), "records": self._shards}, allow_nan=False, indent=1) + "\n"
        (self.folder / "tensor-cache.json").write_text(text, encoding="utf-8")

    def _shard_for(self, nbytes: int) -> tuple[BinaryIO, dict[str, Any]]:
        """Return the open shard with room for ``nbytes`` more, starting a new one if there is none."""
        if self._file is None or self._shards[-1]["nbytes"] + nbytes > self.shard_bytes:
            self._close_shard()
            path = f"params_shard_{len(self._shards)}.bin"
            self._file = (self.folder / path).open("wb")
            self._md5 = hashlib.md5(usedforsecurity=False)
            self._shards.append({"dataPath": path, "format": "raw-shard", "nbytes": 0, "records": [], "md5sum": ""})
        return self._file, self._shards[-1]

    def _close_shard(self) -> None:
        if self._file is not None:
            self._file.close()
            self._shards[-1]["md5sum"] = self._md5.hexdigest()
            self._file = None
