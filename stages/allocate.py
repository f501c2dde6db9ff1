"""allocate: chooses a storage row for each matrix within a budget of bits, by the loss if it alone is quantized."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from stagegraph.stage import In, JsonObject, Out, Source, Stage, StageError, dist_versions, param, source

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np

    from stagegraph.stage import Context
    from stages.documents.model import CheckpointTensors, ModelDocument
    from stages.quantization.budget import RowChoices

ROWS = ("q2k", "q3k", "q4a64", "q4k", "q4a32", "q5k", "q6k", "q8f16_1")  # schemes whose body's row a matrix may have


class Allocate(Stage):
    """Choose how each matrix is stored, as a JSON file, of which an edited copy can be passed to param-register."""

    id = "allocate"

    @dataclass(frozen=True)
    class Params:
        """Parameters of allocate."""

        checkpoint: Source = source(
            "checkpoint directory, or a GGUF file",
            include=("config.json", "*.safetensors", "*.safetensors.index.json"),
            alone=("*.gguf",),
        )
        bits: float = param("bits that a weight of a matrix takes on the average, scales included")
        scales: str = param(
            "how quantize will choose scales: give both the same, for what a row costs depends on it; importance and "
            "gptq take what calibrate has found",
            default="max",
            choices=("max", "mse", "importance", "gptq"),
        )
        corpus: Source = source(
            "sample text that losses are measured on, as calibrate's; empty: the one that comes along",
            include=("*.txt", "*.jsonl"),
            optional=True,
        )

    inputs = {
        "config": In("config-parse", "config", "the model's config"),
        "tensors": In("config-parse", "tensors", "the checkpoint's names of tensors"),
        "tokenizer": In("tokenizer-bundle", "tokenizer", "what makes ids of the text that losses are measured on"),
        "importance": In("calibrate", "importance", "what each column carries, for scales: importance", optional=True),
        "feedback": In("calibrate", "feedback", "how errors are made up for, for scales: gptq", optional=True),
    }
    outputs = {"rows": Out("rows.json", "by parameter: the scheme whose row it has")}

    def resolve(self, params: Params) -> Params:
        """Refuse a number of bits that no choice of rows comes to."""
        from stages.quantization.schemes import why_no_budget

        if why := why_no_budget(params.bits):
            raise StageError(f"bits: {why}")
        return params

    def tools(self, params: Params) -> Mapping[str, str]:
        """Name the versions of the libraries that run the model, and the processor."""
        from stages.checkpoint import gguf
        from stages.targets import processor

        names = ["torch", "transformers", "numpy", "tokenizers", "jinja2"]
        names += ["gguf"] if gguf.is_named(params.checkpoint) else []
        return {**dist_versions(*names), "processor": processor.exact_cpu()}

    def rows(self, params: Params, facts: JsonObject) -> Mapping[str, str | Sequence[str]]:  # noqa: ARG002
        """Return the rows there are to choose from, and the model's family."""
        rows: dict[str, str | Sequence[str]] = {"stages.quantization.schemes:SCHEMES": ROWS}
        if "family" in facts:
            rows["stages.models:FAMILIES"] = facts["family"]
        return rows

    def run(self, ctx: Context) -> None:
        """Measure losses, choose rows, and write them."""
        from stages.documents.files import write_json
        from stages.quantization.budget import allocate

        model: ModelDocument = json.loads(ctx.input("config").read_bytes())
        listed: CheckpointTensors = json.loads(ctx.input("tensors").read_bytes())
        found = _measured(ctx, model, listed)
        choices = choices_of(model, listed, found)
        try:
            taken = allocate(choices, ctx.params.bits)
        except ValueError as error:
            raise StageError(str(error)) from None
        rows = {name: ROWS[way] for name, way in taken.items()}
        values = sum(each.values for each in choices)
        bits = sum(each.bits[taken[each.name]] for each in choices) / values
        write_json(ctx.out / "rows.json", {"schema": 1, "bits": round(bits, 4), "rows": rows})
        ctx.fact("rows", sorted({*rows.values()}))
        lines = ["| parameter | row | bits | KL to be expected |", "|---|---|---:|---:|"]
        for each in choices:
            way = taken[each.name]
            lines.append(f"| {each.name} | {ROWS[way]} | {each.bits[way] / each.values:.3f} | {each.loss[way]:.2e} |")
        ctx.view("rows", "\n".join(lines) + "\n")
        ctx.summary(f"{len(rows)} matrices at {bits:.3f} bits a weight")


