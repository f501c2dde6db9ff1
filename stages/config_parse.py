"""config-parse: config.json, generation_config.json and the tensors' headers -> one validated, typed description."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stagegraph.stage import JsonObject, Out, Source, Stage, StageError, dist_versions, param, source

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from stagegraph.stage import Context, SourceFiles
    from stages.checkpoint.headers import Headers
    from stages.checkpoint.safetensors import TensorInfo
    from stages.documents.model import CheckpointTensors, GenerationDefaults, ModelDocument
    from stages.models.family import Family

CONFIG, GENERATION = "config.json", "generation_config.json"
OTHER_CONFIG = re.compile(r"config\.(.+)\.json")  # what transformers of such a version reads in its place
RELEASE = re.compile(r"(\d+(?:\.\d+)*?)(?:\.0)*(?:\.dev.*|rc.*)?")  # of a version, without zeros at its end
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
GRAPHS = ("parts", "parameters", "constants", "older")  # of a traced model's config, too long to be shown
SHOWN = 80  # characters of a key or a value in the view


class ConfigParse(Stage):
    """config.json read as transformers does, every contradiction reported; of the weights a doubtful head is read."""

    id = "config-parse"

    @dataclass(frozen=True)
    class Params:
        """Parameters."""

        checkpoint: Source = source(
            "checkpoint directory in Hugging Face format, or a GGUF file",
            include=(CONFIG, GENERATION, *WEIGHTS),
            alone=("*.gguf",),
        )
        context_window: int = param("positions to build for; 0: all the model was made for", default=0, minimum=0)
        frontend: str = param(
            "native: by a family of this project; traced: from transformers' modelling code, which needs torch (the "
            "extra trace); auto: native where there is a family for the model_type",
            default="auto",
            choices=("auto", "native", "traced"),
        )

    outputs = {
        "config": Out("model.json", "family, architecture, sizes and options of the model"),
        "generation": Out("generation.json", "special token ids, chat format and sampling defaults"),
        "tensors": Out("tensors.json", "dtype, shape and file of every tensor in the checkpoint"),
    }

    def resolve(self, params: Params) -> Params:
        """Name the front end of the model_type that config.json says."""
        from stages.models import native

        if params.frontend != "auto":
            return params
        traced = [name for name in _model_types(params) if not native(name)]
        return replace(params, frontend="traced" if traced else "native")

    def tools(self, params: Params) -> Mapping[str, str]:
        """Name what a model is traced with, and what reads a GGUF file's weights; else nothing but this project."""
        from stages.checkpoint import gguf

        traced = ("torch", "transformers") if params.frontend == "traced" else ()
        return dist_versions(*traced, *(["gguf"] if gguf.is_named(params.checkpoint) else []))

    def rows(self, params: Params, facts: JsonObject) -> dict[str, str | Sequence[str]]:  # noqa: ARG002
        """Return the one family of the model that config.json names, if it names a known one."""
        from stages.models import TRACED, native

        if params.frontend == "traced":
            return {"stages.models:FAMILIES": TRACED}
        named = [name for name in _model_types(params) if native(name)]
        return {"stages.models:FAMILIES": named} if named else {}

    def run(self, ctx: Context) -> None:
        """Read and check everything, raise all problems at once, write the three documents."""
        import tempfile  # and all kinds of archives with it

        with tempfile.TemporaryDirectory(dir=ctx.out) as folder:
            _parse(ctx, ctx.source("checkpoint"), Path(folder))


def _parse(ctx: Context, checkpoint: SourceFiles, folder: Path) -> None:
    from stages.checkpoint.errors import ConfigError
    from stages.checkpoint.headers import Headers
    from stages.documents.files import write_json
    from stages.models import TRACED, load_family, matching

    given, files = _files(checkpoint, folder)
    raw = _read_config(ctx.params, given, files)
    family = load_family(row := TRACED if ctx.params.frontend == "traced" else raw["model_type"])
    problems: list[str] = []
    config: Any = None
    headers = Headers({}, ())
    generation: GenerationDefaults | None = None
    window, note = 0, ""
    try:
        config = family.parse(raw)
        window = family.context_window(config, ctx.params.context_window)
        config, note = family.for_context(config, window)
        family = family.of(family, config)
    except ConfigError as error:
        problems += error.problems
    try:
        headers = _headers(given, files)
    except ConfigError as error:
        problems += error.problems
    packed = _quantized(ctx, raw, headers)
    problems += packed
    try:
        generation = _generation(ctx, raw, files, config.vocab_size if config else 0)
    except ConfigError as error:
        problems += error.problems
    found = None
    try:
        if config and headers.tensors and not packed:
            found = matching.match(family, config, files, headers)
    except ConfigError as error:
        problems += error.problems
    if problems or found is None or generation is None:
        raise StageError(*(f"{given}: {problem}" for problem in problems))

    config = found.config
    for text in [*found.notes, *([note] if note else [])]:
        ctx.warn(text)
    tensors, model = headers.tensors, _model(row, family, config, window)
    write_json(ctx.out / "model.json", model)
    write_json(ctx.out / "generation.json", generation)
    listing: CheckpointTensors = {
        "schema": 1,
        "tensors": headers.table(),
        "names": found.names,
        "unused": found.unused,
    }
    write_json(ctx.out / "tensors.json", listing)
    ctx.fact("family", row)
    ctx.fact("state", family.state)
    ctx.view("config", _view(family, raw, model, tensors))
    size = sum(info.nbytes for _, info in tensors.values())
    ctx.summary(f"{family.name}, {config.num_layers} layers, {len(tensors)} tensors, {size / 1e6:,.1f} MB")


