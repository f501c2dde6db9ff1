"""Rotary frequencies of every rope type, in the arithmetic of transformers: float32, step by step.

An angle is a position times a frequency, so that at position 100,000 an error in the last bit of a frequency is one of
a hundredth of a radian: it is not enough to compute the same formula, it must be rounded where transformers rounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from stages.documents.model import RopeParameters


# Beside rope.py, which the verbs that only look import too, because of numpy.
Numbers = np.ndarray  # float32 [rotary_dim / 2]


def frequencies(parameters: RopeParameters, rotary_dim: int) -> tuple[tuple[float, ...], float]:
    """Return radians per position of each pair of ``rotary_dim`` channels, float32 values, and the attention factor, by
    which cosines and sines are multiplied. Of an odd number of channels the last is turned against another.

    ``dynamic`` is that of sequences within max_position_embeddings, ``longrope`` that of its short factors: what
    longer ones need is settled before (:meth:`stages.models.rope.Rope.for_context`).
    """
    kind = parameters["rope_type"]
    found = TYPES[kind](parameters, _powers(parameters["rope_theta"], rotary_dim), rotary_dim)
    return tuple(float(number) for number in found), attention_factor(parameters)


def attention_factor(parameters: RopeParameters) -> float:
    """Return what cosines and sines are multiplied by: as given, or what the papers of yarn and longrope suggest."""
    kind = parameters["rope_type"]
    if kind not in ("yarn", "longrope"):
        return 1.0
    if "attention_factor" in parameters:
        return float(parameters["attention_factor"])
    factor = parameters["factor"]
    if kind == "longrope":
        original = parameters["original_max_position_embeddings"]
        return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    one, all_dim = parameters.get("mscale"), parameters.get("mscale_all_dim")
    return _mscale(factor, one) / _mscale(factor, all_dim) if one and all_dim else _mscale(factor, 1)


def dynamic_base(parameters: RopeParameters, rotary_dim: int, positions: int, trained: int) -> float:
    """Return the base that ``dynamic`` turns sequences of so many positions by, more than ``trained``."""
    factor, one = np.float32(parameters["factor"]), np.float32
    longer = factor * one(positions) / one(trained) - one(parameters["factor"] - 1)
    return float(one(parameters["rope_theta"]) * one(float(longer) ** float(one(rotary_dim / (rotary_dim - 2)))))


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _powers(base: float, rotary_dim: int) -> Numbers:
    """Return base ** (2 i / rotary_dim), each rounded once."""
    exponents = np.arange(0, rotary_dim, 2, dtype=np.float32) / np.float32(rotary_dim)
    rounded = float(np.float32(base))
    # Number by number: numpy's power of whole arrays differs between processors in the last bit.
    return np.array([rounded ** float(exponent) for exponent in exponents], np.float32)


def _default(_parameters: RopeParameters, powers: Numbers, _dim: int) -> Numbers:
    return np.float32(1) / powers


def _linear(parameters: RopeParameters, powers: Numbers, _dim: int) -> Numbers:
    scaled: Numbers = np.float32(1) / powers / np.float32(parameters["factor"])
    return scaled


def _longrope(parameters: RopeParameters, powers: Numbers, _dim: int) -> Numbers:
    divided: Numbers = np.float32(1) / (np.array(parameters["short_factor"], np.float32) * powers)
    return divided


def _llama3(parameters: RopeParameters, powers: Numbers, _dim: int) -> Numbers:
    one, original = np.float32(1), parameters["original_max_position_embeddings"]
    factor, low = np.float32(parameters["factor"]), np.float32(parameters["low_freq_factor"])
    span = np.float32(parameters["high_freq_factor"] - parameters["low_freq_factor"])
    shortest, longest = (
        np.float32(original / bound) for bound in (parameters["high_freq_factor"], parameters["low_freq_factor"])
    )
    plain = one / powers
    wave = np.float32(2 * math.pi) / plain
    smooth = (np.float32(original) / wave - low) / span
    between = (one - smooth) * plain / factor + smooth * plain
    return np.where(wave > longest, plain / factor, np.where(wave < shortest, plain, between))


def _yarn(parameters: RopeParameters, powers: Numbers, dim: int) -> Numbers:
    one, base = np.float32(1), parameters["rope_theta"]

    def turning(rotations: float) -> float:
        """Return the channel that turns so often within the original context."""
        return (
            dim
            * math.log(parameters["original_max_position_embeddings"] / (rotations * 2 * math.pi))
            / (2 * math.log(base))
        )

    low, high = turning(parameters.get("beta_fast", 32)), turning(parameters.get("beta_slow", 1))
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high += 0.001 if low == high else 0.0
    ramp = (np.arange(len(powers), dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    extrapolated = one - np.clip(ramp, np.float32(0), one)
    blended: Numbers = (
        one / (np.float32(parameters["factor"]) * powers) * (one - extrapolated) + one / powers * extrapolated
    )
    return blended


TYPES: dict[str, Callable[[RopeParameters, Numbers, int], Numbers]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _default,
    "yarn": _yarn,
    "longrope": _longrope,
    "llama3": _llama3,
}
