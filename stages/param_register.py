"""param-register: every parameter the graph needs, how it is stored, and which checkpoint tensors it is made of."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stagegraph.stage import In, JsonObject, Out, Source, Stage, StageError, param, source

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from stagegraph.stage import Context
    from stages.documents.model import CheckpointTensors, ModelDocument
    from stages.documents.params import Parameter, Register, StoredTensor
    from stages.models.family import Param
    from stages.quantization.rows import Row
    from stages.quantization.schemes import Scheme


class ParamRegister(Stage):
    """List all parameters; report missing, unexpected and misshapen tensors at once, before any weight is read."""

    id = "param-register"

    @dataclass(frozen=True)
    class Params:
        """Parameters."""

        scheme: str = param("quantization scheme", choices="stages.quantization.schemes:SCHEMES")
        target: str = param("what the bundle is built for", choices="stages.targets.table:TARGETS")
        rows: Source = source(
            "a JSON file of parameters that are stored in the row of another scheme's body, as allocate writes it: "
            '{"rows": {"model.layers.0.mlp.down_proj.weight": "q5k"}}',
            include=("*.json",),
            optional=True,
        )

    inputs = {
        "config": In("config-parse", "config", "the model's family and sizes"),
        "tensors": In("config-parse", "tensors", "dtype and shape of the checkpoint's tensors"),
        "rows": In("allocate", "rows", "parameters that are stored in rows of their own", optional=True),
    }
    outputs = {"params": Out("params.json", "stored tensors in packed order, and where each comes from")}

    def rows(self, params: Params, facts: JsonObject) -> dict[str, str | Sequence[str]]:
        """Return the model's family, the scheme and the target."""
        rows: dict[str, str | Sequence[str]] = {"stages.targets.table:TARGETS": params.target}
        if not params.rows:  # a file may name any
            others = facts.get("rows")
            rows["stages.quantization.schemes:SCHEMES"] = [params.scheme, *others] if others else params.scheme
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

        model: ModelDocument = json.loads(ctx.input("config").read_bytes())
        checkpoint: CheckpointTensors = json.loads(ctx.input("tensors").read_bytes())
        (family, config), scheme = described(model), SCHEMES[ctx.params.scheme]
        params = family.params(config)
        kinds = _check_tensors(params, checkpoint, model["vocab_size"])
        if any(kinds):
            raise StageError(*(problem for kind in kinds for problem in capped(kind)))

        layout, own = TARGETS[ctx.params.target].layout, _own_rows(ctx, params)
        exact = {
            name
            for name, tensor in checkpoint["tensors"].items()
            if scheme.holds and tensor.get("packed", {}).get("called") == scheme.holds
        }
        leveled = [f"scheme: {scheme.name}"] if any(row.levels for row in scheme.rows) else []
        leveled += [f"rows: {name}" for name, row in own.items() if row and row.levels]
        if layout == "nk" and leveled:
            raise StageError(
                f"{leveled[0]} stores scales in two levels, for which target {ctx.params.target} has no "
                "schedule; q4a64 takes as many bits, q4a32 half a bit more"
            )
        stored: list[StoredTensor] = []
        logical: list[Parameter] = []
        for parameter in params:
            row = own.get(parameter.name, scheme.row(_kind(parameter, checkpoint["names"], exact), parameter.shape[-1]))
            entry, parts = _entries(parameter, scheme, row, layout, checkpoint["names"])
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


def _kind(parameter: Param, names: Mapping[str, str], exact: set[str]) -> str:
    """Return the kind whose row a parameter takes: of a checkpoint that has some tensors in the form that the scheme
    stores exactly, ``exact``, other linear layers take the embedding's.
    """
    other = (
        exact and parameter.kind == "linear" and not all(names.get(name, name) in exact for name in parameter.sources)
    )
    return "embedding" if other else parameter.kind


def _own_rows(ctx: Context, params: Iterable[Param]) -> dict[str, Row | None]:
    """Return the rows that parameters are stored in whatever the scheme says: those of the user's file, else those that
    were chosen for it.
    """
    from stages.problems import capped
    from stages.quantization.schemes import SCHEMES

    if ctx.params.rows:
        found = ctx.source("rows").files
        if len(found) != 1:
            raise StageError(f"rows: {ctx.params.rows}: name one .json file, found {len(found)}")
        path = next(iter(found.values()))
    elif ctx.has_input("rows"):
        path = ctx.input("rows")
    else:
        return {}
    try:
        named = json.loads(path.read_bytes())["rows"]
        given = {str(name): str(scheme) for name, scheme in named.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StageError(f'{path}: expected {{"rows": {{parameter: scheme}}}}: {error}') from None
    matrices = {each.name: each for each in params if each.kind in ("linear", "embedding", "head")}
    unknown = [f"rows: the model has no matrix {name}" for name in given if name not in matrices]
    unknown += [f"rows: {name}: there is no scheme {s}" for name, s in given.items() if s not in SCHEMES]
    if unknown:
        raise StageError(*capped(unknown))
    bodies = {name: SCHEMES[scheme].body for name, scheme in given.items()}
    return {name: body.fitting(matrices[name].shape[-1]) if body else None for name, body in bodies.items()}


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
    parameter: Param, scheme: Scheme, row: Row | None, target: str, names: Mapping[str, str]
) -> tuple[Parameter, list[StoredTensor]]:
    """Return a parameter's entry and those of its stored tensors, in packed order, for kernels of layout ``target``.

    ``row`` is what it is stored in, None for floats; ``names`` are the model's names of tensors -> the checkpoint's, of
    those that differ.
    """
    from stages.quantization import layouts

    dtype = parameter.dtype or scheme.storage_dtype
    layout = layouts.of(target, parameter.kind, scheme, row, dtype, parameter.shape[-1])
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
    if parameter.reads:
        entry["reads"] = parameter.reads
    return entry, stored


def _view(logical: Sequence[Parameter], stored: Sequence[StoredTensor]) -> str:
    """Render the register: one line per parameter, with how it is stored and made."""
    layout = {entry["name"]: f"{entry['dtype']} {entry['shape']}" for entry in stored}
    lines = ["| parameter | shape | stored as | made of |", "|---|---|---|---|"]
    for entry in logical:
        stored_as = " + ".join(layout[name] for name in entry["stored"])
        made = "" if entry["transform"] == "copy" else f"{entry['transform']}: "
        lines.append(f"| {entry['name']} | {entry['shape']} | {stored_as} | {made}{', '.join(entry['sources'])} |")
    return "\n".join(lines) + "\n"
