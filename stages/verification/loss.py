"""Measures the loss by quantization: the bundle's probabilities against the original model's, token by token.

The Kullback-Leibler divergence of the original's distribution P from the bundle's Q, in nats: sum of p log(p / q). The
original's 1,024 likeliest tokens are taken one by one and all others as one, which makes the divergence a little
smaller than it is (docs/verification.md has how much).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from stages.documents.verification import LossFigures, QuantizationLoss
    from stages.runtime.session import Session
    from stages.verification.probes import Probes

LEAST = 1e-12  # of a probability that a sum of others leaves: below it is rounding


@dataclass(frozen=True)
class Loss:
    """Figures over ``tokens`` places.

    ``kl``: mean, its standard error, median, 99 and 99.9 percent, and largest, in nats. ``top1``: the share of places
    whose likeliest token is the same. ``perplexity`` of the bundle and of the original, their ratio and its standard
    error. Neighbouring places are alike, so that the errors are those of as many independent ones.
    """

    tokens: int
    kl_mean: float
    kl_error: float
    kl_median: float
    kl_99: float
    kl_999: float
    kl_max: float
    top1: float
    perplexity: float
    perplexity_original: float
    perplexity_ratio: float
    perplexity_ratio_error: float

    def document(self) -> LossFigures:
        """Return the figures as numbers of four digits."""
        digits = {name: float(f"{value:.4g}") for name, value in vars(self).items()}
        return cast("LossFigures", {**digits, "tokens": self.tokens})


@dataclass(frozen=True)
class Places:
    """Of each place: the divergence in nats, whether the likeliest token is the same, and both models' log
    probabilities of the token that stands there. All of shape [n].
    """

    kl: np.ndarray
    same: np.ndarray
    chosen: np.ndarray
    chosen_original: np.ndarray

    def figures(self, where: np.ndarray | None = None) -> Loss:
        """Return the figures of all places, or of those that are true in ``where`` bool [n]."""
        kl, same, chosen, original = (
            each if where is None else each[where] for each in (self.kl, self.same, self.chosen, self.chosen_original)
        )
        more = original - chosen
        root = math.sqrt(len(kl))
        with np.errstate(over="ignore", invalid="ignore"):
            ratio = float(np.exp(more.mean()))
            return Loss(
                tokens=len(kl),
                kl_mean=float(kl.mean()),
                kl_error=float(kl.std() / root),
                kl_median=float(np.median(kl)),
                kl_99=float(np.quantile(kl, 0.99)),
                kl_999=float(np.quantile(kl, 0.999)),
                kl_max=float(kl.max()),
                top1=float(same.mean()),
                perplexity=float(np.exp(-chosen.mean())),
                perplexity_original=float(np.exp(-original.mean())),
                perplexity_ratio=ratio,
                perplexity_ratio_error=float(ratio * more.std() / root),
            )


def measure(session: Session, probes: Probes, original: Mapping[str, np.ndarray]) -> Places:
    """Let the bundle read the probes and compare each position with the results of ``original``."""
    found = []
    start = 0
    for piece in probes.pieces:
        sequence = session.add()
        at = 0
        for rows in session.score(sequence, piece):
            first, last = max(at, probes.skipped), min(at + len(rows), len(piece) - 1)
            if first < last:
                here = slice(start, start + last - first)
                found.append(_compare(rows[first - at : last - at], piece[first + 1 : last + 1], original, here))
                start = here.stop
            at += len(rows)
        session.remove(sequence)
    return Places(*(np.concatenate(column) for column in zip(*found, strict=True)))


def report(places: Places, probes: Probes, origin: str) -> QuantizationLoss:
    """Return the figures of all places and of each kind of text."""
    kinds = np.array(probes.compared_kinds())
    return {
        "original": origin,
        "longest": probes.longest,
        "all": places.figures().document(),
        "kinds": {kind: places.figures(kinds == kind).document() for kind in dict.fromkeys(kinds.tolist())},
    }


def _compare(
    rows: np.ndarray, following: Sequence[int], original: Mapping[str, np.ndarray], here: slice
) -> Iterable[np.ndarray]:
    """Return the columns of :class:`Places` for logits ``rows`` [n, V]; infinities where they are not finite."""
    ids = original["original_ids"][here].astype(np.int64)
    log_p = original["original_log_probs"][here].astype(np.float64)
    rows = rows.astype(np.float32, copy=False)
    top = rows.max(-1, keepdims=True)
    with np.errstate(invalid="ignore", over="ignore"):
        total = np.exp(rows - top).sum(-1, dtype=np.float64)
        log_sum = top[:, 0].astype(np.float64) + np.log(total)
        log_q = np.take_along_axis(rows, ids, -1) - log_sum[:, None]
        p = np.exp(log_p)
        rest_p = np.maximum(1 - p.sum(-1), LEAST)
        rest_q = np.maximum(1 - np.exp(log_q).sum(-1), LEAST)
        # A token that the original rules out counts for nothing, whatever the bundle thinks of it.
        kl = np.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)
        if ids.shape[1] < rows.shape[1]:
            kl += rest_p * (np.log(rest_p) - np.log(rest_q))
        chosen = rows[np.arange(len(rows)), list(following)] - log_sum
    kl = np.where(np.isfinite(kl), np.maximum(kl, 0), np.inf)
    chosen = np.where(np.isfinite(chosen), chosen, -np.inf)
    return kl, rows.argmax(-1) == ids[:, 0], chosen, original["original_chosen"][here].astype(np.float64)
