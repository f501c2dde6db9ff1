"""What a checkpoint's tensors are to the model that config.json describes; of the weights, doubtful ones are read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from stages.checkpoint.errors import ConfigError
from stages.checkpoint.headers import Headers, listed, same_values
from stages.checkpoint.quantized import adapter
from stages.checkpoint.stored import NUMPY_DTYPES
from stages.checkpoint.tensors import Weights
from stages.models.naming import leftovers, resolve

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from stages.models.family import Family
    from stages.models.naming import Naming


@dataclass(frozen=True)
class MatchedCheckpoint:
    """``config`` is the model's, untied where the checkpoint holds another head. ``names`` are the model's names ->
    the checkpoint's, of those that differ; ``unused`` tensors -> why no parameter is made of them.
    """

    config: Any
    names: Mapping[str, str]
    unused: Mapping[str, str]
    notes: Sequence[str]


def match(family: Family, config: Any, files: Mapping[str, Path], headers: Headers) -> MatchedCheckpoint:
    """Match a checkpoint's tensors with the model's; :class:`ConfigError` in one line where none can be."""
    tensors = headers.tensors
    adapting = adapter(tensors)
    if adapting:
        raise ConfigError(
            f"tensor {adapting} is of an adapter (LoRA), which changes the weights beside it: merge it into its base "
            "model (peft: merge_and_unload) and save that"
        )
    if config.num_layers > len(tensors):  # checked before parameters are listed
        raise ConfigError(
            f"config.json asks for {config.num_layers:,} layers, but the checkpoint has only {len(tensors):,} "
            "tensors; one of them belongs to another model"
        )
    config = family.stored_as(config, tensors)
    naming = resolve(family, config, tensors)
    if naming.problem:
        raise ConfigError(naming.problem)
    notes = [*headers.notes, *naming.notes]
    config = _with_stored_head(family, config, naming, files, headers, notes)
    left = leftovers(family, config, naming, tensors)
    weights = Weights(files, headers.table())
    zeros = [name for name in left.within if name.endswith(".bias") and _is_zero(weights, name, headers)]
    unused = dict.fromkeys(left.derived, "the model derives it")
    unused |= dict.fromkeys(left.beside, "the model has no such part")
    unused |= dict.fromkeys(zeros, "a bias of zeros")
    if left.beside:
        wrapper = getattr(config, "wrapper", "")
        why = f": of {wrapper} only the text model is built" if wrapper else ", as transformers does"
        notes.append(
            f"{len(left.beside):,} tensors are of no part of a {family.name} model and are left out{why}: "
            f"{listed(left.beside)}"
        )
    if left.layers:
        unused |= {name: "a layer beyond the model's" for names in left.layers.values() for name in names}
        notes.append(_beyond(left.layers, config.num_layers))
    if zeros:
        notes.append(f"{len(zeros):,} biases that config.json does not have are zero and left out: {listed(zeros)}")
    doubles = [name for name, (_, info) in tensors.items() if info.dtype == "F64" and name not in unused]
    if doubles:
        notes.append(
            f"{len(doubles):,} tensors are float64 and read as float32, as transformers does: {listed(doubles)}"
        )
    return MatchedCheckpoint(config, naming.names, unused, notes)


def _with_stored_head(
    family: Family, config: Any, naming: Naming, files: Mapping[str, Path], headers: Headers, notes: list[str]
) -> Any:
    """Return ``config``, untied where the checkpoint stores another head than the embedding: transformers does so."""
    if not family.tied or not config.tied:
        return config
    head, embedding = (naming.stored(name) for name in family.tied)
    if head == embedding or not {head, embedding} <= headers.tensors.keys():
        return config
    if {head, embedding} & headers.packed.keys():
        weights = Weights(files, headers.table())
        same = np.array_equal(weights[head], weights[embedding])
    else:
        (file, info), (other_file, other) = (headers.tensors[name] for name in (head, embedding))
        same = same_values(files[file], info, files[other_file], other)
    if same:
        return config
    notes.append(
        f"config.json: tie_word_embeddings is true, but the checkpoint holds a {head} that is not {embedding}: it is "
        "taken as it is, as transformers does; set tie_word_embeddings to false to say so"
    )
    return replace(config, tied=False)


def _beyond(layers: Mapping[int, Sequence[str]], count: int) -> str:
    first, last = min(layers), max(layers)
    which = f"layer {first}" if first == last else f"layers {first} to {last}"
    return (
        f"{which} of the checkpoint ({sum(map(len, layers.values())):,} tensors) are not read, as transformers does: "
        f"config.json's num_hidden_layers is {count}"
    )


def _is_zero(weights: Weights, name: str, headers: Headers) -> bool:
    _, info = headers.tensors[name]
    readable = info.dtype in NUMPY_DTYPES and info.nbytes
    return bool(readable) and not any(block.any() for block in weights.blocks(name))
