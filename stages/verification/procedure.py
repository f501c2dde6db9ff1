"""One bundle through all the checks: what needs no device first, then the reference, then the bundle at work."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from stages.models.checkpoint import read_headers
from stages.models.weights import Weights
from stages.quantization.schemes import SCHEMES
from stages.runtime import manifest, tensor_cache
from stages.runtime.errors import BundleError
from stages.runtime.tokenizer import BundleTokenizer
from stages.verification import checks, live, weights
from stages.verification.checks import Check
from stages.verification.prompts import PARAGRAPH, PROMPTS
from stages.verification.reference import Reference, read_recorded, recorded_prompts
from stages.verification.report import Findings
from stages.verification.tolerances import LOSS_RATIO, TOLERANCES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from stages.runtime.session import Session

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
    reference: str
    device: str

    @cached_property
    def registry(self) -> dict[str, Any]:
        """params.json."""
        document: dict[str, Any] = json.loads(self.params.read_text("utf-8"))
        return document

    @cached_property
    def manifest(self) -> manifest.Manifest:
        """The bundle's own description."""
        return manifest.read(self.bundle)

    @cached_property
    def tokenizer(self) -> BundleTokenizer:
        """The bundle's tokenizer."""
        return BundleTokenizer(self.bundle)

    @cached_property
    def records(self) -> dict[str, tensor_cache.Record]:
        """Where the bundle's weights are."""
        return tensor_cache.records(self.bundle)


def verify(case: Case, progress: Callable[[int, int], None]) -> Findings:
    """Run the checks of ``case``; failed ones are among the findings, what cannot be begun is raised.

    Raises BundleError, RecordingError, LiveError or ConfigError, each with ``problems``.
    """
    model = case.manifest.model
    findings = Findings(case.manifest.name, model["scheme"], case.manifest.target, case.device, case.reference)
    problems = manifest.check(case.manifest, run=case.device != "none")
    if problems:
        raise BundleError(*problems)
    findings.checks.append(Check("files", ok=True, detail=f"{len(case.manifest.files)} files as bundle.json has them"))
    progress(1, 4)
    problems = weights.misplaced(case.registry, case.records)
    if problems:
        raise BundleError(*problems)
    _check_weights(case, findings)
    _check_tokenizer(case, findings)
    progress(2, 4)
    if case.device == "none":
        findings.reference = "none"
        findings.unchecked.append("the library was not run: there is no CUDA device here")
        return findings
    reference = _reference(case, findings)
    progress(3, 4)
    _check_session(case, reference, findings)
    progress(4, 4)
    return findings


def _check_weights(case: Case, findings: Findings) -> None:
    headers = read_headers({name: path for name, path in case.files.items() if "/" not in name})
    table = {name: {"dtype": t.dtype, "shape": [*t.shape], "file": file} for name, (file, t) in headers.items()}
    scheme = SCHEMES[case.registry["scheme"]]
    differing = weights.differences(case.registry, case.records, scheme, Weights(case.files, table))
    if differing:
        findings.checks += [Check("weights", ok=False, detail=text) for text in differing]
        return
    how = f"within half a step of {scheme.name}" if scheme.kind == "group" else f"bit for bit as {scheme.storage_dtype}"
    compared = sum(len(entry["sources"]) for entry in case.registry["logical"])
    findings.checks.append(Check("weights", ok=True, detail=f"{compared} tensors of the checkpoint, {how}"))


def _check_tokenizer(case: Case, findings: Findings) -> None:
    texts = (*checks.PROBES, PARAGRAPH)
    findings.checks.append(checks.round_trip(case.tokenizer, texts))
    reader = _independent_reader(case)
    if reader is None:
        findings.unchecked.append("the tokenizer: its source vocabulary is of no family known here")
        return
    wrong = [text for text in texts if case.tokenizer.encode(text) != reader.encode(text, specials=False)]
    detail = f"other ids than the checkpoint's vocabulary gives for {wrong[0][:40]!r}" if wrong else "ids equal"
    findings.checks.append(Check("tokenizer against the source vocabulary", ok=not wrong, detail=detail))


def _independent_reader(case: Case) -> Any:
    from stages.tokenizers import load_tokenizer_family
    from stages.tokenizers.errors import TokenizerError
    from stages.tokenizers.resolution import resolve

    try:
        resolution = resolve(case.root, case.files)
    except TokenizerError:
        return None
    return load_tokenizer_family(resolution.family).reference(resolution)


