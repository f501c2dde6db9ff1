"""Advice for a bundle refused for its loss: the tensors that cost most, and a scheme that would pass.

It is measured on the original model (:mod:`stages.verification.advice`), and the figure of each tensor and scheme is
memoised. So verify with other limits, or again, measures only what is not known.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from stages.quantization.calibrated import BY_CALIBRATION
from stages.quantization.schemes import FLOAT_BITS, SCHEMES, own_rows
from stages.verification import advice, apart, gates, original
from stages.verification.advice import INT8, SCHEME_TOKENS, TENSOR_TOKENS, AdviceRequest
from stages.verification.loss import Loss

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from stages.documents.files import JsonObject
    from stages.documents.params import Parameter, Register
    from stages.memo import NewPart
    from stages.quantization.schemes import Scheme
    from stages.verification.apart import Progress
    from stages.verification.case import Case

KIND = "advice"  # of part: the divergence by one tensor, the tensors there are, the figures of one scheme
# Schemes to change to, the smallest first.
CANDIDATES = ("q4s32", "q4a32", "q4f16_2", "q8f16_1", "q0f16", "q0f32")
FLOAT = "float32"  # arithmetic of activations
PLAIN = "mse"  # how scales are chosen here of what calibration has chosen: its results are no input of verify
NAMED = 3  # of the worst tensors, in a message

Candidate = tuple[str, str]  # scheme and arithmetic


def ask(case: Case, progress: Progress, *, activations: bool = False) -> list[str]:
    """Return the advice as sentences; one that says so if nothing could be measured. The refusal stands in any case.

    With ``activations``, int8 ones are what cost too much: layers are named, and nothing with such is proposed.
    """
    scheme, mixed = SCHEMES[case.registry["scheme"]], bool(own_rows(case.registry))
    arithmetic = FLOAT if activations else case.arithmetic
    if mixed:
        bits = _bits_of_matrices(case.registry)
        candidates = [(name, arithmetic) for name in CANDIDATES if _kept(SCHEMES[name])[0] > bits]
    else:
        candidates = [(name, arithmetic) for name in CANDIDATES if _kept(SCHEMES[name]) > _kept(scheme)]
    if case.arithmetic == INT8 and not mixed:
        candidates.insert(0, (scheme.name, FLOAT))
    try:
        divergences, layers, figures = _measured(case, scheme, candidates, progress, activations)
    except apart.LiveError as error:
        return [f"advice could not be measured: {error}"]
    sentences = []
    of = f"(KL of {TENSOR_TOKENS} tokens)"
    if layers:
        sentences.append(f"layers whose int8 activations alone cost most {of}: {_worst(layers)}")
    if divergences:
        how = f", with scales: {PLAIN}" if case.scales in BY_CALIBRATION else ""
        sentences.append(f"tensors whose quantization alone costs most {of}{how}: {_worst(divergences)}")
    for (name, arithmetic), found in figures.items():
        if advice.passes(name, arithmetic, found, case.limits):
            float_instead = case.arithmetic == INT8 and arithmetic != INT8
            label = f"{name} with activations: float" if float_instead else name
            use = "give the rows of their own more bits, or use it without them" if mixed else "use it"
            sentences.append(
                f"{label} stays within the limits on {SCHEME_TOKENS} tokens (KL {found.kl_mean:.2g}, {found.top1:.0%} "
                f"top-1 agreement): {use}, or set higher limits with verify's {', '.join(gates.NAMES)}"
            )
            break
    return sentences


def _worst(divergences: Mapping[str, float]) -> str:
    names = sorted(divergences, key=lambda name: (-divergences[name], name))[:NAMED]
    return ", ".join(f"{name} ({divergences[name]:.2g})" for name in names)


def _kept(scheme: Scheme) -> tuple[int, int, bool]:
    """Return the bits of the body, of the table, and what is closer at as many bits."""
    body, table = ((row.bits if row else FLOAT_BITS[scheme.storage_dtype]) for row in (scheme.body, scheme.embedding))
    return body, table, bool(scheme.body and scheme.body.minimum)


def _bits_of_matrices(register: Register) -> float:
    """Return the mean of the bits that the values of matrices are stored in."""
    floats = FLOAT_BITS[SCHEMES[register["scheme"]].storage_dtype]
    counts = [
        (math.prod(entry["shape"]), entry["quantize"]["bits"] if entry["quantize"] else floats)
        for entry in register["logical"]
        if entry["kind"] in ("linear", "embedding", "head")
    ]
    return sum(count * bits for count, bits in counts) / sum(count for count, _ in counts)


def _measured(
    case: Case, scheme: Scheme, candidates: Sequence[Candidate], progress: Progress, activations: bool
) -> tuple[dict[str, float], dict[str, float], dict[Candidate, Loss]]:
    """Return the divergence by tensor and, by ``activations``, by layer, and the figures of the candidates up to the
    first that passes.
    """
    shelf = _Shelf(case, scheme)
    names = shelf.names()
    divergences = {name: kl for name in names or () if (kl := shelf.tensor(name)) is not None}
    memoised = {candidate: figures for candidate in candidates if (figures := shelf.candidate(candidate)) is not None}
    good = next((c for c in candidates if c in memoised and advice.passes(*c, memoised[c], case.limits)), None)
    wanted = candidates if good is None else candidates[: candidates.index(good)]
    missing = [candidate for candidate in wanted if candidate not in memoised]
    layers = (shelf.layers() if activations else None) or {}
    unread = activations and not layers
    if names is None or divergences.keys() != set(names) or missing or unread:
        request = AdviceRequest(
            shelf.original_request, scheme.name, shelf.scales, missing, case.limits, [*divergences], unread, shelf.rows
        )
        found = apart.call(advice.__name__, asdict(request), progress)
        new = dict(zip(found["names"].tolist(), found["kl"].tolist(), strict=True))
        tried = [Loss(**each) for each in json.loads(str(found["tried"]))]
        measured = dict(zip(missing, tried, strict=False))  # up to the first that passes
        layers |= dict(zip(found["layers"].tolist(), found["layer_kl"].tolist(), strict=True))
        shelf.keep(sorted({*divergences, *new}), new, measured, layers if unread else None)
        divergences, memoised = divergences | new, memoised | measured
    return divergences, layers, {candidate: memoised[candidate] for candidate in candidates if candidate in memoised}


class _Shelf:
    """The figures that are kept of one checkpoint and scheme; without a memo there are none."""

    def __init__(self, case: Case, scheme: Scheme) -> None:
        read = replace(case.original, pieces=[case.original.pieces[0][: SCHEME_TOKENS + 1]])
        self.original_request = asdict(read)
        self._memo, self._folder = case.memo, case.scratch
        self._of = {"original": original.document(read, case.digests_read)}
        self.scales = PLAIN if case.scales in BY_CALIBRATION else case.scales
        entries: list[Parameter] = case.registry["logical"]
        self.rows = {name: entry["quantize"] for entry in entries for name in entry["source_names"]}
        self._tensors = {**self._of, "scheme": asdict(scheme), "scales": self.scales}
        self._layers = {**self._of, "scheme": asdict(scheme), "activations": INT8, "rows": self.rows}

    def names(self) -> list[str] | None:
        """Return which tensors the scheme quantizes, None where that was not seen yet."""
        found: list[str] | None = self._recall(self._names())
        return found

    def tensor(self, name: str) -> float | None:
        """Return the divergence where this tensor alone is quantized."""
        found: float | None = self._recall(self._tensor(name))
        return found

    def layers(self) -> dict[str, float] | None:
        """Return the divergence by layer where it alone reads int8 activations."""
        found: dict[str, float] | None = self._recall(self._layers)
        return found

    def candidate(self, candidate: Candidate) -> Loss | None:
        """Return the figures of another scheme."""
        found = self._recall(self._document(candidate))
        return None if found is None else Loss(**found)

    def keep(
        self,
        names: list[str],
        divergences: Mapping[str, float],
        figures: Mapping[Candidate, Loss],
        layers: Mapping[str, float] | None,
    ) -> None:
        """Keep what was measured, each by itself."""
        if self._memo is None:
            return
        values: list[tuple[JsonObject, Any]] = [(self._names(), names)]
        values += [(self._tensor(name), kl) for name, kl in divergences.items()]
        values += [(self._document(candidate), vars(found)) for candidate, found in figures.items()]
        values += [(self._layers, layers)] if layers is not None else []
        folder = self._folder / KIND
        folder.mkdir()
        parts: list[NewPart] = []
        for number, (document, value) in enumerate(values):
            file, data = folder / f"{number}.json", json.dumps(value).encode()
            file.write_bytes(data)
            parts.append((document, file, blake3(data).hexdigest(), {}))
        self._memo.remember_all(KIND, parts)
        shutil.rmtree(folder)

    def _names(self) -> JsonObject:
        return {**self._tensors, "rows": self.rows}

    def _tensor(self, name: str) -> JsonObject:
        return {**self._tensors, "tensor": name, "row": self.rows.get(name)}

    def _document(self, candidate: Candidate) -> JsonObject:
        scheme, arithmetic = candidate
        return {**self._of, "candidate": asdict(SCHEMES[scheme]), "arithmetic": arithmetic}

    def _recall(self, document: JsonObject) -> Any:
        part = self._memo.recall(KIND, document) if self._memo else None
        return None if part is None else json.loads(part.path.read_bytes())
