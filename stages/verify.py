"""verify: runs the bundle with TVM's runtime alone and compares it with its checkpoint and a reference."""

from __future__ import annotations

import json
import os
import unicodedata
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from stagegraph.stage import (
    RESERVATION,
    Context,
    In,
    JsonObject,
    Out,
    Piece,
    Source,
    Stage,
    StageError,
    dist_versions,
    list_files,
    param,
    source,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from stages.verification.case import Portion

_LIVE = ("torch", "transformers")
_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "*.safetensors",
    "*.safetensors.index.json",
    "*.tiktoken",
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "spiece.model",
    "tekken.json",
    "rwkv_vocab_*.txt",
    "README.md",
    "LICENSE*",
    "LICENCE*",
    "COPYING*",
    "reference/*",
    "record_reference.py",
)


class Verify(Stage):
    """Check weights, tokenizer, logits and text; the card says what was checked, and what could not be."""

    id = "verify"
    profile = "runtime"

    @dataclass(frozen=True)
    class Params:
        """Parameters of verify."""

        checkpoint: Source = source(
            "directory of the checkpoint that the bundle was made of, or its GGUF file",
            include=_FILES,
            alone=("*.gguf",),
        )
        target: str = param("target that the bundle is built for", choices="stages.targets.table:TARGETS")
        reference: str = param(
            "live: transformers and torch on the bundle's dequantized weights; recorded: reference/ of the checkpoint; "
            "none: run it and compare its weights; auto: the first of these that there is",
            default="auto",
            choices=("auto", "live", "recorded", "none"),
        )
        device: str = param(
            "where to run; auto: the processor for llvm, a CUDA device if there is one for cuda; none: do not run",
            default="auto",
            choices=("auto", "cpu", "cuda", "none"),
        )
        origin: str = param(
            "origin of the checkpoint, for the certificate; auto: repository and commit, from its folder",
            default="auto",
        )

        corpus: Source = source(
            "text on which the bundle is compared with the original model: a .txt file, or a .jsonl of texts and "
            "conversations; empty: the shipped one, of prose, code, Chinese and chat",
            include=("*.txt", "*.jsonl"),
            optional=True,
        )
        probe_tokens: int = param("number of tokens of the corpus to compare", default=2048, minimum=16)
        max_kl: float | None = param(
            "largest mean KL divergence from the original model, in nats; null: by the scheme", default=None
        )
        min_top1: float | None = param(
            "least share of positions whose most likely token is the original's; null: by the scheme", default=None
        )
        max_ppl_ratio: float | None = param(
            "largest perplexity as a multiple of the original's; null: by the scheme", default=None
        )
        max_activation_kl: float | None = param(
            "largest mean KL divergence of int8 activations, and of an int8 KV cache, from floats; null: 0.03",
            default=None,
        )
        batch: int = param(
            "in a cluster, how many MiB of the checkpoint a worker compares at a time; a smaller model stays on one",
            default=1024,
            minimum=1,
            hashed=False,
        )

    inputs = {
        "bundle": In("bundle", "bundle", "the bundle"),
        "params": In("param-register", "params", "which checkpoint tensors the bundle's weights are made of"),
        "config": In("config-parse", "config", "the model's config"),
        "report": In("quantize", "report", "the errors of quantization, for the card"),
        "tokenizer": In("tokenizer-bundle", "proof", "what proves the tokenizer, for the certificate", optional=True),
    }
    outputs = {
        "report": Out("verify.json", "every check with what was measured"),
        "card": Out("card.md", "the same, to be read by people"),
        "certificate": Out(
            "certificate.json", "the certificate, to pass on with the bundle; docs/certificate.md", attests="bundle"
        ),
        "bom": Out("bom.cdx.json", "the bill of materials, CycloneDX 1.6", attests="bundle"),
    }

    parts = {"original": "stages.verification.original", "advice": "stages.verification.refusal"}

    def resolve(self, params: Params) -> Params:
        """Name the reference and the processor; whether a CUDA device can be used shows when it is asked to work."""
        from stages.targets.table import TARGETS

        reference, device = params.reference, params.device
        if reference == "auto":
            recorded = (Path(params.checkpoint) / "reference" / "reference.json").is_file()
            installed = "absent" not in dist_versions(*_LIVE).values()
            reference = "live" if installed else "recorded" if recorded else "none"
        runs_on = TARGETS[params.target].device
        if device == "auto" and runs_on == "cpu":
            device = runs_on
        if device not in ("auto", "none", runs_on):
            raise StageError(f"a bundle for {params.target} does not run on device {device}; use auto")
        from stages.verification.origin import hub_origin

        origin = hub_origin(Path(params.checkpoint)) if params.origin == "auto" else params.origin
        return replace(params, reference=reference, device=device, origin=origin)

    def tools(self, params: Params) -> Mapping[str, str]:
        """Name the runtime, the libraries that read the checkpoint and compute references, and the CUDA devices."""
        from stages.checkpoint import gguf
        from stages.targets.table import TARGETS
        from stages.tokenizers import READERS

        names = ["apache-tvm", "apache-tvm-ffi", "numpy", "ml-dtypes", "jinja2", *READERS]
        names += ["gguf"] if gguf.is_named(params.checkpoint) else []
        found = dist_versions(*names, *(_LIVE if params.reference == "live" else ()))
        found["unicode"] = unicodedata.unidata_version
        if TARGETS[params.target].device == "cuda" and params.device != "none":
            from stages.runtime import host

            found["nvidia-driver"] = host.nvidia_driver()
            found["visible-cuda-devices"] = os.environ.get("CUDA_VISIBLE_DEVICES", "all")
        return found

    def rows(self, params: Params, facts: JsonObject) -> Mapping[str, str | Sequence[str]]:
        """Name the family, the scheme and the tokenizer family; of what is not known, every row counts."""
        rows: dict[str, str | Sequence[str]] = {"stages.tokenizers:EMBEDDINGS": (), "stages.targets.table:TARGETS": ()}
        tokenizer = _tokenizer_family(Path(params.checkpoint))
        if tokenizer:
            rows["stages.tokenizers:TOKENIZERS"] = rows["stages.tokenizers.resolution:RULES"] = tokenizer
        if "family" in facts:
            rows["stages.models:FAMILIES"] = facts["family"]
        if "scheme" in facts:
            rows["stages.quantization.schemes:SCHEMES"] = facts["scheme"]
            rows["stages.verification.tolerances:TOLERANCES"] = facts["scheme"]
        return rows

    def make(self, ctx: Context, what: JsonObject) -> list[str]:
        """Compare a portion of the weights with the checkpoint's; return what differs."""
        from stages.verification.portions import compare

        return compare(what, ctx.input("bundle"), ctx.source("checkpoint").files)

    def run(self, ctx: Context) -> None:
        """Run every check; :class:`StageError` lists those that failed, with their numbers."""
        import tempfile  # with much else that planning does without

        with tempfile.TemporaryDirectory(dir=ctx.out) as folder:
            _verify(ctx, Path(folder))