def _files(checkpoint: SourceFiles, folder: Path) -> tuple[Path, dict[str, Path]]:
    """Return what messages call the checkpoint, and its files at the top by name; of GGUF files those that their
    metadata stand for, written to ``folder``.
    """
    from stages.checkpoint.errors import ConfigError
    from stages.checkpoint.gguf.folder import files_of, write

    whole = files_of(checkpoint.files)
    if not whole:
        return checkpoint.root, {name: path for name, path in checkpoint.files.items() if "/" not in name}
    try:
        return next(iter(whole.values())), {**write(whole, folder), **whole}
    except ConfigError as error:
        raise StageError(*(f"{checkpoint.root}: {problem}" for problem in error.problems)) from None


def _model(row: str, family: Family, config: Any, window: int) -> ModelDocument:
    """Return the document that describes the model."""
    return {
        "schema": 1,
        "family": row,
        "architecture": family.architectures[0],
        "config": asdict(config),
        "context_window": window,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_layers": config.num_layers,
    }


def _model_types(params: Any) -> list[Any]:
    """Return what config.json says, or what a GGUF file may be; [] where it cannot be read."""
    from stages.checkpoint import strict_json

    if Path(params.checkpoint).is_file():
        from stages.checkpoint.gguf import config

        return [*config.model_types(Path(params.checkpoint))]
    path = Path(params.checkpoint) / CONFIG
    try:
        named = strict_json.read_object(path, CONFIG).get("model_type") if path.is_file() else None
    except (OSError, ValueError):
        return []
    return [] if named is None else [named]


def _read_instead(named: Any, installed: str) -> list[Any]:
    """Return those of ``configuration_files`` that transformers, of the version ``installed``, may read in the place of
    config.json: of its own version and earlier ones; of any where versions cannot be compared.
    """

    def release(version: str) -> list[int] | None:
        found = RELEASE.fullmatch(version)
        return [*map(int, found[1].split("."))] if found else None

    here, others = release(installed), []
    for name in named if isinstance(named, list) else ():
        if found := OTHER_CONFIG.fullmatch(str(name)):
            there = release(found[1])
            if here is None or there is None or there <= here:
                others.append(name)
    return others


def _read_config(params: Any, root: Path, files: Mapping[str, Path]) -> JsonObject:
    """Return config.json, of a model_type and architecture that are known."""
    from stages.checkpoint import foreign, strict_json
    from stages.checkpoint.gguf.folder import file_of

    given = params.checkpoint
    if Path(given).is_file() and not file_of(files):
        raise StageError(
            f"{given} is a file; "
            + (foreign.described([Path(given).name]) or f"checkpoint names the folder that holds {CONFIG}: {root}")
        )
    if CONFIG not in files:
        instead = _in_place(root, "expected a checkpoint directory in Hugging Face format")
        raise StageError(f"{root}: no {CONFIG} there; {instead}")
    try:
        raw = strict_json.read_object(files[CONFIG], CONFIG)
    except ValueError as error:
        raise StageError(f"{root}: {error}") from None
    if others := _read_instead(raw.get("configuration_files"), dist_versions("transformers")["transformers"]):
        shown = ", ".join(repr(name[:60]) for name in others[:3])
        raise StageError(
            f"{root}: {CONFIG}: configuration_files names {shown}, of which transformers may read one, by its own "
            f"version; save the one that is meant as {CONFIG}, without this key"
        )
    _check_type(raw, root, params.frontend)
    return raw


