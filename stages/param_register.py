"""param-register: every parameter the graph needs, how it is stored, and which checkpoint tensors it is made of."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stagegraph.stage import In, Out, Stage, StageError, param

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from stagegraph.stage import Context
    from stages.documents.model import CheckpointTensors, Model
    from stages.documents.params import Parameter, Register, StoredTensor
    from stages.models.family import Param
    from stages.quantization.schemes import Scheme


class ParamRegister(Stage):
    """Missing, unexpected and misshapen tensors fail here, all listed at once, before any weight is read."""

    id = "param-register"

    @dataclass(frozen=True)
    class Params:
        """Parameters."""

        scheme: str = param("quantization scheme", choices="stages.quantization.schemes:SCHEMES")
        target: str = param("what the bundle is built for", choices="stages.targets.table:TARGETS")

    inputs = {
        "config": In("config-parse", "config", "the model's family and sizes"),
        "tensors": In("config-parse", "tensors", "dtype and shape of the checkpoint's tensors"),
    }
    outputs = {"params": Out("params.json", "stored tensors in packed order, and where each comes from")}

    def rows(self, params: Params, facts: Mapping[str, Any]) -> dict[str, str | Sequence[str]]:
        """Return the model's family, the scheme and the target."""
        rows: dict[str, str | Sequence[str]] = {
            "stages.quantization.schemes:SCHEMES": params.scheme,
            "stages.targets.table:TARGETS": params.target,
        }
        if "family" in facts:
            rows["stages.models:FAMILIES"] = facts["family"]
        return rows

    def run(self, ctx: Context) -> None:
        """Compare what the family's graph needs with the headers, and write the register."""
        from stages.documents.files import write_json
        from stages.models import described
        from stages.problems import capped
        from stages.quantization.schemes import SCHEMES
        from stages.targets.table import TARGETS

        model: Model = json.loads(ctx.input("config").read_bytes())
        checkpoint: CheckpointTensors = json.loads(ctx.input("tensors").read_bytes())
        (family, config), scheme = described(model), SCHEMES[ctx.params.scheme]
        params = family.params(config)
        kinds = _check_tensors(params, checkpoint, model["vocab_size"])
        if any(kinds):
            raise StageError(*(problem for kind in kinds for problem in capped(kind)))

        layout = TARGETS[ctx.params.target].layout
        if layout == "nk" and any(row.levels for row in scheme.rows):
            raise StageError(
                f"scheme: {scheme.name} stores scales in two levels, for which target {ctx.params.target} has no "
                "schedule; q4a64 takes as many bits, q4a32 half a bit more"
            )
        stored: list[StoredTensor] = []
        logical: list[Parameter] = []
        for parameter in params:
            entry, parts = _entries(parameter, scheme, layout, checkpoint["names"])
            stored += parts
            logical.append(entry)
        document: Register = {
            "schema": 1,
            "family": model["family"],
            "scheme": scheme.name,
            "target": ctx.params.target,
            "layout": layout,
            "params": stored,
            "logical": logical,
        }
        write_json(ctx.out / "params.json", document)
        for name, value in (("family", model["family"]), ("scheme", scheme.name), ("target", ctx.params.target)):
            ctx.fact(name, value)
        ctx.view("params", _view(logical, stored))
        count = sum(math.prod(entry["shape"]) for entry in logical)
        ctx.summary(f"{count:,} parameters in {len(stored)} tensors as {scheme.name}")


def _check_tensors(
    params: Iterable[Param], checkpoint: CheckpointTensors, vocab_size: int
) -> tuple[list[str], list[str], list[str]]:
    """Return what the graph needs and the checkpoint lacks, has otherwise, and has beyond."""
    from stages.checkpoint.stored import NUMPY_DTYPES

    tensors, names = checkpoint["tensors"], checkpoint["names"]
    expected = {
        names.get(source, source): (shape, parameter)
        for parameter in params
        for source, shape in zip(parameter.sources, parameter.source_shapes, strict=True)
    }
    missing, wrong = [], []
    for name, (shape, parameter) in expected.items():
        found = tensors.get(name)
        if found is None:
            missing.append(f"tensor {name} {list(shape)} is missing from the checkpoint")
            continue
        if found["dtype"] not in NUMPY_DTYPES:
            wrong.append(f"tensor {name} is {found['dtype']}; only {', '.join(NUMPY_DTYPES)} can be read")
        if tuple(found["shape"]) != shape:
            rows = parameter.kind in ("embedding", "head") and found["shape"][1:] == list(shape[1:])
            reason = f": config.json says vocab_size = {vocab_size}" if rows else ""
            wrong.append(f"tensor {name} is {found['shape']}, the config asks for {list(shape)}{reason}")
    unexpected = [
        f"tensor {name} {found['shape']} is in the checkpoint, but no parameter of the model is made of it"
        for name, found in tensors.items()
        if name not in expected and name not in checkpoint["unused"]
    ]
    return missing, wrong, unexpected


def _entries(
    parameter: Param, scheme: Scheme, target: str, names: Mapping[str, str]
) -> tuple[Parameter, list[StoredTensor]]:
    """Return a parameter's entry and those of its stored tensors, in packed order, for kernels of layout ``target``.

    ``names`` are the model's names of tensors -> the checkpoint's, of those that differ.
    """
    from stages.quantization import layouts

    row, dtype = scheme.row(parameter.kind, parameter.shape[-1]), parameter.dtype or scheme.storage_dtype
    layout = layouts.of(target, parameter.kind, scheme, dtype, parameter.shape[-1])
    tensors: Sequence[tuple[str, tuple[int, ...], str]] = [(parameter.name, parameter.shape, dtype)]
    if row:
        stem = parameter.name.removesuffix("weight")
        n, k = parameter.shape
        tensors = [(f"{stem}{part}", shape, dtype) for part, shape, dtype in row.stored(n, k)]
    stored: list[StoredTensor] = [
        {"name": name, "shape": layouts.shape(layout, shape), "dtype": dtype, "of": parameter.name}
        for name, shape, dtype in tensors
    ]
    entry: Parameter = {
        "name": parameter.name,
        "shape": [*parameter.shape],
        "kind": parameter.kind,
        "sources": [names.get(name, name) for name in parameter.sources],
        "source_names": [*parameter.sources],
        "source_shapes": [[*shape] for shape in parameter.source_shapes],
        "transform": parameter.transform,
        "quantize": row.document() if row else None,
        "dtype": dtype,
        "layout": layout,
        "stored": [tensor["name"] for tensor in stored],
    }
    return entry, stored


def _view(logical: Sequence[Parameter], stored: Sequence[StoredTensor]) -> str:
    """Render the register: one line per parameter, with how it is stored and made."""
    layout = {entry["name"]: f"{entry['dtype']} {entry['shape']}" for entry in stored}
    lines = ["| parameter | shape | stored as | made of |", "|---|---|---|---|"]
    for entry in logical:
        kept = " + ".join(layout[name] for name in entry["stored"])
        made = "" if entry["transform"] == "copy" else f"{entry['transform']}: "
        lines.append(f"| {entry['name']} | {entry['shape']} | {kept} | {made}{', '.join(entry['sources'])} |")
    return "\n".join(lines) + "\n"
