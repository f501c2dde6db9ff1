"""calibrate: run the original model on sample text, and keep how much each input channel of each matrix carries."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from stagegraph.stage import In, Out, Source, Stage, StageError, dist_versions, param, source

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stagegraph.stage import Context
    from stages.verification.probes import Probes

WINDOW = 512  # tokens of a piece: longer ones teach no more, and attention takes the square of it


class Calibrate(Stage):
    """Layer by layer in bounded memory; what comes out serves every scheme and target."""

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
        tokens: int = param("how many tokens of the corpus are read", default=4096, minimum=256)

    inputs = {
        "config": In("config-parse", "config", "the model's config"),
        "tokenizer": In("tokenizer-bundle", "tokenizer", "what makes ids of the corpus"),
    }
    outputs = {"importance": Out("importance.npz", "mean square of what each matrix reads, by input channel")}

    def tools(self, params: Params) -> Mapping[str, str]:
        """Name what runs the model and what it runs on: sums may come out otherwise on another processor."""
        from stages.checkpoint.gguf import is_named
        from stages.targets import processor

        names = ["torch", "transformers", "numpy", "tokenizers"]
        names += ["gguf"] if is_named(params.checkpoint) else []
        return {**dist_versions(*names), "processor": processor.host_cpu()}

    def run(self, ctx: Context) -> None:
        """Run the model in a process of its own on the corpus."""
        import shutil
        import tempfile
        from pathlib import Path

        import numpy as np

        from stages.calibration import moments
        from stages.runtime.errors import BundleError
        from stages.verification import apart, original
        from stages.verification.checkpoint_files import checkpoint_files
        from stages.verification.probes import CorpusError

        if "absent" in dist_versions("torch", "transformers").values():
            raise StageError(
                "calibrate runs the original model, which takes torch: install the extra verify "
                "(pip install 'stagegraph[verify]'), or quantize without it, with scales: mse"
            )
        checkpoint = ctx.source("checkpoint")
        with tempfile.TemporaryDirectory(dir=ctx.out) as folder:
            root, files = checkpoint_files(checkpoint.root, checkpoint.files, Path(folder))
            try:
                probes = _probes(ctx)
                asked = original.Request(root, files, ctx.input("config"), probes.pieces, 0, Path(folder))
                instead = "quantize with scales: mse to go without calibration"
                found = apart.call(moments.__name__, asdict(asked), ctx.progress, instead)
            except (apart.LiveError, CorpusError, BundleError) as error:
                raise StageError(*error.problems) from None
            made = Path(folder) / "importance.npz"
            np.savez(made, **found)  # type: ignore[arg-type]
            shutil.move(made, ctx.out / "importance.npz")
        ctx.summary(f"{len(found)} matrices on {sum(map(len, probes.pieces)):,} tokens")


def _probes(ctx: Context) -> Probes:
    """Return the sample text as ids."""
    import json

    from stages.calibration.corpus import DEFAULT
    from stages.runtime.folder import Folder
    from stages.runtime.tokenizer import BundleTokenizer
    from stages.verification import probes

    corpus = probes.one_file(ctx.params.corpus, ctx.source("corpus").files) if ctx.params.corpus else DEFAULT
    folder = Folder(ctx.input("tokenizer"))
    tokenizer = BundleTokenizer(folder)
    window = min(WINDOW, json.loads(ctx.input("config").read_bytes())["context_window"])
    return probes.of(
        corpus,
        ctx.params.tokens,
        window=window,
        prefix=tokenizer.prefix,
        encode=tokenizer.encode,
        chat=lambda messages: probes.conversation(messages, tokenizer, folder, tokenizer.encode),
    )
