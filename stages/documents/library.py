"""The documents of the stage compile: metadata.json, most of which the library itself returns, too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypedDict

from stages.documents.graph import ModelSizes


class BuiltModel(ModelSizes):
    """The model that a library was built for: ``layout`` is the target's, ``activations`` float or int8."""

    layout: str
    activations: str


class BuiltTarget(TypedDict):
    """The parameters of compile that make code: ``archs`` are GPU architectures, 80 being sm_80."""

    target: str
    opt: int
    archs: Sequence[int]
    fast_math: bool
    cuda_graph: bool
    activations: str


class Cpu(TypedDict):
    """The processor of the host code, by LLVM's names."""

    mcpu: str
    features: list[str]


class Compiler(TypedDict):
    """A compiler: ``kind`` is where it comes from, ``packages`` the distributions it is made of with their versions."""

    kind: str
    version: str
    packages: Mapping[str, str]


class LibraryParam(TypedDict):
    """A tensor that the library takes, in packed order."""

    name: str
    shape: list[int]
    dtype: str


class DeviceCode(TypedDict):
    """An entry of device code: ``kind`` elf or ptx, for architecture ``arch``."""

    kind: str
    arch: int


class Described(TypedDict):
    """The metadata of a library that are known before it is built."""

    schema: int
    target: BuiltTarget
    cpu: Cpu
    toolchain: Mapping[str, Compiler]
    tools: Mapping[str, str]
    functions: list[str]
    params: list[LibraryParam]
    model: BuiltModel


class DeviceContents(TypedDict):
    """The device code in a library, and the figures of its kernels by architecture and name."""

    device_code: Sequence[DeviceCode]
    device_kernels: Mapping[str, Mapping[str, Mapping[str, int]]]


class Metadata(Described, DeviceContents):
    """metadata.json: ``memory`` is planned bytes by function, ``kernels`` are names, the device's if it has any."""

    memory: Mapping[str, int]
    kernels: list[str]
