"""Checks that run the bundle: its logits and text against a reference's, and its functions against one another."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stages.quantization.schemes import SCHEMES
from stages.runtime import golden
from stages.runtime.readings import SHORTEST, read_along, score_all
from stages.runtime.session import Session
from stages.verification import checks, gates, live, quality, weights
from stages.verification.apart import LiveError
from stages.verification.checks import Check
from stages.verification.reference import RECORD, Continuation, RecordingError, Reference, read_recorded
from stages.verification.tolerances import (
    INT8_ACTIVATIONS,
    LOSS_RATIO,
    PERPLEXITY,
    TELLS_LITTLE,
    TOLERANCES,
    spread_bound,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from stages.runtime.manifest import Manifest
    from stages.verification.apart import Progress
    from stages.verification.case import Case
    from stages.verification.report import Findings

PROMPT_TOKENS, DECODED_TOKENS = 64, 64
# A model that has learnt anything of a text is below this share of the loss of guessing.
_LOSS_SHARE = 0.6


class _WatchedSession(Session):
    """A session that tells ``progress`` how many tokens it has read: of how many is not known where the bundle itself
    decides when an answer ends.
    """

    def __init__(self, manifest: Manifest, progress: Progress) -> None:
        super().__init__(manifest, sequences=min(2, manifest.model["max_batch"]))
        self._progress, self._read = progress, 0
        self._total, self._unit = 0, "tokens read"

    def expect(self, total: int, unit: str) -> None:
        """Count from zero: ``total`` tokens follow."""
        self._read, self._total, self._unit = 0, total, unit

    def _forward(self, function: str, requests: Mapping[int, Sequence[int]], *arguments: Any) -> np.ndarray:
        logits = super()._forward(function, requests, *arguments)
        self._read += sum(len(ids) for ids in requests.values())
        self._progress(self._read, self._total, self._unit)
        return logits


@dataclass(frozen=True)
class _Draft:
    """What the bundle itself says after ``prompt_ids``: ``ids``, and the logits [n, V] that each was picked from."""

    prompt: str
    prompt_ids: Sequence[int]
    ids: Sequence[int]
    rows: np.ndarray


def check(case: Case, findings: Findings, progress: Progress) -> None:
    """Run the bundle of ``case`` and add what is found to ``findings``.

    Raises BundleError, RecordingError or LiveError.
    """
    recorded = _recorded(case) if case.reference == "recorded" else None
    session = _WatchedSession(case.manifest, progress)
    drafts: list[_Draft] = []
    original: Mapping[str, np.ndarray] | None = None
    if recorded is not None:
        tokens = list(recorded.tokens)[: session.context_window]
        prompt = min(recorded.prompt_length, max(1, session.context_window // 2))
        decoded = read_along(session, tokens[:prompt], tokens[prompt:])
        reference, bound = recorded, _recorded_bound(case)
    else:
        ids = _prompt_ids(case, case.prompts[0])
        steps = min(DECODED_TOKENS, session.context_window - len(ids))
        picked, decoded = checks.read_greedily(session, ids, steps + 1, case.tokenizer.active_vocab_size)
        tokens, prompt = [*ids, *picked[:-1]], len(ids)
        reference, bound = None, _recorded_bound(case)
        if case.reference == "live":
            drafts = _drafts(case, session, findings)
            original = case.known_original()
            answer = _ask(case, tokens, drafts, progress, with_original=original is None)
            original = original or answer.original
            reference, bound = _live(case, answer, tokens, prompt, drafts)
            if bound >= TELLS_LITTLE:
                findings.warnings.append(
                    f"rounding alone moves logits by {answer.spread:.0%} of the largest: that those of the bundle are "
                    f"within {bound:g} of it proves little; the KL divergence from the original says more"
                )
    _say_what_there_is(case, reference, findings)
    _check_logits(case, session, tokens, prompt, decoded, reference, bound, findings)
    if reference is not None:
        _check_text(case, session, reference, drafts, bound, findings)
    if original is not None:
        session.expect(sum(map(len, case.probes.pieces)), "tokens compared with the original")
    quality.check(case, session, original, findings, progress)


def _recorded(case: Case) -> Reference | None:
    sizes = case.manifest.model
    return read_recorded(
        case.files, case.digests, case.registry["scheme"], vocab_size=sizes["vocab_size"], encode=case.prompt
    )


def _recorded_bound(case: Case) -> float:
    tolerance = TOLERANCES[case.registry["scheme"]]
    return max(tolerance, INT8_ACTIVATIONS) if case.in_bytes else tolerance


def _prompt_ids(case: Case, prompt: str) -> list[int]:
    length = min(PROMPT_TOKENS, max(1, case.manifest.model["context_window"] // 2))
    ids = case.encode(prompt)
    return [*case.prefix, *ids * (length // len(ids) + 1)][:length]


def _drafts(case: Case, session: Session, findings: Findings) -> list[_Draft]:
    window = session.context_window
    half = max(1, window // 2)
    drafts = []
    for text in case.prompts[1]:
        ids = case.prompt(text)
        if len(ids) > half:
            findings.unchecked.append(f"text after {text[-24:]!r}: only its first {half} ids are used")
            ids = ids[:half]
        length = min(DECODED_TOKENS, window - half + 1)
        active, stop = case.tokenizer.active_vocab_size, case.tokenizer.stop
        drafts.append(_Draft(text, ids, *checks.read_greedily(session, ids, length, active, stop)))
    return drafts


def _ask(
    case: Case, tokens: Sequence[int], drafts: Sequence[_Draft], progress: Progress, *, with_original: bool
) -> live.ReferenceAnswer:
    """Compute the live reference of ``tokens`` and of the drafts and, where it is not known yet, the original's."""
    request = live.LiveRequest(
        bundle=case.bundle,
        params=case.params,
        config=case.config,
        tokens=tokens,
        arithmetic=case.arithmetic,
        int8_cache=checks.CACHE in case.in_bytes,
        continued=[(draft.prompt_ids, draft.ids) for draft in drafts],
        active_vocab_size=case.tokenizer.active_vocab_size,
        original=asdict(case.original) if with_original and case.probes.count else None,
    )
    answer = live.answer(request, progress)
    if not math.isfinite(answer.spread):
        raise LiveError(
            "the live reference's own logits are not finite, in float32 on the weights that the bundle holds: the "
            "checkpoint overflows, or its weights are damaged; nothing can be compared with that"
        )
    if answer.original is not None:
        case.keep_original(answer.original)
    return answer


