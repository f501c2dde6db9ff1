"""``pipeline show param-register --tensor NAME``: follows a tensor from the checkpoint to the parameter it becomes.

Read from params.json and tensors.json alone; no array and no library of arrays is loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stages.quantization.rows import Row

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from stages.documents.files import JsonObject
    from stages.documents.model import CheckpointTensor
    from stages.documents.params import Parameter, RegisterDocuments

# What the rows of stages.models.transforms:TRANSFORMS do, in words.
HOW = {
    "copy": "as it is",
    "scalar": "as one value",
    "concat0": "one under the other",
    "stacked_copy": "its matrices one under the other",
    "stacked_transpose": "the transposes of its matrices one under the other",
    "transpose": "columns become rows",
    "interleaved_qkv": "rows that go head by head, each with its q, k and v, become all q, all k, all v",
}


def names(documents: RegisterDocuments) -> set[str]:
    """Return every name that :func:`find` knows: of parameters, of stored tensors, of checkpoint tensors."""
    logical = documents["params"]["logical"]
    made = {name for entry in logical for name in (entry["name"], *entry["stored"], *entry["sources"])}
    return made | set(_headers(documents))


def find(documents: RegisterDocuments, name: str) -> JsonObject | None:
    """Return the facts about the tensor or parameter ``name``, None if there is none of that name.

    ``parameter`` is there if a parameter or a tensor it is stored as has that name, ``checkpoint`` if a checkpoint
    tensor has; of one that is copied, both. ``documents`` are params.json under ``params`` and, where it is known,
    tensors.json under ``tensors``.
    """
    logical, headers = documents["params"]["logical"], _headers(documents)
    entry = next((entry for entry in logical if name == entry["name"] or name in entry["stored"]), None)
    feeds = [entry for entry in logical if name in entry["sources"]]
    found: dict[str, Any] = {}
    if entry:
        found["parameter"] = _parameter(documents, entry)
    if feeds or name in headers:
        shapes = [shape for entry in feeds for shape in _shapes(entry, name)]
        header = headers.get(name, {"shape": shapes[0]} if shapes else {})
        made = [_parameter(documents, entry) for entry in feeds]
        unused = documents["tensors"]["unused"].get(name) if "tensors" in documents else None
        found["checkpoint"] = {"name": name, **header, "feeds": made, **({"unused": unused} if unused else {})}
    return found or None


def page(found: JsonObject) -> str:
    """Render the result of :func:`find`."""
    lines: list[str] = []
    if "parameter" in found:
        parameter = found["parameter"]
        lines += [f"parameter {parameter['name']} {parameter['shape']}, {parameter['kind']}"]
        lines += [*_stored_lines(parameter), *_source_lines(parameter)]
    if "checkpoint" in found:
        tensor = found["checkpoint"]
        lines += ["", _checkpoint_line(tensor)] if lines else [_checkpoint_line(tensor)]
        lines += [line for parameter in tensor["feeds"] for line in _feed_lines(parameter, tensor["name"])]
        if not tensor["feeds"]:
            lines.append(f"  feeds no parameter: {tensor.get('unused', 'the model does not read it')}")
    return "\n".join(lines)


def _headers(documents: RegisterDocuments) -> Mapping[str, CheckpointTensor]:
    return documents["tensors"]["tensors"] if "tensors" in documents else {}


def _shapes(entry: Parameter, name: str) -> Iterator[list[int]]:
    return (s for source, s in zip(entry["sources"], entry["source_shapes"], strict=True) if source == name)


def _parameter(documents: RegisterDocuments, entry: Parameter) -> JsonObject:
    """Return one parameter with the tensors it is stored as, and those it is made of."""
    headers, packed = _headers(documents), documents["params"]["params"]
    places = {param["name"]: place for place, param in enumerate(packed)}
    transform = entry["transform"].partition(":")[0]
    sources, row = [], 0
    for name, shape in zip(entry["sources"], entry["source_shapes"], strict=True):
        source = {"name": name, "shape": shape, **{k: v for k, v in headers.get(name, {}).items() if k != "shape"}}
        if transform == "concat0":
            source["rows"] = [row, row + shape[0]]
            row += shape[0]
        sources.append(source)
    return {
        **{key: entry[key] for key in ("name", "shape", "kind", "transform")},
        "how": HOW.get(transform, transform),
        "quantized": Row(**entry["quantize"]).name if entry["quantize"] else None,
        "stored": [
            {"place": places[name], **{key: packed[places[name]][key] for key in ("name", "dtype", "shape")}}
            for name in entry["stored"]
        ],
        "sources": sources,
    }


def _stored_lines(parameter: JsonObject) -> list[str]:
    scheme = f"quantized as {parameter['quantized']}" if parameter["quantized"] else "not quantized"
    lines = [f"  stored, {scheme}, as"]
    lines += [
        f"    {part['name']}  {part['dtype']} {part['shape']}, packed at {part['place']}"
        for part in parameter["stored"]
    ]
    return lines


def _source_lines(parameter: JsonObject) -> list[str]:
    lines = [f"  made, {parameter['transform']} ({parameter['how']}), of"]
    for source in parameter["sources"]:
        rows = f", rows {source['rows'][0]} to {source['rows'][1] - 1}" if "rows" in source else ""
        lines.append(f"    {source['name']}  {_described(source)}{rows}")
    return lines


def _feed_lines(parameter: JsonObject, name: str) -> list[str]:
    rows = [
        f", rows {source['rows'][0]} to {source['rows'][1] - 1}"
        for source in parameter["sources"]
        if source["name"] == name and "rows" in source
    ]
    how = f"{parameter['transform']} ({parameter['how']})"
    stored = ", ".join(part["name"] for part in parameter["stored"])
    return [f"  feeds {parameter['name']} {parameter['shape']}{''.join(rows)}, {how}", f"    stored as {stored}"]


def _checkpoint_line(tensor: JsonObject) -> str:
    return f"checkpoint tensor {tensor['name']}  {_described(tensor)}"


def _described(tensor: JsonObject) -> str:
    where = f" in {tensor['file']}" if "file" in tensor else ""
    return f"{tensor.get('dtype', '')} {tensor['shape']}{where}".strip()
