"""One bundle through all the checks: what needs no device first, then the reference, then the bundle at work."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from stages.models.checkpoint import read_headers
from stages.models.weights import Weights
from stages.quantization.schemes import SCHEMES
from stages.runtime import backend, host, manifest, tensor_cache
from stages.runtime.errors import BundleError
from stages.runtime.tokenizer import BundleTokenizer
from stages.verification import checks, live, weights
from stages.verification.checks import Check
from stages.verification.prompts import PARAGRAPH, PROMPTS
from stages.verification.reference import RECORD, RecordingError, Reference, read_recorded, recorded_prompts
from stages.verification.report import Findings
from stages.verification.tolerances import INT8_ACTIVATIONS, LOSS_RATIO, PERPLEXITY, TOLERANCES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from stages.runtime.session import Session
    from stages.tokenizers.record import Reference as SourceReader
    from stages.verification.reference import Continuation

PROMPT_TOKENS, DECODED_TOKENS = 64, 64
# A model that has learnt anything of a text is below this share of the loss of guessing.
_LOSS_SHARE = 0.6


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
    def bound(self) -> float:
        """How far logits may be from the reference's."""
        tolerance = TOLERANCES[self.registry["scheme"]]
        return max(tolerance, INT8_ACTIVATIONS) if self.rounds_activations else tolerance

    @property
    def rounds_activations(self) -> bool:
        """Whether the library quantizes activations."""
        return bool(self.manifest.model.get("activations") == "int8")

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


