"""calibrate: runs the original model on sample text and records the mean square of each matrix's input channels."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from stagegraph.stage import In, Out, Source, Stage, StageError, dist_versions, param, source

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stagegraph.stage import Context


class Calibrate(Stage):
    """Measure activations layer by layer in bounded memory; the result serves every scheme and target."""

    id = "calibrate"

    @dataclass(frozen=True)
    class Params:
        """Parameters of calibrate."""

        checkpoint: Source = source(
            "checkpoint directory, or a GGUF file",
            include=("config.json", "*.safetensors", "*.safetensors.index.json"),
            alone=("*.gguf",),
        )
        corpus: Source = source(
            "sample text, which should be none that verify reads: a .txt file, or a .jsonl of texts and conversations; "
            "empty: the one that comes along, of prose, code, Chinese and chat",
            include=("*.txt", "*.jsonl"),
            optional=True,
        )
        tokens: int = param("how many tokens of the corpus are read", default=8192, minimum=256)
        feedback: bool = param(
            "also keep how errors of some columns are made up for by others, for scales: gptq of quantize: k * k bytes "
            "for each input of k channels",
            default=False,
        )

    inputs = {
        "config": In("config-parse", "config", "the model's config"),
        "tokenizer": In("tokenizer-bundle", "tokenizer", "what makes ids of the corpus"),
    }
    outputs = {
        "importance": Out("importance.npz", "mean square of what each matrix reads, by input channel"),
        "feedback": Out(
            "feedback", "how errors are made up for, by what matrices read; an index of none unless asked for"
        ),
    }

    def tools(self, params: Params) -> Mapping[str, str]:
        """Name the libraries that run the model, and the processor, on which the order of sums depends."""
        from stages.checkpoint import gguf
        from stages.targets import processor

        names = ["torch", "transformers", "numpy", "tokenizers", "jinja2"]
        names += ["gguf"] if gguf.is_named(params.checkpoint) else []
        return {**dist_versions(*names), "processor": processor.exact_cpu()}

    def run(self, ctx: Context) -> None:
        """Run the model in a process of its own on the corpus."""
        import shutil
        import tempfile
        from pathlib import Path

        import numpy as np

        from stages.calibration import asking, moments
        from stages.quantization.feedback import INDEX
        from stages.verification.probes import CorpusError, one_file

        checkpoint, own = ctx.source("checkpoint"), ctx.params.corpus
        feedback = ctx.out / "feedback"
        feedback.mkdir()
        (feedback / INDEX).write_text("{}", "utf-8")  # unless it is asked for
        with tempfile.TemporaryDirectory(dir=ctx.out) as folder:
            try:
                found = asking.Original(
                    checkpoint.root,
                    checkpoint.files,
                    ctx.input("config"),
                    ctx.input("tokenizer"),
                    one_file(own, ctx.source("corpus").files) if own else asking.DEFAULT,
                    ctx.params.tokens,
                    Path(folder),
                ).ask(
                    moments.__name__,
                    lambda request: {**asdict(request), "feedback": str(feedback) if ctx.params.feedback else ""},
                    ctx.progress,
                    "quantize with scales: mse",
                )
            except (asking.AskingError, CorpusError) as error:
                raise StageError(*error.problems) from None
            made = Path(folder) / "importance.npz"
            np.savez(made, **found)  # type: ignore[arg-type]
            shutil.move(made, ctx.out / "importance.npz")
        ctx.summary(f"{len(found)} matrices on up to {ctx.params.tokens:,} tokens")
