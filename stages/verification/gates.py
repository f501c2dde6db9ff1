"""Limits on the loss by quantization, beyond which a bundle is refused: defaults by scheme, and the user's own."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

from stages.verification.checks import CACHE, Check, divergences

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np

    from stages.quantization.schemes import Scheme
    from stages.verification.loss import Loss


@dataclass(frozen=True)
class LossLimits:
    """``max_kl``: mean divergence in nats. ``min_top1``: share of equal likeliest tokens. ``max_ppl_ratio``: perplexity
    over the original's. ``max_activation_kl``: mean divergence of int8 activations, keys and values among them, from
    float ones on the same weights.
    """

    max_kl: float
    min_top1: float
    max_ppl_ratio: float
    max_activation_kl: float = 0.03  # what eight bits may cost, whatever the weights keep


NAMES = tuple(field.name for field in fields(LossLimits))  # verify's parameters of the same names set others
# By how many bits a weight or an activation keeps. docs/verification.md has what the limits follow from.
LIMITS = {
    16: LossLimits(max_kl=0.01, min_top1=0.96, max_ppl_ratio=1.01),
    8: LossLimits(max_kl=0.03, min_top1=0.92, max_ppl_ratio=1.03),
    4: LossLimits(max_kl=0.25, min_top1=0.75, max_ppl_ratio=1.25),
}


def bits_kept(scheme: Scheme, coarsest: str) -> int:
    """Return the class of a bundle: 16 of unquantized ones, 8 down to eight bits of weights or activations, 4 below."""
    bits = scheme.bits
    if coarsest == "int8":
        bits = min(bits, 8)
    return next(limit for limit in LIMITS if bits >= limit or limit == min(LIMITS))


def limits(scheme: Scheme, coarsest: str, own: Mapping[str, float]) -> LossLimits:
    """Return the limits of a bundle: those of its class but for the user's ``own``."""
    return replace(LIMITS[bits_kept(scheme, coarsest)], **own)


def ranges(modules: Sequence[str], largest: Sequence[float], dtype: str) -> Check:
    """Return the check that inputs and outputs of ``modules``, of magnitudes up to ``largest``, fit ``dtype``."""
    top = {"float16": 65504.0}.get(dtype, 3.38e38)
    value, name = max(zip(largest, modules, strict=True))
    detail = f"{name} reaches {value:.4g} in the original on the probes, the largest {dtype} is {top:.4g}"
    if value > top:
        detail += ": the bundle would overflow; choose a scheme of bfloat16 or float32"
    return Check(f"range of {dtype}", bool(value <= top), detail, float(f"{value:.4g}"), top)


def activations(rows: np.ndarray, wanted: np.ndarray, limits: LossLimits, in_bytes: Sequence[str]) -> Check:
    """Return the check of logits ``rows`` [n, V], for which what is called ``in_bytes`` was rounded to int8, against
    those of floats on the same weights: a loss of its own, which the weights' would hide.
    """
    what = " and ".join(in_bytes)
    each = divergences(rows, wanted)
    mean, error = float(each.mean()), float(each.std() / math.sqrt(len(each)))
    detail = (
        f"{mean:.4g} nats per token (± {error:.1g}, {len(each)} tokens) from float {what} on the same weights, at "
        f"most {limits.max_activation_kl:g}"
    )
    ok = mean <= limits.max_activation_kl
    if not ok:
        instead = " or ".join("kv_dtype: auto" if each == CACHE else "activations: float" for each in in_bytes)
        detail += f": the input of some layer has outlier channels; set {instead}"
    return Check(f"int8 {what} (max_activation_kl)", ok, detail, mean, limits.max_activation_kl)


def check(loss: Loss, limits: LossLimits) -> list[Check]:
    """Return one check for each limit."""
    kl = f"{loss.kl_mean:.4g} nats per token from the original (± {loss.kl_error:.1g}), at most {limits.max_kl:g}"
    top1 = f"the original's most likely token at {loss.top1:.1%} of positions, at least {limits.min_top1:.0%}"
    ratio = (
        f"{loss.perplexity:.4g}, {loss.perplexity_ratio:.4g} times the original's {loss.perplexity_original:.4g} "
        f"(± {loss.perplexity_ratio_error:.1g}), at most {limits.max_ppl_ratio:g}"
    )
    return [
        Check("KL divergence (max_kl)", loss.kl_mean <= limits.max_kl, kl, loss.kl_mean, limits.max_kl),
        Check("top-1 agreement (min_top1)", loss.top1 >= limits.min_top1, top1, loss.top1, limits.min_top1),
        Check(
            "perplexity (max_ppl_ratio)",
            loss.perplexity_ratio <= limits.max_ppl_ratio,
            ratio,
            loss.perplexity_ratio,
            limits.max_ppl_ratio,
        ),
    ]
