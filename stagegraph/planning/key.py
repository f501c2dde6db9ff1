"""The key: digest of one document that holds everything that may influence a node's outputs, and nothing else.

Hashed: stage id and version, code, the libraries it imports, parameters, the content of sources, the content of
inputs, tool versions.
Not hashed: node name, pipeline, paths, times, host, resources, timeout, log level. The document is stored with the
result, so that "why did this run" is the difference between two documents.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from stagegraph.stage import Json, Secret

if TYPE_CHECKING:
    from stagegraph.planning.sources import SourceState
    from stagegraph.stage import Stage
    from stagegraph.store.record import Document

KEY_SCHEMA = 1
SHOWN = "***"  # in place of a secret


def key_document(
    stage: Stage,
    params: Any,
    sources: Mapping[str, SourceState],
    inputs: Mapping[str, list[tuple[Mapping[str, str], str]]],
    code: Mapping[str, str],
    tools: Mapping[str, str],
    libraries: Mapping[str, str],
) -> Document:
    """Return the key document; ``inputs`` is port -> (``foreach`` values, artifact digest) of each instance.

    It has ``libraries`` only where there are any, so that what imports none keeps its key.
    """
    document: Document = {
        "schema": KEY_SCHEMA,
        "stage": stage.id,
        "version": stage.version,
        "params": hashed_params(params),
        "sources": {name: state.digests for name, state in sources.items()},
        "inputs": {
            port: sorted(([dict(each), digest] for each, digest in found), key=lambda item: sorted(item[0].items()))
            if stage.inputs[port].many
            else found[0][1]
            for port, found in inputs.items()
        },
        "code": dict(code),
        "tools": dict(tools),
    }
    return {**document, "libraries": dict(libraries)} if libraries else document


def hashed_params(params: Any) -> dict[str, Json]:
    """Return the parameters that enter the key by value: neither sources nor those declared ``hashed=False``."""
    return {name: getattr(params, name) for name in _hashed_names(params.__class__)}


@functools.cache
def _hashed_names(params: Any) -> list[str]:
    fields = dataclasses.fields(params)
    return [f.name for f in fields if f.metadata.get("hashed", True) and "include" not in f.metadata]


@functools.cache
def names_of(params: Any) -> list[str]:
    """Return the names of the parameters of a ``Params`` class."""
    return [field.name for field in dataclasses.fields(params)]


def secrets_of(params: Any) -> list[Secret]:
    """Return the values among a stage's parameters that are secret."""
    values = [getattr(params, name) for name in names_of(params.__class__)]
    flat = [part for value in values for part in (value if isinstance(value, tuple | list) else [value])]
    return [value for value in flat if isinstance(value, Secret)]
