"""What graph-build writes beside the module: graph.json, the signatures of a graph and the sizes it is bounded by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypedDict


class Signature(TypedDict):
    """Names and types of a function's arguments, and its result's type."""

    inputs: list[tuple[str, str]]
    output: str


class ModelSizes(TypedDict):
    """What all graphs of one library agree on; of a recurrent model ``kv_dtype``, ``page_size`` and ``verify_chunk``
    are None.
    """

    attention_thread_bytes: int
    cache_bytes_per_token: int
    cache_workspace_bytes: int
    compute_dtype: str
    context_window: int
    family: str
    hidden_size: int
    kv_dtype: str | None
    max_batch: int
    num_layers: int
    page_size: int | None
    prefill_chunk: int
    scheme: str
    sep_embed: bool
    state: str
    state_bytes: int
    verify_chunk: int | None
    vocab_size: int


class Graph(ModelSizes):
    """graph.json: ``functions`` by name, with counts of their ``operators``; ``kernels`` are names."""

    schema: int
    target: str
    functions: Mapping[str, Signature]
    operators: Mapping[str, Mapping[str, int]]
    kernels: Sequence[str]
