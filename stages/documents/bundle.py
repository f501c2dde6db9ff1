"""The documents of the stage bundle: bundle.json, and the documents of its inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypedDict

from stages.documents.files import JsonObject
from stages.documents.library import BuiltModel, Cpu, DeviceCode, Metadata
from stages.documents.model import GenerationDefaults, ModelDocument
from stages.documents.weights import TensorCache


class FileEntry(TypedDict):
    """A file of a bundle."""

    sha256: str
    size: int


class BundleDocument(TypedDict):
    """bundle.json but for its seal; what the loader checks before it loads anything."""

    schema: int
    name: str
    target: str
    machine: str
    tvm: Mapping[str, str]
    cpu: Cpu
    device_code: Sequence[DeviceCode]
    model: BuiltModel
    sampling: Mapping[str, float | bool]
    files: Mapping[str, FileEntry]


class TokenizerInfo(TypedDict):
    """The fields of tokenizer_info.json that are read here."""

    family: str
    fingerprint: str
    active_vocab_size: int
    bos: int | None
    pad: int | None
    prefix: list[int]
    stop: list[int]
    chat: JsonObject


class BundleParts(TypedDict):
    """The documents of the parts of one bundle."""

    metadata: Metadata
    config: ModelDocument
    generation: GenerationDefaults
    tokenizer_info: TokenizerInfo
    tensors: TensorCache
