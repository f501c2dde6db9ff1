"""tokenizer-bundle: the tokenizer files that a runtime needs, proven equal to the checkpoint's own tokenizer."""

from __future__ import annotations

import json
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stagegraph.stage import Context, In, JsonObject, Out, Source, Stage, StageError, dist_versions, list_files, source

if TYPE_CHECKING:
    from stages.tokenizers.resolution import Resolution
    from stages.tokenizers.tokenizer_family import Finding, ModelFacts, ReferenceTokenizer, TokenizerFamily

FILES = (
    "*.tiktoken",
    "tokenizer_config.json",
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "spiece.model",
    "tekken.json",
    "rwkv_vocab_*.txt",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "config.json",
)


class TokenizerBundle(Stage):
    """Resolve the tokenizer family, convert its one vocabulary, and refuse to pass on anything not proven equal."""

    id = "tokenizer-bundle"

    @dataclass(frozen=True)
    class Params:
        """Parameters of tokenizer-bundle."""

        checkpoint: Source = source(
            "directory of a Hugging Face checkpoint, whose tokenizer files are read, or a GGUF file",
            include=FILES,
            alone=("*.gguf",),
        )

    inputs = {
        "config": In("config-parse", "config", "Model config: vocabulary size, context window, model family."),
        "generation": In("config-parse", "generation", "Generation config: bos, eos, pad, stop ids, chat format."),
        "tensors": In("config-parse", "tensors", "Tensor headers: the rows of the embedding bound every id."),
    }
    outputs = {
        "tokenizer": Out("tokenizer", "The three files a runtime reads."),
        "proof": Out("proof.json", "What was compared with what, and every finding; the certificate repeats it."),
    }

    def tools(self, params: Params) -> Mapping[str, str]:  # noqa: ARG002
        """Name the libraries, and Python for its Unicode tables, which normalise the reference's text."""
        from stages.tokenizers import READERS

        return {
            **dist_versions(*READERS, "jinja2"),
            "python": f"{sys.version_info.major}.{sys.version_info.minor}",
            "unicode": unicodedata.unidata_version,
        }

    def rows(self, params: Params, facts: JsonObject) -> Mapping[str, str]:
        """Name the family that the files resolve to; none, and so every row, where they resolve to no family."""
        from stages.checkpoint import gguf
        from stages.tokenizers import EMBEDDINGS
        from stages.tokenizers.errors import TokenizerError
        from stages.tokenizers.resolution import resolve

        family = ""
        try:
            if gguf.is_named(params.checkpoint):
                from stages.tokenizers.formats import gguf_files

                family = gguf_files.family(Path(params.checkpoint))
            family = family or resolve(*list_files(Path(params.checkpoint), FILES)).family
        except (OSError, TokenizerError):
            return {}
        rows = {"stages.tokenizers:TOKENIZERS": family, "stages.tokenizers.resolution:RULES": family}
        if facts.get("family") in EMBEDDINGS:
            rows["stages.tokenizers:EMBEDDINGS"] = facts["family"]
        return rows

    def run(self, ctx: Context) -> None:
        """Resolve, convert, emit, prove; one :class:`StageError` carries every problem of the step that failed."""
        import tempfile  # and all kinds of archives with it

        from stages.tokenizers.errors import TokenizerError

        try:
            with tempfile.TemporaryDirectory(dir=ctx.out) as folder:
                _build(ctx, *_files(ctx, Path(folder)))
        except TokenizerError as error:
            raise StageError(*error.problems) from None


def _files(ctx: Context, folder: Path) -> tuple[Path, Mapping[str, Path]]:
    """Return the checkpoint's root and its tokenizer's files; a GGUF file's are written to ``folder``."""
    from stages.checkpoint.gguf.folder import file_of
    from stages.tokenizers.formats import gguf_files

    checkpoint = ctx.source("checkpoint")
    whole = file_of(checkpoint.files)
    if not whole:
        return checkpoint.root, checkpoint.files
    return folder, gguf_files.write(checkpoint.files[whole], folder)


def _build(ctx: Context, root: Path, files: Mapping[str, Path]) -> None:
    from stages.tokenizers import load_tokenizer_family
    from stages.tokenizers.emission import emit
    from stages.tokenizers.proof import rowless
    from stages.tokenizers.proof.equality import fingerprint
    from stages.tokenizers.reference.automatic import Automatic
    from stages.tokenizers.resolution import resolve

    resolution = resolve(root, files)
    ctx.view("trace", resolution.trace)
    facts = _facts(ctx)
    family = load_tokenizer_family(resolution.family)
    # Conversion says what is wrong with a file; a reader that is not ours may not, so it comes second.
    tokenizer = None if family.by_transformers else family.convert(resolution)
    reference = family.reference(resolution)
    if isinstance(reference, Automatic):
        ctx.view("trace", f"{resolution.trace}{'transformers':<22}{reference.name}\n")
        tokenizer = reference.tokenizer()
    assert tokenizer is not None
    tokenizer, beyond = rowless.leave_out(tokenizer, facts.rows)
    left_out = rowless.findings(resolution, reference, facts, beyond)  # said first: what follows may fail for it
    _report(ctx, left_out)
    directory = ctx.out / "tokenizer"
    emit(
        directory,
        tokenizer,
        family=family,
        facts=facts,
        resolution=rowless.without(resolution, beyond),
        fingerprint=fingerprint(reference),
        shown=family.shown(resolution),
    )
    del tokenizer  # what is proven is what a runtime loads from the files, and two at once is memory for nothing
    _prove(ctx, directory, resolution, family, reference, facts, beyond, left_out)