def verify(case: Case, progress: Callable[[int, int], None]) -> Findings:
    """Run the checks of ``case``; failed ones are among the findings, what cannot be begun is raised.

    Raises BundleError, RecordingError, LiveError or ConfigError, each with ``problems``.
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
    progress(1, 4)
    problems = weights.misplaced(case.registry, case.records) + weights.mismatched(case.registry, case.tensors)
    if problems:
        raise BundleError(*problems)
    _check_weights(case, findings)
    _check_tokenizer(case, findings)
    progress(2, 4)
    if findings.not_run:
        findings.device = findings.reference = "none"
        findings.unchecked.append(f"the library was not run: {findings.not_run}")
        return findings
    reference = _reference(case, findings)
    progress(3, 4)
    _check_session(case, reference, findings)
    progress(4, 4)
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


def _check_weights(case: Case, findings: Findings) -> None:
    scheme = SCHEMES[case.registry["scheme"]]
    checkpoint = Weights(case.files, case.tensors)
    differing = weights.differences(case.registry, case.records, scheme, checkpoint, case.scales)
    if differing:
        findings.checks += [Check("weights", ok=False, detail=text) for text in differing]
        return
    how = f"bit for bit as {scheme.storage_dtype}" if scheme.kind == "none" else f"within half a step of {scheme.name}"
    if case.scales != "max":
        how = f"within what {scheme.name} with searched scales may be off"
    compared = sum(len(entry["sources"]) for entry in case.registry["logical"])
    findings.checks.append(Check("weights", ok=True, detail=f"{compared} tensors of the checkpoint, {how}"))


def _check_tokenizer(case: Case, findings: Findings) -> None:
    prompt, continued = _prompts(case)
    texts = dict.fromkeys((*checks.PROBES, PARAGRAPH, prompt, *continued))
    findings.checks.append(checks.round_trip(case.tokenizer, texts))
    if case.reader is None:
        findings.unchecked.append("the tokenizer: its source vocabulary is of no family known here")
        return
    wrong = [text for text in texts if case.tokenizer.prompt(text) != case.prompt(text)]
    detail = f"other ids than the checkpoint's vocabulary gives for {wrong[0][:40]!r}" if wrong else "ids equal"
    findings.checks.append(Check("tokenizer against the source vocabulary", ok=not wrong, detail=detail))


def _reference(case: Case, findings: Findings) -> Reference | None:
    scheme = case.registry["scheme"]
    reference = None
    if case.reference == "recorded":
        reference = _recorded(case)
        if reference is None:
            findings.unchecked.append(f"logits and text: none are recorded for {scheme}; reference live computes them")
        elif reference.logits is None:
            findings.unchecked.append(f"logits: the recording for {scheme} holds text alone")
    elif case.reference == "live":
        reference = _live(case, findings)
    else:
        findings.unchecked.append(
            "logits and text: there is no reference; the library's functions were compared with one another"
        )
    if reference is None:
        findings.reference = "none"
    else:
        findings.origin = reference.origin
    return reference


def _recorded(case: Case) -> Reference | None:
    sizes = case.manifest.model
    return read_recorded(
        case.files, case.digests, case.registry["scheme"], vocab_size=sizes["vocab_size"], encode=case.prompt
    )


def _live(case: Case, findings: Findings) -> Reference:
    prompt, continued = _prompts(case)
    ids = _prompt_ids(case, prompt)
    window = case.manifest.model["context_window"]
    half = max(1, window // 2)
    prompts = {text: case.prompt(text) for text in continued}
    cut = [text for text, held in prompts.items() if len(held) > half]
    findings.unchecked += [f"text after {text[-24:]!r}: only its first {half} ids are read" for text in cut]
    request = live.Request(
        bundle=case.bundle,
        params=case.params,
        config=case.config,
        prompt=ids,
        steps=min(DECODED_TOKENS, window - len(ids)),
        prompts={text: held[:half] for text, held in prompts.items()},
        length=min(DECODED_TOKENS, window - half + 1),
        active_vocab_size=case.tokenizer.active_vocab_size,
        stop=sorted(case.tokenizer.stop),
    )
    computed = live.reference(request, prompt, case.decode)
    return replace(computed, continuations=[*computed.continuations, *_recorded_text(case, findings)])


def _recorded_text(case: Case, findings: Findings) -> list[Continuation]:
    """Return what is recorded for the scheme, if that is of this checkpoint: text that nobody here has decoded."""
    if RECORD not in case.files:
        return []
    try:
        recorded = _recorded(case)
    except RecordingError as error:
        findings.unchecked.append(f"the recorded text: {error.problems[0]}")
        return []
    return [replace(wanted, note=", recorded") for wanted in recorded.continuations] if recorded else []


def _prompts(case: Case) -> tuple[str, tuple[str, ...]]:
    """Return the text to read and the texts to continue: those that the checkpoint brings, else ours."""
    return recorded_prompts(case.files) or (PARAGRAPH, PROMPTS)


def _prompt_ids(case: Case, prompt: str) -> list[int]:
    length = min(PROMPT_TOKENS, max(1, case.manifest.model["context_window"] // 2))
    ids = case.encode(prompt)
    return [*case.prefix, *ids * (length // len(ids) + 1)][:length]


def _check_session(case: Case, reference: Reference | None, findings: Findings) -> None:
    from stages.runtime.session import Session

    session = Session(case.manifest, sequences=min(2, case.manifest.model["max_batch"]))
    bound = case.bound
    window = session.context_window
    if reference is None:
        ids = _prompt_ids(case, _prompts(case)[0])
        tokens, prompt = (ids * 2)[:window], len(ids)
    else:
        tokens, prompt = list(reference.tokens)[:window], min(reference.prompt_length, max(1, window // 2))
    rows = checks.decode_all(session, tokens)
    if not np.isfinite(rows).all():
        findings.checks.append(Check(checks.EVERY_STEP, ok=False, detail="logits that are not finite"))
        return
    wanted = rows
    if reference is not None and reference.logits is not None:
        wanted = reference.logits[: len(tokens)]
        findings.checks.append(checks.compare(checks.EVERY_STEP, rows, wanted, bound))
        if prompt > 1:
            findings.checks.append(checks.perplexity(rows[:prompt], wanted[:prompt], tokens[:prompt], PERPLEXITY))
    findings.checks += checks.logits(session, tokens, prompt, wanted, bound)
    _check_functions(case, session, tokens, rows, findings)
    if reference is not None:
        _check_text(case, session, reference, findings)
    if prompt < checks.SHORTEST:
        findings.unchecked.append(f"chunks, tokens taken back, batches: {window} tokens of context are too few")
    _check_loss(case, session, findings)


def _check_functions(case: Case, session: Session, tokens: list[int], rows: np.ndarray, findings: Findings) -> None:
    if case.manifest.model["sep_embed"]:
        held = weights.held(case.registry, case.records, SCHEMES[case.registry["scheme"]])
        name = next(entry["sources"][0] for entry in case.registry["logical"] if entry["kind"] == "embedding")
        table = next(tensor for tensor in held if tensor.name == name)
        findings.checks.append(checks.embedding(session, tokens, table.rows))
    findings.checks.append(checks.softmax(session, rows))
    if session.sequences == 1:
        findings.unchecked.append("batches: the library was built for one sequence (max_batch)")


def _check_text(case: Case, session: Session, reference: Reference, findings: Findings) -> None:
    ids = case.tokenizer.prompt(reference.prompt)[: reference.prompt_length]
    if ids != list(reference.tokens[: len(ids)]):
        detail = "the bundle's tokenizer gives other ids for the reference's prompt"
        findings.checks.append(Check("tokenizer against the reference", ok=False, detail=detail))
    exact = case.manifest.model["compute_dtype"] == "float32" and not case.rounds_activations
    bound = case.bound
    for wanted in reference.continuations:
        count = len(wanted.prompt_ids) + len(wanted.ids) - 1  # the last id is not read
        if not wanted.ids:
            findings.unchecked.append(f"text after {wanted.prompt[-24:]!r}: the reference ends it there")
        elif count > session.context_window:
            findings.unchecked.append(
                f"text after {wanted.prompt[-24:]!r}: {count} tokens, the context holds {session.context_window}"
            )
        else:
            findings.checks.append(checks.greedy(session, case.tokenizer, wanted, bound, exact=exact))


def _check_loss(case: Case, session: Session, findings: Findings) -> None:
    """Read a text with the bundle's own ids, and with those ids under a permutation of the vocabulary.

    A model that was trained with other ids is no better at the first than at the second: the one symptom of a wrong
    vocabulary in the checkpoint itself. Weights that know nothing look the same, so this warns and does not fail.
    """
    ids = case.tokenizer.prompt(_prompts(case)[0])[: min(PROMPT_TOKENS, session.context_window)]
    if len(ids) < 2:
        return
    findings.loss, control = checks.losses(session, ids, case.tokenizer.active_vocab_size)
    guessing = math.log(session.vocab_size)
    limit = _LOSS_SHARE * guessing
    if findings.loss > limit:
        findings.warnings.append(
            f"the mean loss on the prompt is {findings.loss:.2f} nats a token, above {limit:.2f} "
            f"({_LOSS_SHARE} of guessing): the checkpoint does not know such text, or its tokenizer is another's"
        )
    ratio = findings.loss / control
    detail = f"{findings.loss:.2f} nats a token, {ratio:.2f} of what the same ids permuted give ({control:.2f})"
    findings.checks.append(Check("loss", ok=True, detail=detail, measured=ratio, bound=LOSS_RATIO))
    if ratio > LOSS_RATIO:
        findings.warnings.append(
            f"the model reads the prompt no better than its ids in disorder ({detail}; with its own tokenizer at most "
            f"{LOSS_RATIO}): the vocabulary is another model's, or the weights know nothing"
        )