def _check_type(raw: JsonObject, root: Path, frontend: str) -> None:
    """Refuse a model_type that the front end does not know, or architectures of another model."""
    from stagegraph.errors import nearest
    from stages.checkpoint import strict_json
    from stages.models import FAMILIES, TRACED, load_family, native

    families = ", ".join(sorted(name for name in FAMILIES if name != TRACED))
    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        raise StageError(f"{root}: {CONFIG}: model_type is missing; known: {families}")
    if frontend == "traced":
        return
    if not native(model_type):
        named = strict_json.shown(model_type)
        raise StageError(
            f"{root}: {CONFIG}: no family for model_type {named}; known: {families}; frontend: traced builds it from "
            "transformers' modelling code if that knows it"
        )
    known = load_family(model_type).architectures
    found = raw.get("architectures") or [*known]
    names = found if isinstance(found, list) and all(isinstance(name, str) for name in found) else []
    if len(names) != 1 or names[0].lower() not in {name.lower() for name in known}:
        hint = nearest(names[0], known) if names else ""
        raise StageError(
            f"{root}: {CONFIG}: architectures = {_short(found)} of model_type '{model_type}'; "
            f"expected one of: {', '.join(known)}{hint if 'mean' in hint else ''}"
        )


def _quantized(ctx: Context, raw: JsonObject, headers: Headers) -> list[str]:
    """Return the problem of a checkpoint whose weights are packed in a way that is not read; a quantization_config
    alone is a leftover.
    """
    from stages.checkpoint import foreign, quantized
    from stages.checkpoint.strict_json import shown

    declared = raw.get("quantization_config")
    named = declared.get("quant_method") if isinstance(declared, dict) else declared
    tensors = headers.tensors
    found = quantized.form({name: at for name, at in tensors.items() if name not in headers.packed}, bool(declared))
    if found:
        method = f", as quantization_config of {CONFIG} says (quant_method {shown(named)})" if named else ""
        return [f"the weights are quantized by {found}{method}, which cannot be read; {foreign.UNQUANTIZED}"]
    if declared and tensors and not headers.packed:
        ctx.warn(
            f"{CONFIG}: quantization_config (quant_method {shown(named)}) is ignored: "
            f"none of the {len(tensors)} tensors is quantized"
        )
    return []


def _headers(root: Path, files: Mapping[str, Path]) -> Headers:
    """Return the tensors of the checkpoint in ``files``; ConfigError if there are none."""
    from stages.checkpoint import foreign
    from stages.checkpoint.errors import ConfigError
    from stages.checkpoint.gguf.folder import file_of
    from stages.checkpoint.headers import read_headers

    if not file_of(files) and not any(name.endswith(".safetensors") and foreign.are_weights(name) for name in files):
        raise ConfigError(_in_place(root, "no *.safetensors file with weights there"))
    headers = read_headers(files)
    if not headers.tensors:
        raise ConfigError("the *.safetensors files hold no tensors")
    return headers


def _in_place(root: Path, otherwise: str) -> str:
    """Say what is in a folder in place of a checkpoint and what to do with it, ``otherwise`` if it is nothing known."""
    from stages.checkpoint import foreign, misplaced

    if not root.is_dir():
        return otherwise
    return (
        misplaced.broken_links(root, (CONFIG, *WEIGHTS))
        or foreign.described(path.name for path in root.iterdir())
        or misplaced.checkpoints_below(root)
        or otherwise
    )


def _generation(ctx: Context, raw: JsonObject, files: Mapping[str, Path], vocab_size: int) -> GenerationDefaults:
    """Return the normalised generation defaults of generation_config.json, or else of config.json."""
    from stages.checkpoint import strict_json
    from stages.checkpoint.errors import ConfigError
    from stages.checkpoint.generation import normalise

    try:
        settings = strict_json.read_object(files[GENERATION], GENERATION) if GENERATION in files else {}
    except ValueError as error:
        raise ConfigError(str(error)) from None
    generation, notes = normalise(settings, raw, vocab_size)
    for note in notes:
        ctx.warn(note)
    return generation


def _view(family: Family, raw: JsonObject, model: ModelDocument, tensors: Mapping[str, tuple[str, TensorInfo]]) -> str:
    from stages.models import TRACED

    shown = {key: value for key, value in model["config"].items() if key not in GRAPHS}
    rows = [("model", ""), *((f"  {key}", value) for key, value in shown.items())]
    rows.append(("  context_window", model["context_window"]))
    # Of a traced model, transformers' class has read all of them, as what they are to it.
    traced = model["family"] == TRACED
    honoured = [key for key in sorted(raw) if traced or family.keys.get(key) == "honoured"]
    verb = "read by transformers:" if traced else "honoured"
    for title, keys in ((verb, honoured), ("ignored", sorted(raw.keys() - set(honoured)))):
        if keys:
            rows += [(f"{title} keys of {CONFIG}", ""), *((f"  {_short(key)[1:-1]}", _short(raw[key])) for key in keys)]
    dtypes = sorted({info.dtype for _, info in tensors.values()})
    rows += [("tensors", f"{len(tensors)} in {len({file for file, _ in tensors.values()})} files, {'/'.join(dtypes)}")]
    width = max(len(key) for key, _ in rows)
    return "\n".join(f"{key:<{width}}  {value}".rstrip() for key, value in rows) + "\n"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