def _verify(ctx: Context, folder: Path) -> None:
    from stages.checkpoint.errors import ConfigError
    from stages.documents.files import write_json
    from stages.runtime import seal
    from stages.runtime.errors import BundleError, RequestError
    from stages.verification import bom, certificate, gates
    from stages.verification.all_checks import verify
    from stages.verification.apart import LiveError
    from stages.verification.case import Case
    from stages.verification.checkpoint_files import checkpoint_files
    from stages.verification.probes import CorpusError
    from stages.verification.reference import RecordingError

    checkpoint, quantized = ctx.source("checkpoint"), json.loads(ctx.input("report").read_text("utf-8"))
    root, files = checkpoint_files(checkpoint.root, checkpoint.files, folder)
    case = Case(
        bundle=ctx.input("bundle"),
        params=ctx.input("params"),
        config=ctx.input("config"),
        files=files,
        digests=checkpoint.digests,
        made=[name for name, path in files.items() if path != checkpoint.files.get(name)],
        root=root,
        target=ctx.params.target,
        reference=ctx.params.reference,
        device=ctx.params.device,
        scales=quantized["scales"],
        proof=json.loads(ctx.input("tokenizer").read_bytes()) if ctx.has_input("tokenizer") else None,
        corpus=_corpus(ctx),
        probe_tokens=ctx.params.probe_tokens,
        limits={name: value for name in gates.NAMES if (value := getattr(ctx.params, name)) is not None},
        scratch=ctx.out,
        batch=ctx.params.batch << 20,
        spread=lambda portions: ctx.map("weights", [_piece(portion) for portion in portions]),
        memo=ctx,
    )
    try:
        findings = verify(case, ctx.progress)
    except (BundleError, RecordingError, ConfigError, LiveError, CorpusError) as error:
        raise StageError(*error.problems) from None
    except RequestError as error:
        raise StageError(f"{case.bundle}: the library refuses what its sizes allow: {error}") from None
    verified = findings.document()
    card = findings.card(quantized["tensors"])
    write_json(ctx.out / "verify.json", verified)
    (ctx.out / "card.md").write_text(card, "utf-8")
    if findings.failures:  # what was measured stays with the failure, where `compare` finds it
        raise StageError(*(f"{findings.name}: {text}" for text in (*findings.failures, *findings.advice)))
    for warning in findings.warnings:
        ctx.warn(warning)
    certified = certificate.document(case, verified, findings.golden, ctx.params.origin, ctx.document)
    (ctx.out / "certificate.json").write_bytes(seal.fixed(certified))
    write_json(ctx.out / "bom.cdx.json", bom.bill(certified, verified, case.manifest))
    if not findings.passed:
        ctx.fact(RESERVATION, findings.verdict)
    ctx.view("card", card)
    ctx.summary(findings.summary())


def _piece(portion: Portion) -> Piece:
    return Piece(portion.name, portion.what, {"checkpoint": portion.checkpoint, "bundle": portion.bundle})


def _corpus(ctx: Context) -> Path:
    from stages.verification.probes import DEFAULT, CorpusError, one_file

    try:
        return one_file(ctx.params.corpus, ctx.source("corpus").files) if ctx.params.corpus else DEFAULT
    except CorpusError as error:
        raise StageError(*error.problems) from None


def _tokenizer_family(root: Path) -> str | None:
    from stages.checkpoint import gguf
    from stages.tokenizers.errors import TokenizerError
    from stages.tokenizers.resolution import resolve

    if gguf.is_named(root.name):
        from stages.tokenizers.formats import gguf_files

        return gguf_files.family(root) or None
    try:
        root, files = list_files(root, [pattern for pattern in _FILES if "/" not in pattern])
        return resolve(root, files).family
    except (OSError, TokenizerError):
        return None
