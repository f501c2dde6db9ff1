"""What verify writes: verify.json, what was measured of a bundle and against what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypedDict


class CheckLine(TypedDict):
    """One check; ``measured`` and ``bound`` are relative differences, where the check has numbers that are finite."""

    name: str
    ok: bool
    detail: str
    measured: float | None
    bound: float | None


class LossFigures(TypedDict):
    """The fields of stages.verification.loss:Loss; null in place of a number that is not finite."""

    tokens: int
    kl_mean: float | None
    kl_error: float | None
    kl_median: float | None
    kl_99: float | None
    kl_999: float | None
    kl_max: float | None
    top1: float | None
    perplexity: float | None
    perplexity_original: float | None
    perplexity_ratio: float | None
    perplexity_ratio_error: float | None


class QuantizationLoss(TypedDict):
    """What quantization has cost against the ``original``: figures of ``all`` places and of each kind of text."""

    original: str
    longest: int
    all: LossFigures
    kinds: Mapping[str, LossFigures]


class ReferenceUsed(TypedDict):
    """The reference of a comparison: ``kind`` is the parameter of verify, ``origin`` says what computed it."""

    kind: str
    origin: str


class Verification(TypedDict):
    """verify.json: ``loss`` is in nats per token of the prompt, ``unchecked`` says what was not checked."""

    schema: int
    verdict: str
    bundle: str
    scheme: str
    target: str
    device: str
    reference: ReferenceUsed
    loss: float | None
    quantization: QuantizationLoss | None
    checks: Sequence[CheckLine]
    unchecked: Sequence[str]
