"""What config-parse writes: model.json, generation.json and tensors.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NotRequired, TypedDict

from stages.documents.files import JsonObject


class RopeParameters(TypedDict, total=False):
    """transformers' rope_parameters with every number in place: no null, nothing left out but what a type ignores."""

    rope_type: str
    rope_theta: float
    factor: float
    original_max_position_embeddings: int
    attention_factor: float
    beta_fast: float
    beta_slow: float
    mscale: float
    mscale_all_dim: float
    truncate: bool
    low_freq_factor: float
    high_freq_factor: float
    short_factor: list[float]
    long_factor: list[float]


class RopeFields(TypedDict):
    """The fields of stages.models.rope:Rope but for max_positions."""

    rotary_dim: int
    rope_parameters: RopeParameters


class ModelDocument(TypedDict):
    """model.json: ``config`` are the fields of the family's config dataclass."""

    schema: int
    family: str
    architecture: str
    config: JsonObject
    context_window: int
    vocab_size: int
    hidden_size: int
    num_layers: int


class GenerationDefaults(TypedDict):
    """generation.json: special token ids, what ends a text, the chat format and the sampling defaults."""

    schema: int
    bos: int | None
    eos: list[int]
    pad: int | None
    stop: list[int]
    chat_format: str | None
    sampling: Mapping[str, float | bool]


class StoredPart(TypedDict):
    """A tensor as a file has it: its name, safetensors dtype and shape there, and the file."""

    name: str
    dtype: str
    shape: list[int]
    file: str


class Packed(TypedDict):
    """How the values of a tensor are computed from stored parts: ``form`` is the method, ``parts`` are its inputs, and
    ``settings`` what it must know beside them. ``called`` is what people call it.
    """

    form: str
    called: str
    parts: Mapping[str, StoredPart]
    settings: JsonObject


class CheckpointTensor(TypedDict):
    """A tensor of a checkpoint: its safetensors dtype, shape and file; ``packed`` where its values are not stored."""

    dtype: str
    shape: list[int]
    file: str
    packed: NotRequired[Packed]


class CheckpointTensors(TypedDict):
    """tensors.json: ``names`` are the model's names -> the checkpoint's, of those that differ; ``unused`` tensors ->
    why no parameter is made of them.
    """

    schema: int
    tensors: Mapping[str, CheckpointTensor]
    names: Mapping[str, str]
    unused: Mapping[str, str]