def _reference(case: Case, findings: Findings) -> Reference | None:
    scheme = case.registry["scheme"]
    reference = None
    if case.reference == "recorded":
        reference = read_recorded(case.files, case.digests, scheme)
        if reference is None:
            findings.unchecked.append(f"logits and text: none are recorded for {scheme}; reference live computes them")
        elif reference.logits is None:
            findings.unchecked.append(f"logits: the recording for {scheme} holds text alone")
    elif case.reference == "live":
        reference = _live(case)
    else:
        findings.unchecked.append(
            "logits and text: there is no reference; the library's functions were compared with one another"
        )
    if reference is None:
        findings.reference = "none"
    else:
        findings.origin = reference.origin
    return reference


def _live(case: Case) -> Reference:
    prompt, continued = _prompts(case)
    ids = _prompt_ids(case, prompt)
    window = case.manifest.model["context_window"]
    request = live.Request(
        bundle=case.bundle,
        params=case.params,
        config=case.config,
        prompt=ids,
        steps=min(DECODED_TOKENS, window - len(ids)),
        prompts={text: case.tokenizer.encode(text)[: window // 2] for text in continued},
        length=min(DECODED_TOKENS, window // 2),
        active_vocab_size=case.tokenizer.active_vocab_size,
        stop=sorted(case.tokenizer.stop),
    )
    return live.reference(request, prompt, case.tokenizer.decode)


def _prompts(case: Case) -> tuple[str, tuple[str, ...]]:
    """Return the text to read and the texts to continue: those that the checkpoint brings, else ours."""
    return recorded_prompts(case.files) or (PARAGRAPH, PROMPTS)


def _prompt_ids(case: Case, prompt: str) -> list[int]:
    length = min(PROMPT_TOKENS, case.manifest.model["context_window"] // 2)
    ids: list[int] = case.tokenizer.encode(prompt)
    repeated = ids * (length // len(ids) + 1)
    return repeated[:length]


def _check_session(case: Case, reference: Reference | None, findings: Findings) -> None:
    from stages.runtime.session import Session

    session = Session(case.manifest, sequences=min(2, case.manifest.model["max_batch"]))
    bound = TOLERANCES[case.registry["scheme"]]
    window = session.context_window
    if reference is None:
        ids = _prompt_ids(case, _prompts(case)[0])
        tokens, prompt = (ids * 2)[:window], len(ids)
    else:
        tokens, prompt = list(reference.tokens)[:window], min(reference.prompt_length, window // 2)
    rows = checks.decode_all(session, tokens)
    if not np.isfinite(rows).all():
        findings.checks.append(Check("every step", ok=False, detail="logits that are not finite"))
        return
    wanted = rows
    if reference is not None and reference.logits is not None:
        wanted = reference.logits[: len(tokens)]
        findings.checks.append(checks.compare("every step", rows, wanted, bound))
    findings.checks += checks.logits(session, tokens, prompt, wanted, bound)
    _check_functions(case, session, tokens, rows, findings)
    if reference is not None:
        _check_text(case, session, reference, findings)
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
    ids = case.tokenizer.encode(reference.prompt)[: reference.prompt_length]
    if ids != list(reference.tokens[: len(ids)]):
        detail = "the bundle's tokenizer gives other ids for the reference's prompt"
        findings.checks.append(Check("tokenizer against the reference", ok=False, detail=detail))
    exact = case.manifest.model["compute_dtype"] == "float32"
    bound = TOLERANCES[case.registry["scheme"]]
    findings.checks += [
        checks.greedy(session, case.tokenizer, wanted, bound, exact=exact) for wanted in reference.continuations
    ]


def _check_loss(case: Case, session: Session, findings: Findings) -> None:
    """Read a text with the bundle's own ids, and with those ids under a permutation of the vocabulary.

    A model that was trained with other ids is no better at the first than at the second: the one symptom of a wrong
    vocabulary in the checkpoint itself. Weights that know nothing look the same, so this warns and does not fail.
    """
    ids = case.tokenizer.prompt(_prompts(case)[0])[: min(PROMPT_TOKENS, session.context_window)]
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
