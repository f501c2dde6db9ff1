"""What config-parse writes: model.json, generation.json and tensors.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict


class Model(TypedDict):
    """model.json: ``config`` are the fields of the family's config dataclass."""

    schema: int
    family: str
    architecture: str
    config: Mapping[str, Any]
    context_window: int
    vocab_size: int
    hidden_size: int
    num_layers: int


class Generation(TypedDict):
    """generation.json: special token ids, what ends a text, the chat format and the sampling defaults."""

    schema: int
    bos: int | None
    eos: list[int]
    pad: int | None
    stop: list[int]
    chat_format: str | None
    sampling: Mapping[str, float | bool]


class CheckpointTensor(TypedDict):
    """A tensor of a checkpoint: its safetensors dtype, shape and file."""

    dtype: str
    shape: list[int]
    file: str


class CheckpointTensors(TypedDict):
    """tensors.json: ``names`` are the model's names -> the checkpoint's, of those that differ; ``unused`` tensors ->
    why no parameter is made of them.
    """

    schema: int
    tensors: Mapping[str, CheckpointTensor]
    names: Mapping[str, str]
    unused: Mapping[str, str]