def _live(
    case: Case, answer: live.ReferenceAnswer, tokens: Sequence[int], prompt: int, drafts: Sequence[_Draft]
) -> tuple[Reference, float]:
    """Return the live reference, and how far logits may be from it."""
    continuations = [_continuation(case, draft, picks) for draft, picks in zip(drafts, answer.picks, strict=True)]
    reference = Reference(answer.origin, case.prompts[0], prompt, tokens, answer.logits, continuations)
    return reference, spread_bound(case.coarsest, answer.spread)


def _continuation(case: Case, draft: _Draft, picks: Sequence[int]) -> Continuation:
    """Return what the reference says in place of a draft, as far as it read what the draft says."""
    pairs = enumerate(zip(draft.ids, picks, strict=True))
    parted = next((position for position, (ours, theirs) in pairs if ours != theirs), len(picks) - 1)
    ids = list(picks[: parted + 1])
    text = case.decode([token for token in ids if token not in case.tokenizer.stop])
    return Continuation(draft.prompt, draft.prompt_ids, ids, text)


def _say_what_there_is(case: Case, reference: Reference | None, findings: Findings) -> None:
    if reference is not None:
        findings.origin = reference.origin
        if reference.logits is None:
            findings.unchecked.append(f"logits: the recording for {case.registry['scheme']} holds text alone")
        return
    findings.reference = "none"
    if case.reference == "recorded":
        scheme = case.registry["scheme"]
        findings.unchecked.append(f"logits and text: none are recorded for {scheme}; reference live computes them")
    else:
        findings.unchecked.append(
            "logits and text: there is no reference; the library's functions were compared with one another"
        )


def _check_logits(
    case: Case,
    session: Session,
    tokens: Sequence[int],
    prompt: int,
    decoded: np.ndarray,
    reference: Reference | None,
    bound: float,
    findings: Findings,
) -> None:
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
        if case.in_bytes:
            limits = gates.limits(SCHEMES[case.registry["scheme"]], case.coarsest, case.limits)
            findings.checks.append(gates.activations(rows, wanted, limits, case.in_bytes))
    origin = findings.origin if wanted is not rows else "the bundle itself, on the machine that verified it"
    findings.golden = golden.vectors(tokens, prompt, wanted, bound, session.sequences, origin)
    findings.checks += checks.logits(session, tokens, prompt, decoded, wanted, bound)
    if case.manifest.model["sep_embed"] and _embeds_rows(case):
        tensors = weights.bundled_tensors(case.registry, case.records)
        name = next(entry["source_names"][0] for entry in case.registry["logical"] if entry["kind"] == "embedding")
        table = next(tensor for tensor in tensors if tensor.name == name)
        findings.checks.append(checks.embedding(session, tokens, table.rows))
    findings.checks.append(checks.softmax(session, rows))
    if session.sequences == 1:
        findings.unchecked.append("batches: the library was built for one sequence (max_batch)")
    if prompt < SHORTEST:
        window = session.context_window
        findings.unchecked.append(f"chunks, tokens taken back, batches: a context of {window} tokens is too short")
    _check_loss(case, session, tokens, rows, findings)


def _embeds_rows(case: Case) -> bool:
    """Say whether embeddings are the table's rows: a traced model may make something of them, which logits show."""
    parts = json.loads(Path(case.config).read_bytes())["config"].get("parts")
    return parts is None or [name for name, _ in parts["embed"]["nodes"]] == ["embedding"]


