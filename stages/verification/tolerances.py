"""Tolerances against the reference, and the reason for each."""

from __future__ import annotations

import math

_UNIT = 2.0**-24  # the largest relative error of one float32 rounding

# How many times further than its rounding alone moves the reference (stages.verification.rounding) a bundle may be from
# it. Measured on right bundles, as a share of that movement: see docs/verification.md.
SPREADS = {"float32": 24.0, "float16": 8.0, "bfloat16": 8.0, "int8": 4.0}

# max |difference| over max |reference logit| of one step for a recorded reference, by the scheme: a recording has no
# model whose rounding could be measured. The reference computes in float32 from the very weights that the bundle holds,
# dequantized, so that quantization itself is no part of the difference.
TOLERANCES: dict[str, float] = {
    # float32 throughout: only the order of additions differs, about 1e-6 in practice
    "q0f32": 1e-3,
    # the same, with kernels that multiply integers by scales inside a sum
    "q4f32_1": 2e-3,
    "q8f32_1": 2e-3,
    # float16 has 11 bits, and a target may compute in it
    "q0f16": 2e-2,
    "q0bf16": 2e-2,
    "q3f16_1": 2e-2,
    "q4f16_0": 2e-2,
    "q4f16_1": 2e-2,
    "q4f16_2": 2e-2,
    "q4bf16_1": 2e-2,
    "q8f16_1": 2e-2,
    "e4m3_f16": 2e-2,
    "e4m3_128": 2e-2,
    "mxfp4": 2e-2,
    "q2k": 2e-2,
    "q3k": 2e-2,
    "q4k": 2e-2,
    "q5k": 2e-2,
    "q6k": 2e-2,
    "q4s16": 2e-2,
    "q4s32": 2e-2,
    "q4s64": 2e-2,
    "q4s128": 2e-2,
    "q4a16": 2e-2,
    "q4a32": 2e-2,
    "q4a64": 2e-2,
    "q4a128": 2e-2,
}

# Where the library quantizes activations to eight bits as well, which a recorded reference does not. Measured: 1e-2 to
# 2e-2 on random weights, which spread every error over all logits.
INT8_ACTIVATIONS = 5e-2

# A share of the largest logit: where rounding alone explains differences of so much, a comparison tells little, for
# another model's differ by about one. Seen with int8 activations, where a rounding chooses other experts.
TELLS_LITTLE = 0.5

# How much the perplexity of the reference's prompt may exceed the reference's, as a share of it. Measured: int8
# activations add 0.01 % on all held-out text of the example checkpoints, float ones nothing in four digits.
PERPLEXITY = 0.02

# The mean loss of a text over the mean loss of the same ids under a permutation of the vocabulary. Measured on the
# example checkpoint: with its own tokenizer 0.03 on its text, 0.13 on held out text, 0.66 on text of another kind;
# with ids permuted or shifted 0.93 to 1.04. Random weights are at 1. A wrong split pattern is
# not seen here (0.24, 0.33): the comparison of ids finds that.
LOSS_RATIO = 0.8


def softmax_bound(entries: int, largest: float) -> float:
    """Return by how much of itself a float32 probability may be off, of ``entries`` whose scaled logits are at most
    ``largest`` in magnitude.

    An exponent is a quotient less the maximum: roundings of values of up to twice ``largest``, and what an
    exponent is off by is what its exponential is off by, of itself. The exponential and the division add a few units.
    The sum of n positive terms is off by a unit for each addition that a term goes through: 2 sqrt(n) where sums of
    sqrt(n) terms are added up in turn, which is what docs/abi.md promises; one long sum would lose the small terms.
    """
    return _UNIT * (8 * largest + 2 * math.sqrt(entries) + 16)


def spread_bound(arithmetic: str, spread: float) -> float:
    """Return how far logits may be from a live reference that rounding moves by ``spread``, in two digits, upwards.

    No less than a few float32 roundings of the logits themselves.
    """
    bound = max(SPREADS[arithmetic] * spread, 16 * _UNIT)
    digit = 10.0 ** (math.floor(math.log10(bound)) - 1)
    return math.ceil(bound / digit) * digit