def _measured(ctx: Context, model: ModelDocument, listed: CheckpointTensors) -> dict[str, np.ndarray]:
    """Return what each matrix of the checkpoint costs in each of :data:`ROWS`."""
    import tempfile
    from pathlib import Path

    from stages.calibration import asking, sensitivity
    from stages.verification.probes import CorpusError, one_file

    checkpoint, own, joined = ctx.source("checkpoint"), ctx.params.corpus, [*sources_of(model, listed).values()]
    question = {"schemes": ROWS, "scales": ctx.params.scales, "joined": joined, **_calibrated(ctx)}
    with tempfile.TemporaryDirectory(dir=ctx.out) as folder:
        try:
            return asking.Original(
                checkpoint.root,
                checkpoint.files,
                ctx.input("config"),
                ctx.input("tokenizer"),
                one_file(own, ctx.source("corpus").files) if own else asking.DEFAULT,
                sensitivity.TOKENS,
                Path(folder),
            ).ask(
                sensitivity.__name__,
                lambda request: {"original": asdict(request), **question},
                ctx.progress,
                "name rows yourself (param-register's rows)",
            )
        except (asking.AskingError, CorpusError) as error:
            raise StageError(*error.problems) from None


def _calibrated(ctx: Context) -> dict[str, str]:
    """Return where the results of calibrate are that the choice of scales takes, by port."""
    from stages.quantization.feedback import INDEX

    scales = ctx.params.scales
    ports = {"importance": ["importance"], "gptq": ["importance", "feedback"]}.get(scales, [])
    if not all(map(ctx.has_input, ports)):
        raise StageError(
            f"scales: {scales} weighs errors by what calibrate has found: add the stage calibrate, and name it under "
            "needs of allocate (docs/quantization.md)"
        )
    if scales == "gptq" and not json.loads((ctx.input("feedback") / INDEX).read_bytes()):
        raise StageError(
            "scales: gptq takes what calibrate keeps only if it is asked to: give calibrate feedback: true "
            "(docs/quantization.md)"
        )
    return {port: str(ctx.input(port)) for port in ports}


def sources_of(model: ModelDocument, listed: CheckpointTensors) -> dict[str, list[str]]:
    """Return the tensors of the checkpoint that each matrix is made of, by the parameter's name."""
    from stages.models import described

    family, config = described(model)
    return {
        parameter.name: [listed["names"].get(name, name) for name in parameter.sources]
        for parameter in family.params(config)
        if parameter.kind in ("linear", "embedding", "head")
    }


def choices_of(model: ModelDocument, listed: CheckpointTensors, found: Mapping[str, np.ndarray]) -> list[RowChoices]:
    """Return the rows that each matrix can have, with bits and loss; one that was not measured has the largest loss."""
    import numpy as np

    from stages.models import described
    from stages.quantization.budget import RowChoices, stored_bits
    from stages.quantization.schemes import SCHEMES

    family, config = described(model)
    sources, dearest = sources_of(model, listed), np.max([*found.values()], axis=0)
    choices = []
    for parameter in family.params(config):
        if parameter.name not in sources:
            continue
        n, k = parameter.shape
        loss = np.sum([found.get(name, dearest) for name in sources[parameter.name]], axis=0)
        bodies = [body.fitting(k) for scheme in ROWS if (body := SCHEMES[scheme].body)]
        bits = [stored_bits(row, n, k) for row in bodies]
        choices.append(RowChoices(parameter.name, n * k, bits, [float(each) for each in loss]))
    return choices
