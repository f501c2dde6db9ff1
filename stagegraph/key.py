"""The key: digest of one document that holds everything that may influence a node's outputs, and nothing else.

Hashed: stage id and version, code, parameters, the content of sources, the content of inputs, tool versions.
Not hashed: node name, pipeline, paths, times, host, resources, timeout, log level. The document is stored with the
result, so that "why did this run" is the difference between two documents.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from stagegraph.digest import digest_json

if TYPE_CHECKING:
    from stagegraph.sources import SourceState
    from stagegraph.stage import Stage

KEY_SCHEMA = 1
Document = dict[str, Any]


def key_document(
    stage: Stage,
    params: Any,
    sources: Mapping[str, SourceState],
    inputs: Mapping[str, list[tuple[Mapping[str, str], str]]],
    code: Mapping[str, str],
    tools: Mapping[str, str],
) -> Document:
    """Return the key document; ``inputs`` is port -> (``foreach`` values, artifact digest) of each instance."""
    return {
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


def hashed_params(params: Any) -> dict[str, Any]:
    """Return the parameters that count by value: not sources, not those declared ``hashed=False``."""
    fields = dataclasses.fields(params)
    return {
        f.name: getattr(params, f.name)
        for f in fields
        if f.metadata.get("hashed", True) and "include" not in f.metadata
    }


def key_of(document: Document) -> str:
    """Return the key: the digest of the document."""
    return digest_json(document)


def artifact_digest(files: Mapping[str, list[Any]]) -> str:
    """Return the digest that identifies one output: of its manifest, file name -> content digest."""
    return digest_json({name: entry[0] for name, entry in files.items()})


def differences(old: Document, new: Document) -> list[str]:
    """Say in a few words each what differs between two key documents, most telling first."""
    if (old["stage"], old["version"], old["schema"]) != (new["stage"], new["version"], new["schema"]):
        return [f"stage {old['stage']} v{old['version']} -> {new['stage']} v{new['version']}"]
    found = [f"{name}: {_show(a)} -> {_show(b)}" for name, a, b in _changed(old["params"], new["params"])]
    for source in sorted({*old["sources"], *new["sources"]}):
        files = [name for name, _, _ in _changed(old["sources"].get(source, {}), new["sources"].get(source, {}))]
        found += [f"{source} {name} changed" for name in files]
    found += [f"input {port} changed" for port, _, _ in _changed(old["inputs"], new["inputs"])]
    found += [f"code {name} changed" for name, _, _ in _changed(old["code"], new["code"])]
    found += [f"{name} {_show(a)} -> {_show(b)}" for name, a, b in _changed(old["tools"], new["tools"])]
    return found


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    names = sorted({*old, *new})
    return [(name, old.get(name), new.get(name)) for name in names if _plain(old.get(name)) != _plain(new.get(name))]


def _plain(value: Any) -> Any:
    """A document read back from JSON has lists where a fresh one has tuples."""
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value


def _show(value: Any) -> str:
    if isinstance(value, tuple | list):
        return "[" + ", ".join(str(item) for item in value) + "]"
    return "none" if value is None else str(value)
