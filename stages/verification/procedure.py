"""One bundle through all the checks: what needs no device first, then the reference, then the bundle at work."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from stages.models.checkpoint import read_headers
from stages.models.weights import Weights
from stages.quantization.schemes import SCHEMES
from stages.runtime import backend, host, manifest, tensor_cache
from stages.runtime.errors import BundleError
from stages.runtime.tokenizer import BundleTokenizer
from stages.verification import checks, running, weights
from stages.verification.checks import Check
from stages.verification.prompts import PARAGRAPH, PROMPTS
from stages.verification.reference import recorded_prompts
from stages.verification.report import Findings

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from stages.tokenizers.record import Reference as SourceReader

    Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Case:
    """What is verified: a bundle, the artifacts that describe it, and the files and digests of its checkpoint."""

    bundle: Path
    params: Path
    config: Path
    root: Path
    files: Mapping[str, Path]
    digests: Mapping[str, str]
    target: str
    reference: str
    device: str
    scales: str = "max"  # how quantize chose them

    @cached_property
    def registry(self) -> dict[str, Any]:
        """params.json."""
        document: dict[str, Any] = json.loads(self.params.read_text("utf-8"))
        return document

    @cached_property
    def manifest(self) -> manifest.Manifest:
        """The bundle's own description."""
        return manifest.read(self.bundle)

    @property
    def arithmetic(self) -> str:
        """What the library rounds activations to: int8, or the dtype it computes in."""
        model = self.manifest.model
        return "int8" if model.get("activations") == "int8" else str(model["compute_dtype"])

    @cached_property
    def prompts(self) -> tuple[str, tuple[str, ...]]:
        """The text to read and the texts to continue: those that the checkpoint brings, else ours."""
        return recorded_prompts(self.files) or (PARAGRAPH, PROMPTS)

    @cached_property
    def tokenizer(self) -> BundleTokenizer:
        """The bundle's tokenizer."""
        return BundleTokenizer(self.bundle)

    @cached_property
    def reader(self) -> SourceReader | None:
        """An independent reader of the checkpoint's own vocabulary, None where it is of no family known here."""
        from stages.tokenizers import load_tokenizer_family
        from stages.tokenizers.errors import TokenizerError
        from stages.tokenizers.resolution import resolve

        try:
            resolution = resolve(self.root, self.files)
        except TokenizerError:
            return None
        return load_tokenizer_family(resolution.family).reference(resolution)

    @cached_property
    def prefix(self) -> list[int]:
        """What goes before every text, such as bos, by the checkpoint's own files where they can be read."""
        return self.reader.prefix if self.reader else self.tokenizer.prefix

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``, by the checkpoint's own vocabulary likewise."""
        return self.reader.encode(text, specials=False) if self.reader else self.tokenizer.encode(text)

    def prompt(self, text: str) -> list[int]:
        """Return the ids of a text to continue: those of ``text`` after the prefix."""
        return [*self.prefix, *self.encode(text)]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids`` without special tokens, by the checkpoint's own vocabulary likewise."""
        if self.reader is None:
            return self.tokenizer.decode(ids)
        table = self.reader.tokens()
        return self.reader.decode([token for token in ids if token in table and not _is_special(self.reader, token)])

    @cached_property
    def records(self) -> dict[str, tensor_cache.Record]:
        """Where the bundle's weights are."""
        return tensor_cache.records(self.bundle)

    @cached_property
    def tensors(self) -> dict[str, dict[str, Any]]:
        """What the checkpoint's headers say of its tensors: dtype, shape, file."""
        return read_headers({name: path for name, path in self.files.items() if "/" not in name}).table()


def verify(case: Case, progress: Progress) -> Findings:
    """Run the checks of ``case``; failed ones are among the findings, what cannot be begun is raised.

    ``progress`` is told how many of how many things of a kind are done, kind after kind. Raises BundleError,
    RecordingError, LiveError or ConfigError, each with ``problems``.
    """
    model = case.manifest.model
    if case.manifest.target != case.target:
        raise BundleError(f"{case.bundle}: built for {case.manifest.target}; verify is asked about {case.target}")
    findings = Findings(case.manifest.name, model["scheme"], case.target, case.manifest.device, case.reference)
    findings.not_run = _not_run(case)
    problems = manifest.check(case.manifest, run=not findings.not_run)
    if problems:
        raise BundleError(*problems)
    findings.not_run = findings.not_run or _unusable(case)
    findings.checks.append(Check("files", ok=True, detail=f"{len(case.manifest.files)} files as bundle.json has them"))
    problems = weights.misplaced(case.registry, case.records) + weights.mismatched(case.registry, case.tensors)
    if problems:
        raise BundleError(*problems)
    _check_weights(case, findings, progress)
    _check_tokenizer(case, findings)
    if findings.not_run:
        findings.device = findings.reference = "none"
        findings.unchecked.append(f"the library was not run: {findings.not_run}")
        return findings
    running.check(case, findings, progress)
    return findings


def _not_run(case: Case) -> str:
    """Return why nothing is run, as far as that is known before TVM is imported; empty if it will be."""
    if case.device == "none":
        return "device is none"
    if case.device == "auto" and case.manifest.device == "cuda" and not host.has_nvidia_driver():
        return "no NVIDIA driver is loaded"
    return ""


def _unusable(case: Case) -> str:
    """Return why there is no device for the bundle, where it is to be run only if there is one."""
    if case.device != "auto" or case.manifest.device != "cuda":
        return ""
    try:
        found = backend.device("cuda")
        return "; ".join(manifest.capability_problems(case.manifest, backend.capability(found)))
    except BundleError as error:
        return "; ".join(error.problems)


def _is_special(reader: SourceReader, token: int) -> bool:
    text = reader.decode([token])
    return reader.encode(text, specials=True) == [token] != reader.encode(text, specials=False)


def _check_weights(case: Case, findings: Findings, progress: Progress) -> None:
    scheme = SCHEMES[case.registry["scheme"]]
    checkpoint = Weights(case.files, case.tensors)
    compared = sum(len(entry["sources"]) for entry in case.registry["logical"])
    differing = weights.differences(
        case.registry,
        case.records,
        scheme,
        checkpoint,
        case.scales,
        progress=lambda done: progress(done, compared, "tensors compared"),
    )
    if differing:
        findings.checks += [Check("weights", ok=False, detail=text) for text in differing]
        return
    how = f"bit for bit as {scheme.storage_dtype}" if scheme.kind == "none" else f"within half a step of {scheme.name}"
    if case.scales != "max":
        how = f"within what {scheme.name} with searched scales may be off"
    findings.checks.append(Check("weights", ok=True, detail=f"{compared} tensors of the checkpoint, {how}"))


def _check_tokenizer(case: Case, findings: Findings) -> None:
    prompt, continued = case.prompts
    texts = dict.fromkeys((*checks.PROBES, PARAGRAPH, prompt, *continued))
    findings.checks.append(checks.round_trip(case.tokenizer, texts))
    if case.reader is None:
        findings.unchecked.append("the tokenizer: its source vocabulary is of no family known here")
        return
    wrong = [text for text in texts if case.tokenizer.prompt(text) != case.prompt(text)]
    detail = f"other ids than the checkpoint's vocabulary gives for {wrong[0][:40]!r}" if wrong else "ids equal"
    findings.checks.append(Check("tokenizer against the source vocabulary", ok=not wrong, detail=detail))
