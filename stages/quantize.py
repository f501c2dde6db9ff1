"""quantize: stream a checkpoint's weights, tensor by tensor, into quantized shards in TVM's tensor-cache format."""

from __future__ import annotations

import contextlib
import errno
import json
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from stagegraph.stage import In, JsonObject, Out, Piece, Source, Stage, StageError, dist_versions, param, source

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    import numpy as np

    from stagegraph.stage import Context
    from stages.checkpoint.tensors import Weights
    from stages.conversion.model import Conversion
    from stages.conversion.plan import Plan
    from stages.documents.model import CheckpointTensors
    from stages.documents.params import Register
    from stages.documents.weights import ErrorLine

PLAIN = {"F32", "F16", "BF16"}  # types of GGUF that quantize nothing
SLACK = 2**20  # bytes for tensor-cache.json and report.json


class Quantize(Stage):
    """Quantize tensors in parallel and in bounded memory; a tensor that was converted before is reused."""

    id = "quantize"

    @dataclass(frozen=True)
    class Params:
        """Parameters."""

        checkpoint: Source = source(
            "checkpoint directory with the weights, or a GGUF file", include=("*.safetensors",), alone=("*.gguf",)
        )
        scheme: str = param("quantization scheme", choices="stages.quantization.schemes:SCHEMES")
        target: str = param("what the bundle is built for", choices="stages.targets.table:TARGETS")
        scales: str = param(
            "how a group's scale is chosen: max takes the one that the largest value asks for, as MLC-LLM does; full "
            "takes the largest value to the code that max leaves over, as ggml's Q4_0 does; mse searches the one of "
            "least squared error, which takes longer to quantize and no longer to run; importance does so too, and an "
            "error counts by what its column carries (stage calibrate); gptq does that, and lets later columns make up "
            "for errors of earlier ones (calibrate with feedback: true); awq does what importance does, once columns "
            "that carry much are multiplied and the norm before them is divided; auto is what the scheme's row of "
            "docs/quantization.md says",
            default="auto",
            choices=("auto", "max", "full", "mse", "importance", "gptq", "awq"),
        )
        threads: int = param("how many tensors at once; 0 takes one per processor", default=0, minimum=0, hashed=False)
        batch: int = param(
            "in a cluster, how many MiB of the checkpoint a worker converts at a time; a smaller model stays on one",
            default=1024,
            minimum=1,
            hashed=False,
        )

    inputs = {
        "params": In("param-register", "params", "what to store, and what it is made of"),
        "tensors": In("config-parse", "tensors", "dtype, shape and file of the checkpoint's tensors"),
        "importance": In("calibrate", "importance", "what columns carry, for importance, gptq and awq", optional=True),
        "feedback": In("calibrate", "feedback", "how errors are made up for, for scales: gptq", optional=True),
    }
    outputs = {
        "weights": Out("weights", "shards and tensor-cache.json"),
        "report": Out("report.json", "per parameter: how it is stored and its error against the source"),
    }
    parts = {
        "tensor": "stages.conversion.model",
        "conversion": "stages.conversion.model",
        "digests": "stages.conversion.digests",
        "kernels": "stages.conversion.compiled",
    }

    def resolve(self, params: Params) -> Params:
        """Take the scheme's own choice for auto; refuse one where there are no groups that have a scale each."""
        from stages.quantization.schemes import SCHEMES

        scheme = SCHEMES.get(params.scheme)
        if scheme is None:
            return params
        if params.scales == "auto":
            return replace(params, scales=scheme.scales)
        if params.scales != "max" and not any(row.kind == "group" for row in scheme.rows):
            raise StageError(
                f"scales: {params.scales} chooses scales of groups of integers, and {scheme.name} has none; use auto"
            )
        if params.scales == "full" and any(row.minimum for row in scheme.rows):
            raise StageError(
                f"scales: full is for groups around zero, and those of {scheme.name} have a minimum; use max or mse"
            )
        return params

    def tools(self, params: Params) -> dict[str, str]:
        """Return the libraries that do the arithmetic; no C++ compiler counts, for compiled kernels store the same."""
        from stages.checkpoint import gguf
        from stages.targets import processor

        tools = dist_versions("numpy", "ml-dtypes", *(["gguf"] if gguf.is_named(params.checkpoint) else []))
        if params.scales in ("gptq", "awq"):  # products and powers, whose last bits are the processor's
            tools["processor"] = processor.exact_cpu()
        return tools

    def rows(self, params: Params, facts: JsonObject) -> dict[str, str | Sequence[str]]:  # noqa: ARG002
        """Return the one scheme; what the weights are is in the register, so no family is looked up."""
        return {
            "stages.quantization.schemes:SCHEMES": params.scheme,
            "stages.models:FAMILIES": (),
            "stages.targets.table:TARGETS": (),
        }

    def make(self, ctx: Context, what: Sequence[str]) -> dict[str, str]:
        """Convert the parameters of these names; return the digests of the tensors that they are made of."""
        from stages.conversion.model import Conversion

        register: Register = json.loads(ctx.input("params").read_bytes())
        listed: CheckpointTensors = json.loads(ctx.input("tensors").read_bytes())
        plan = _plan(ctx, register, listed)
        conversion = Conversion(plan, ctx, ctx.out / "weights", ctx.out / "parts", only=frozenset(what))
        with _leaving_nothing(ctx, conversion):
            return conversion.parts()

    def run(self, ctx: Context) -> None:
        """Quantize in the checkpoint's order; report each parameter's error as read back from what is stored."""
        from stages.conversion.model import Conversion
        from stages.quantization.schemes import SCHEMES, own_rows
        from stages.quantization.tensor_cache import listing, write_index

        register: Register = json.loads(ctx.input("params").read_bytes())
        listed: CheckpointTensors = json.loads(ctx.input("tensors").read_bytes())
        scheme, scales = SCHEMES[ctx.params.scheme], ctx.params.scales
        if [register["scheme"], register["target"]] != [scheme.name, ctx.params.target]:
            raise StageError(
                f"the parameters are registered for {register['scheme']} on {register['target']}, quantize is asked "
                f"for {scheme.name} on {ctx.params.target}: give param-register and quantize the same values"
            )
        plan = _plan(ctx, register, listed)
        # What awq multiplies follows from matrices together, of which a piece has not all.
        pieces = _pieces(plan, ctx.params.batch << 20) if scales != "awq" else []
        made = ctx.map("tensor", pieces) if len(pieces) > 1 else None
        known = {name: digest for digests in made or () for name, digest in digests.items()}
        conversion = Conversion(plan, ctx, ctx.out / "weights", ctx.out / "parts", known=known)
        size = conversion.stored_bytes
        _check_space(ctx, size)
        with _leaving_nothing(ctx, conversion):
            report = conversion.run()
            count = sum(math.prod(entry["shape"]) for entry in register["logical"])
            bits = round(8 * size / count, 3)
            metadata = {"ParamSize": len(register["params"]), "ParamBytes": size, "BitsPerParam": bits}
            write_index(ctx.out / "weights", conversion.contents, metadata)
            how = {"schema": 1, "scheme": scheme.name, "scales": scales}
            (ctx.out / "report.json").write_text(listing(how, "tensors", report), "utf-8")
        for warning in (*_twice(register, listed, report), *_uncalibrated(plan)):
            ctx.warn(warning)
        ctx.view("errors", _view(report))
        read = f"{conversion.total / 1e6:,.1f} MB -> {size / 1e6:,.1f} MB"
        rows = " and rows of their own" if own_rows(register) else ""
        ctx.summary(f"{scheme.name}{rows}: {read}, {bits:.2f} bits per parameter")