def _check_text(
    case: Case,
    session: Session,
    reference: Reference,
    drafts: Sequence[_Draft],
    bound: float,
    findings: Findings,
) -> None:
    ids = case.tokenizer.prompt(reference.prompt)[: reference.prompt_length]
    if ids != list(reference.tokens[: len(ids)]):
        detail = "the bundle's tokenizer gives other ids for the reference's prompt"
        findings.checks.append(Check("tokenizer against the reference", ok=False, detail=detail))
    if drafts:
        for draft, wanted in zip(drafts, reference.continuations, strict=True):
            rows = draft.rows[: len(wanted.ids)]
            findings.checks.append(checks.greedy(case.tokenizer, rows, wanted, bound, exact=False))
        _check_recorded_text(case, session, _recorded_beside(case, findings), findings)
    else:
        _check_recorded_text(case, session, reference.continuations, findings)


def _recorded_beside(case: Case, findings: Findings) -> list[Continuation]:
    """Return what is recorded for the scheme, if that is of this checkpoint: text that nobody here has decoded."""
    if RECORD not in case.files:
        return []
    try:
        recorded = _recorded(case)
    except RecordingError as error:
        findings.unchecked.append(f"the recorded text: {error.problems[0]}")
        return []
    return [replace(wanted, note=", recorded") for wanted in recorded.continuations] if recorded else []


def _check_recorded_text(case: Case, session: Session, recorded: Sequence[Continuation], findings: Findings) -> None:
    """Let the bundle read what is recorded; in exact arithmetic no choice of a recording is close enough to differ."""
    exact, bound = case.coarsest == "float32", _recorded_bound(case)
    for wanted in recorded:
        count = len(wanted.prompt_ids) + len(wanted.ids) - 1  # the last id is not read
        if not wanted.ids:
            findings.unchecked.append(f"text after {wanted.prompt[-24:]!r}: the reference ends it there")
        elif count > session.context_window:
            findings.unchecked.append(
                f"text after {wanted.prompt[-24:]!r}: {count} tokens, the context holds {session.context_window}"
            )
        else:
            rows = read_along(session, wanted.prompt_ids, wanted.ids[:-1])
            findings.checks.append(checks.greedy(case.tokenizer, rows, wanted, bound, exact=exact))


def _check_loss(case: Case, session: Session, tokens: Sequence[int], rows: np.ndarray, findings: Findings) -> None:
    """Read a text with the bundle's own ids, and with those ids under a permutation of the vocabulary.

    ``rows`` [n, V] are the logits after each of ``tokens``, which begin with that text if it is as long.
    A model that was trained with other ids is no better at the first than at the second: the one symptom of a wrong
    vocabulary in the checkpoint itself. Weights that know nothing look the same, so this warns and does not fail.
    """
    ids = case.tokenizer.prompt(case.prompts[0])[: min(PROMPT_TOKENS, session.context_window)]
    if len(ids) < 2:
        return
    known = list(tokens[: len(ids)]) == ids
    findings.loss = checks.mean_loss(rows if known else score_all(session, ids), ids)
    control = checks.disorder_loss(session, ids, case.tokenizer.active_vocab_size)
    guessing = math.log(session.vocab_size)
    limit = _LOSS_SHARE * guessing
    if findings.loss > limit:
        findings.warnings.append(
            f"the mean loss on the prompt is {findings.loss:.2f} nats per token, above {limit:.2f} "
            f"({_LOSS_SHARE} of guessing): the checkpoint does not know such text, or its tokenizer is another's"
        )
    ratio = findings.loss / control
    detail = f"{findings.loss:.2f} nats per token, {ratio:.2f} of what the same ids permuted give ({control:.2f})"
    findings.checks.append(Check("loss", ok=True, detail=detail, measured=ratio, bound=LOSS_RATIO))
    if ratio > LOSS_RATIO:
        findings.warnings.append(
            f"the model reads the prompt no better than its ids in disorder ({detail}; with its own tokenizer at most "
            f"{LOSS_RATIO}): the vocabulary is another model's, or the weights know nothing"
        )


def expect(case: Case, findings: Findings, progress: Progress) -> None:
    """Add golden vectors for a machine that can run the library to ``findings``, where this one cannot.

    They are what a reference gives for its own text, or for the prompt; where there is none, that is said.
    """
    window = case.manifest.model["context_window"]
    try:
        if case.reference == "live":
            tokens = _prompt_ids(case, case.prompts[0])
            original = case.known_original()
            narrow = case.manifest.model["compute_dtype"] == "float16"
            answer = _ask(case, tokens, (), progress, with_original=narrow and original is None)
            quality.check_range(case, original or answer.original, findings)
            reference, bound = _live(case, answer, tokens, max(1, len(tokens) // 2), ())
        else:
            found = _recorded(case) if case.reference == "recorded" else None
            if found is None:
                return
            reference, bound = found, _recorded_bound(case)
    except (LiveError, RecordingError) as error:
        findings.unchecked.append(f"values for self-tests on other machines: {error.problems[0]}")
        return
    if reference.logits is not None:
        tokens = list(reference.tokens)[:window]
        prompt = min(reference.prompt_length, max(1, window // 2))
        sequences = min(golden.SEQUENCES, case.manifest.model["max_batch"])
        findings.golden = golden.vectors(tokens, prompt, reference.logits, bound, sequences, reference.origin)
