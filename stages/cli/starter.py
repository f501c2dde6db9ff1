"""A first pipeline file: what ``pipeline init`` and ``pipeline build`` write for a checkpoint, and for this machine."""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from stages.checkpoint.errors import ConfigError
from stages.checkpoint.gguf import folder, is_named
from stages.checkpoint.headers import read_headers
from stages.checkpoint.strict_json import read_object
from stages.models import load_family, native
from stages.quantization.schemes import SCHEMES, why_no_budget
from stages.sizes import DTYPE_BYTES
from stages.targets.table import TARGETS

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence

    from stages.checkpoint.headers import Headers, TensorTable
    from stages.documents.files import JsonObject
    from stages.quantization.schemes import Scheme

STAGES = Path(__file__).with_name("pipeline.yaml")  # the part that is the same for every checkpoint
WITHIN_BITS = Path(__file__).with_name("pipeline_bits.yaml")  # the same where rows are chosen within a budget of bits
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
READ, ALONE = ("config.json", *WEIGHTS), ("*.gguf",)  # what is read of a checkpoint that a URL names, and alone
PAGE = re.compile(r"https?://huggingface\.co/(?P<name>[\w.-]+/[\w.-]+)(?:/tree/(?P<revision>[\w.-]+))?/?")
POSITIONS = 4096  # a context that conversations fit, of models made for more: its cache is memory from the start
OFFERED = ("q0f32", "q0f16", "q8f16_1", "q4a32", "q4k", "q4f16_1")  # the schemes shown to choose from, best first
BESIDE = 1 << 30  # bytes that running a model takes beside its weights
DEFAULTS = {True: "q4k", False: "q4f16_1"}  # whether all targets compute on the processor -> scheme
# How weights are quantized already -> the scheme whose rows store them as they are.
EXACT = {"Q4_1": "q4a32", "Q8_0": "q8f16_1", **{each.holds: name for name, each in SCHEMES.items() if each.holds}}


class CheckpointSummary(NamedTuple):
    """The tensors of a checkpoint by its headers, the number of positions it was trained for, and the form that most
    of its weights are quantized in, empty if they are not.
    """

    tensors: TensorTable
    positions: int
    form: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options; without an option, an existing pipeline file keeps its value."""
    parser.add_argument("--targets", metavar="NAMES", help=f"separated by commas, of {_listed(TARGETS)}")
    parser.add_argument("--scheme", choices=list(SCHEMES), metavar="NAME", help="how weights are stored, as q4f16_1")
    parser.add_argument("--bits", type=float, metavar="N", help="choose rows by measured loss: N bits a weight, as 4.5")
    parser.add_argument("--context-window", type=int, metavar="N", help="positions to build for; 0: all there are")


def settings(args: argparse.Namespace) -> JsonObject:
    """Return the variables that the command line asks for; :class:`ValueError` for what no pipeline has."""
    targets = args.targets.split(",") if args.targets else None
    for target in targets or ():
        if target not in TARGETS:
            raise ValueError(f"--targets: unknown target '{target}'; known: {_listed(TARGETS)}")
    if (args.context_window or 0) < 0:
        raise ValueError(f"--context-window {args.context_window}: expected positions, or 0 for all there are")
    if args.bits is not None:
        _check_bits(args.bits, args.scheme, targets or ())
    options = {"targets": targets, "scheme": args.scheme, "bits": args.bits, "context_window": args.context_window}
    return {name: value for name, value in options.items() if value is not None}


def _check_bits(bits: float, scheme: str | None, targets: Sequence[str]) -> None:
    """Raise :class:`ValueError` for a number of bits, or what is asked for with it, that no choice of rows comes to."""
    if why := why_no_budget(bits):
        raise ValueError(f"--bits {why}")
    if scheme:
        raise ValueError(f"--scheme {scheme}, --bits {bits:g}: each says how matrices are stored; leave one out")
    for target in targets:
        if TARGETS[target].layout == "nk":
            raise ValueError(
                f"--bits {bits:g}: takes rows with scales in two levels, for which target {target} has no schedule; "
                "leave it out, or take --scheme q4a64"
            )


def named(text: str) -> str:
    """Return the path or URL that is meant: of the page of a model on the hub, what ``hf://`` names."""
    page = PAGE.fullmatch(text)
    return text if page is None else f"hf://{page['name']}" + (f"@{page['revision']}" if page["revision"] else "")


def examine(path: Path) -> CheckpointSummary:
    """Return the summary of a checkpoint; :class:`ValueError`, with what to do, if it is not one."""
    if is_named(path.name) and path.is_file():
        files = folder.beside(path)
    elif path.is_dir():
        files = {file.name: file for pattern in READ for file in path.glob(pattern)}
        whole = sorted(path.glob("*.gguf"))
        files = files or (folder.beside(whole[0]) if whole else {})
    else:
        raise ValueError(_missing(path))
    if "config.json" not in files and not any(map(is_named, files)):
        below = sorted(found.parent.name for found in path.glob("*/config.json"))
        advice = f"; a folder in it has one: {path / below[0]}" if below else ""
        raise ValueError(f"{path}: has no config.json; expected a checkpoint's folder, or a GGUF file{advice}")
    try:
        with tempfile.TemporaryDirectory() as place:
            if parts := folder.files_of(files):
                files = {**folder.write(parts, Path(place)), **parts}
            config = read_object(files["config.json"], "config.json")
            headers = read_headers(files)
            return CheckpointSummary(headers.tensors, _positions(config), _form(headers))
    except ConfigError as error:
        raise ValueError("\n".join(f"{path}: {problem}" for problem in error.problems)) from None


