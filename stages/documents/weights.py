"""What quantize writes: report.json and the tensor-cache.json of TVM's format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypedDict

from stages.documents.params import StoredRow


class ErrorLine(TypedDict):
    """How a parameter is stored, and its error against the source: relative RMSE, and the largest over the largest.

    ``scheme`` says how in words, ``quantize`` and ``layout`` are those of params.json.
    """

    name: str
    kind: str
    scheme: str
    shape: list[int]
    quantize: StoredRow | None
    layout: str
    bytes: int
    source_dtype: str
    rmse: float
    max_error: float


class ErrorReport(TypedDict):
    """report.json: a line for each parameter, in packed order."""

    schema: int
    scheme: str
    scales: str
    tensors: list[ErrorLine]


class CachedTensor(TypedDict):
    """A tensor of a shard."""

    name: str
    shape: list[int]
    dtype: str
    format: str
    nbytes: int
    byteOffset: int


class Shard(TypedDict):
    """A file of tensors, back to back."""

    dataPath: str
    format: str
    nbytes: int
    records: list[CachedTensor]


class TensorCache(TypedDict):
    """tensor-cache.json."""

    metadata: Mapping[str, float]
    records: list[Shard]