def _plan(ctx: Context, register: Register, listed: CheckpointTensors) -> Plan:
    from stages.checkpoint.tensors import Weights
    from stages.conversion.plan import Plan

    files, importance = ctx.source("checkpoint"), _importance(ctx)
    return Plan(
        register,
        listed["tensors"],
        files.files,
        files.digests,
        ctx.params.scales,
        ctx.params.threads,
        dist_versions("apache-tvm", "apache-tvm-ffi"),
        importance,
        _feedback(ctx),
        _factors(ctx, register, Weights(files.files, listed["tensors"]), importance),
    )


def _pieces(plan: Plan, size: int) -> list[Piece]:
    pieces = []
    for batch in plan.batches(size):
        names = [entry["name"] for entry in batch]
        pieces.append(Piece(f"{names[0]} to {names[-1]}", names, {"checkpoint": sorted(plan.files_of(batch))}))
    return pieces


def _importance(ctx: Context) -> dict[str, np.ndarray]:
    """Return what calibration has found, where scales are chosen by it."""
    from stages.quantization.calibrated import BY_CALIBRATION

    if ctx.params.scales not in BY_CALIBRATION:
        return {}
    if not ctx.has_input("importance"):
        raise StageError(
            f"scales: {ctx.params.scales} weighs errors by what calibrate has found: add the stage calibrate, and name "
            "it under needs of quantize (docs/quantization.md)"
        )
    import numpy as np

    with np.load(ctx.input("importance")) as found:
        return dict(found)