def _missing(path: Path) -> str:
    """Say that there is no checkpoint at a path, and what to do about it."""
    text = str(path)
    if path.is_file():
        return f"{path}: is a file; expected a checkpoint's folder, or a .gguf file"
    if not path.is_absolute() and text.count("/") == 1 and not path.parent.is_dir() and text[0] not in "~.":
        return f"{path}: no such folder; if it is a name on the hub, write hf://{text}"
    if text.startswith("~"):
        return f"{path}: no such folder; `~` is read by the shell alone: write {Path(text).expanduser()}"
    return f"{path}: no such file or folder; expected a checkpoint's folder, or a GGUF file"


def _form(headers: Headers) -> str:
    """Return the form of most values, empty where they are floats."""
    counts = Counter[str]()
    for name, (_, info) in headers.tensors.items():
        packed = headers.packed.get(name)
        counts[packed["called"] if packed else ""] += math.prod(info.shape)
    return max(counts, key=lambda form: counts[form], default="")


def _positions(config: JsonObject) -> int:
    """Return the positions a model was made for, 0 where config.json does not say it in a way that is known here."""
    name = config.get("model_type")
    try:
        if native(name):
            family = load_family(str(name))
            return int(family.context_window(family.parse(config), 0))
    except ConfigError:
        pass  # config-parse says what is wrong, with all the rest
    found = config.get("max_position_embeddings")
    return found if isinstance(found, int) and found > 0 else 0


def compose(source: Path | str, model: CheckpointSummary, chosen: JsonObject, where: Path) -> str:
    """Return the text of a pipeline file in the folder ``where``, for a checkpoint at a path or a pinned URL."""
    targets: Sequence[str] = chosen.get("targets", ["llvm"])
    default = DEFAULTS[all(TARGETS[target].cpu_kernels for target in targets)]
    window = chosen.get("context_window", min(model.positions or POSITIONS, POSITIONS))
    made_for = f" (the model was made for {model.positions:,})" if model.positions else ""
    bits = chosen.get("bits")
    scheme = chosen.get("scheme") or (default if bits else EXACT.get(model.form, default))
    lines = [
        "# yaml-language-server: $schema=pipeline.schema.json",
        "# A checkpoint to one verified bundle per target. `pipeline run` does the work whose inputs changed,",
        "# `pipeline params` lists every parameter that can be set here or with --set, `pipeline status` looks ahead.",
        "version: 1",
        'name: "${vars.checkpoint}" # the last folder of this path: results are shown in artifacts/NAME/',
        "",
        "vars:",
        f"  checkpoint: {_quoted(_written(source, where))}",
        *(_within(bits, scheme, model.tensors) if bits else _of_scheme(scheme, model)),
        f"  context_window: {window} # positions, prompt and answer together{made_for}",
        f"  targets: [{', '.join(targets)}] # of {_listed(TARGETS)}",
        "",
    ]
    return "\n".join(lines) + "\n" + (WITHIN_BITS if bits else STAGES).read_text("utf-8")


def _of_scheme(scheme: str, model: CheckpointSummary) -> Iterator[str]:
    """Yield the lines that choose a scheme."""
    kept = f" # as this checkpoint's weights are stored: {model.form}" if EXACT.get(model.form) == scheme else ""
    yield f"  # How weights are stored. About, of {_memory() / 2**30:.1f} GiB memory in this machine:"
    yield from (f"  #   {line}" for line in _choices(model))
    yield f"  scheme: {scheme}{kept}"


def _within(bits: float, scheme: str, tensors: TensorTable) -> Iterator[str]:
    """Yield the lines that choose bits, of which matrices get what saves most."""
    values = sum(math.prod(info.shape) for _, info in tensors.values() if len(info.shape) > 1)
    size, memory = bits * values / 8, _memory()
    fits = "" if size + BESIDE <= memory else ", which does not fit"
    yield "  # Bits that a weight takes on the average, scales included; allocate chooses how each matrix is stored:"
    yield f"  # about {size / 2**20:,.0f} MiB in all, of {memory / 2**30:.1f} GiB memory in this machine{fits}."
    yield f"  bits: {bits:g}"
    yield f"  scheme: {scheme} # how the rest is stored, as norms and biases"


def _written(path: Path | str, where: Path) -> str:
    """Return a path as the file names it: relative where it lies below the file."""
    if isinstance(path, str):
        return path
    try:
        return str(path.resolve().relative_to(where.resolve()))
    except ValueError:
        return str(path.absolute())


def _quoted(text: str) -> str:
    return json.dumps(text.replace("${", "$${"), ensure_ascii=False)


def _listed(names: JsonObject) -> str:
    return ", ".join(names)


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _choices(model: CheckpointSummary) -> Iterator[str]:
    """Yield a line for each scheme: what it takes, and whether that fits this machine."""
    for name in dict.fromkeys([*OFFERED, *([EXACT[model.form]] if model.form in EXACT else [])]):
        size = stored_bytes(SCHEMES[name], model.tensors)
        fits = "" if size + BESIDE <= _memory() else "  does not fit"
        yield f"{name:<8} {size / 2**20:>9,.0f} MiB{fits}"


def stored_bytes(scheme: Scheme, tensors: TensorTable) -> int:
    """Return the approximate size of the stored weights in bytes; embeddings and heads are recognised by name."""
    total = 0
    for name, (_, info) in tensors.items():
        kind = "embedding" if "embed" in name or "wte" in name else "head" if "head" in name else "linear"
        row = scheme.row(kind, info.shape[-1]) if len(info.shape) == 2 else None
        parts = row.stored(*info.shape) if row else (("", info.shape, scheme.storage_dtype),)
        total += sum(math.prod(shape) * DTYPE_BYTES[dtype] for _, shape, dtype in parts)
    return total
