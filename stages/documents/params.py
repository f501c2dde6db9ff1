"""What param-register writes: params.json, every parameter of the graph and the tensors it is stored as."""

from __future__ import annotations

from typing import NotRequired, TypedDict

from stages.documents.model import CheckpointTensors


class StoredRow(TypedDict):
    """How a quantized matrix is stored: the fields of stages.quantization.rows:Row."""

    kind: str
    bits: int
    group_size: int
    scale_dtype: str
    minimum: bool
    levels: bool


class StoredTensor(TypedDict):
    """A tensor as it is stored and packed: ``of`` names its parameter."""

    name: str
    shape: list[int]
    dtype: str
    of: str


class Parameter(TypedDict):
    """A parameter of the graph: ``sources`` are the checkpoint's tensors that ``transform`` makes it of, of
    ``source_shapes``, and ``source_names`` the model's names of them. ``layout`` is how a matrix lies in memory;
    ``stored`` names the tensors that hold it; ``quantize`` is the row that they are of, null for floats of ``dtype``.
    ``reads`` names the norm whose result a matrix reads, where such matrices alone do.
    """

    name: str
    shape: list[int]
    kind: str
    sources: list[str]
    source_names: list[str]
    source_shapes: list[list[int]]
    transform: str
    quantize: StoredRow | None
    dtype: str
    layout: str
    stored: list[str]
    reads: NotRequired[str]


class Register(TypedDict):
    """params.json: ``params`` are the stored tensors in packed order, ``logical`` the parameters of the graph."""

    schema: int
    family: str
    scheme: str
    target: str
    layout: str
    params: list[StoredTensor]
    logical: list[Parameter]


class RegisterDocuments(TypedDict, total=False):
    """params.json and, where it is known, tensors.json, by port."""

    params: Register
    tensors: CheckpointTensors