def _feedback(ctx: Context) -> dict[str, Path]:
    """Return the file of each tensor's feedback, where errors are fed back."""
    if ctx.params.scales != "gptq":
        return {}
    from stages.quantization.feedback import INDEX

    folder = ctx.input("feedback")
    files = json.loads((folder / INDEX).read_bytes())
    if not files:
        raise StageError(
            "scales: gptq takes what calibrate keeps only if it is asked to: give calibrate feedback: true "
            "(docs/quantization.md)"
        )
    return {name: folder / file for name, file in files.items()}


def _factors(
    ctx: Context, register: Register, weights: Weights, importance: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Return what columns are multiplied by, and norms divided by, where that is asked for."""
    if ctx.params.scales != "awq":
        return {}
    from threadpoolctl import threadpool_limits

    from stages.conversion import columns

    try:
        with threadpool_limits(1, user_api="blas"):  # sums depend on their number, which is in no key
            return columns.factors(register, weights, importance)
    except columns.NothingFoldsError as error:
        raise StageError(*error.problems) from None


def _uncalibrated(plan: Plan) -> Iterator[str]:
    """Say which matrices were to be quantized by importance and have none."""
    from stages.problems import capped

    if missing := plan.uncalibrated():
        yield (
            f"{len(missing)} matrices are quantized without what calibrate has found, for they read too few tokens or "
            "are no layers of their own in transformers (scales: mse), or what they are made of reads different inputs "
            f"(importance in the place of gptq): {', '.join(capped(missing))}"
        )


def _twice(register: Register, listed: CheckpointTensors, report: Iterable[ErrorLine]) -> Iterator[str]:
    """Say of matrices that were quantized before they came here how many have lost more; those that a row holds as
    they are have not.
    """
    sources = {entry["name"]: entry["sources"] for entry in register["logical"] if entry["quantize"]}
    forms, worst, count = set(), 0.0, 0
    for line in report:
        tensors = [listed["tensors"][name] for name in sources.get(line["name"], ())]
        called = {tensor["packed"]["called"] for tensor in tensors if "packed" in tensor}
        if (called := called - PLAIN) and line["rmse"]:
            forms |= called
            worst, count = max(worst, line["rmse"]), count + 1
    if count:
        yield (
            f"{count} matrices are quantized already ({', '.join(sorted(forms))}) and are quantized a second time as "
            f"{register['scheme']}: the errors add up, here up to {worst:.1e} (relative RMSE); q0f32 keeps the values"
        )


@contextlib.contextmanager
def _leaving_nothing(ctx: Context, conversion: Conversion) -> Iterator[None]:
    """Remove what a failure has left half written; say which failure it was in the stage's terms."""
    import shutil  # with every archive format there is, which planning does without

    from stages.conversion.model import ConversionError

    try:
        yield
    except BaseException as error:
        for name in ("weights", "parts"):
            shutil.rmtree(ctx.out / name, ignore_errors=True)
        (ctx.out / "report.json").unlink(missing_ok=True)
        if isinstance(error, ConversionError):
            raise StageError(*error.problems) from None
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StageError(
                f"{ctx.out}: the disk is full after {conversion.done:,} of {conversion.total:,} bytes of weights were "
                f"read; what was written is removed again. The weights take {conversion.stored_bytes:,} bytes as "
                f"{ctx.params.scheme}: free as much, then run again"
            ) from None
        raise


def _check_space(ctx: Context, size: int) -> None:
    import shutil

    free = shutil.disk_usage(ctx.out).free
    if size + SLACK > free:
        raise StageError(
            f"{ctx.out}: the weights take {size:,} bytes as {ctx.params.scheme}, the disk has {free:,} bytes free"
        )


def _view(report: Iterable[ErrorLine]) -> str:
    """Render the report, largest error first."""
    head = "| parameter | shape | relative RMSE | max error | bytes | stored as | from |"
    lines = [head, "|---|---|---:|---:|---:|---|---|"]
    for line in sorted(report, key=lambda line: (-line["rmse"], line["name"])):
        error = f"{line['rmse']:.3e} | {line['max_error']:.2e} | {line['bytes']:,}"
        lines.append(f"| {line['name']} | {line['shape']} | {error} | {line['scheme']} | {line['source_dtype']} |")
    return "\n".join(lines) + "\n"