def _facts(ctx: Context) -> ModelFacts:
    from stages.tokenizers import EMBEDDINGS
    from stages.tokenizers.errors import TokenizerError
    from stages.tokenizers.tokenizer_family import ModelFacts

    model, generation, tensors = (
        json.loads(ctx.input(port).read_bytes()) for port in ("config", "generation", "tensors")
    )
    embedding = model["config"].get("embedding") or EMBEDDINGS.get(model["family"])  # a traced model names its own
    if embedding is None:
        raise TokenizerError(
            f"model family {model['family']!r} has no row in stages.tokenizers.EMBEDDINGS; "
            "add the name of its token embedding there"
        )
    return ModelFacts.read(model, generation, tensors["tensors"], tensors["names"].get(embedding, embedding))


def _prove(
    ctx: Context,
    directory: Path,
    resolution: Resolution,
    family: TokenizerFamily,
    reference: ReferenceTokenizer,
    facts: ModelFacts,
    beyond: Mapping[int, str],
    left_out: Sequence[Finding],
) -> None:
    from stages.documents.files import write_json
    from stages.tokenizers.proof import rowless
    from stages.tokenizers.proof.checks import examine
    from stages.tokenizers.proof.equality import prove, texts_for
    from stages.tokenizers.proof.second_vocabulary import agree
    from stages.tokenizers.reference.automatic import Automatic

    for warning in (*resolution.warnings, *family.warnings(resolution)):
        ctx.warn(warning)
    if isinstance(reference, Automatic):
        reference.read(reference.added)  # in its process, which has limits, before the same is done in this one
    stated = rowless.without(resolution, beyond)
    subject, findings = examine(directory, facts, stated.declared, stated.roles)
    texts = rowless.free_of(texts_for(subject), beyond)
    if isinstance(reference, Automatic):
        reference.read([text for _, text in texts])
    findings += prove(subject, reference, lambda done, total: ctx.progress(done, total, "texts"), texts, beyond)
    findings += agree(resolution, reference)
    findings += _beside(directory, resolution, family, reference, texts, [*beyond.values()])
    ctx.view("checks", _page(subject.info, [*left_out, *findings]))
    _report(ctx, findings)
    proof = {
        "vocabulary": resolution.vocabulary.name,
        "reference": type(reference).__name__,
        "texts": len(texts),
        "findings": [{"check": f.check, "level": f.level, "message": f.message} for f in (*left_out, *findings)],
    }
    write_json(ctx.out / "proof.json", proof)
    ctx.summary(
        f"{resolution.family}: {subject.info['active_vocab_size']:,} ids, proven equal to {resolution.vocabulary.name}"
    )


def _report(ctx: Context, findings: Sequence[Finding]) -> None:
    from stages.tokenizers.proof.checks import ERROR, WARNING

    for finding in findings:
        if finding.level == WARNING:
            ctx.warn(str(finding))
    errors = [str(finding) for finding in findings if finding.level == ERROR]
    if errors:
        raise StageError(*errors)


def _beside(
    directory: Path,
    resolution: Resolution,
    family: TokenizerFamily,
    reference: ReferenceTokenizer,
    texts: Sequence[tuple[str, str]],
    left_out: Sequence[str],
) -> list[Finding]:
    """Hold the reference, and the chats, against what else reads the same files."""
    from stages.tokenizers.proof.beside_transformers import Unread, compare, open_files
    from stages.tokenizers.proof.chats import same_chats
    from stages.tokenizers.proof.checks import NOTE
    from stages.tokenizers.reference.automatic import Automatic
    from stages.tokenizers.reference.by_hand import second_readings

    if isinstance(reference, Automatic):
        findings, theirs, exact = [*second_readings(resolution, reference, texts)], reference, True
    else:
        findings = [*family.readings(resolution, texts)]
        try:
            theirs = open_files(family, resolution)
            beside = compare(reference, theirs, texts)
        except Unread as unread:
            return [*findings, unread.finding]
        findings, exact = (
            [*findings, *beside],
            any((finding.check, finding.level) == ("T22", NOTE) for finding in beside),
        )
    if resolution.chat_templates:
        findings += same_chats(directory, resolution, theirs, left_out, exact=exact)
    return findings


def _page(info: JsonObject, findings: Sequence[Finding]) -> str:
    """Render what was checked: the facts a runtime relies on, then every finding, or that there is none."""
    rows = [(name, json.dumps(info[name], ensure_ascii=False)) for name in sorted(info) if name != "schema"]
    rows += [(f"{finding.check} ({finding.level})", finding.message) for finding in findings] or [("findings", "none")]
    return "".join(f"{label:<22}{text}\n" for label, text in rows)
