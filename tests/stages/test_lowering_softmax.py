"""Softmax on a CPU: any width, any scale of logits, within the bound that verify holds it to; and what breaks it."""

from __future__ import annotations

import numpy as np
import pytest

from stages.graph.softmax import Softmax
from stages.lowering.cpu_softmax import cpu_softmax
from stages.verification.checks import probabilities
from tests.stages.test_lowering_cpu import V3, run
from tests.stages.test_lowering_passes import export

SCALES = {"flat": 0.0, "ordinary": 3.0, "wide": 30.0, "beyond what a float32 exponential can say": 3000.0}


def logits(width, scale, rows=1):
    return (np.random.default_rng(width).standard_normal((rows, width)) * scale).astype(np.float32)


class Exported(Softmax):
    def forward(self, logits, temperature):
        return self.softmax_with_temperature(logits, temperature)


def module(width):
    shapes = {"logits": (["batch_size", 1, width], "float32"), "temperature": (["batch_size"], "float32")}
    return export(Exported(), **shapes)


def softmax(lowered, rows, temperature):
    return run(lowered, V3, "forward", rows[:, None, :], temperature, [])[:, 0]


@pytest.mark.parametrize("width", [1, 31, 33, 301, 1056, 49152, 256_000])
def test_every_probability_is_within_the_bound(width):
    lowered = cpu_softmax(module(width))
    assert any("softmax" in str(var) for var in lowered.get_global_vars())
    assert "nn.softmax" not in lowered["forward"].script()
    rows = np.concatenate([logits(width, scale, rows=2) for scale in SCALES.values()])
    temperature = np.tile(np.array([0.7, 1.6], np.float32), len(SCALES))
    found = softmax(lowered, rows, temperature)
    for start, name in zip(range(0, len(rows), 2), SCALES, strict=True):
        two = slice(start, start + 2)
        check = probabilities(found[two], rows[two], temperature[two])
        assert check.ok, f"{name}: {check.detail}"
    assert abs(found.astype(np.float64).sum(-1) - 1).max() < 2e-6


def test_one_long_sum_would_miss_the_bound():
    """Most of the probability is in terms that are each lost beside the sum of those before them."""
    rows = np.zeros((1, 256_000), np.float32)
    rows[0, 0] = np.log(2.0**25)
    weights = np.exp(rows - rows.max())
    found = weights / np.cumsum(weights, dtype=np.float32)[-1]
    ones = np.ones(1, np.float32)
    assert not probabilities(found, rows, ones).ok
    assert probabilities(softmax(cpu_softmax(module(256_000)), rows, ones), rows, ones).ok


def right(rows, temperature):
    weights = np.exp(rows.astype(np.float64) / temperature[:, None])
    return (weights / weights.sum(-1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("width", [301, 49152, 256_000])
@pytest.mark.parametrize("scale", [0.5, 3.0, 20.0])
def test_what_is_wrong_is_beyond_the_bound(width, scale):
    rows, temperature = logits(width, scale, rows=4), np.array([0.7, 0.9, 1.1, 1.3], np.float32)
    found = right(rows, temperature)
    assert probabilities(found, rows, temperature).ok
    pair = found.copy()
    sizes = np.where(found[0] > 1e-30, found[0], 1)
    least, other = np.argsort(sizes)[:2]  # the smallest probabilities that a float32 holds in full
    pair[0, [least, other]] = pair[0, [other, least]]
    wrong = {
        "the temperature of the next row": right(rows, np.roll(temperature, 1)),
        "a temperature a thousandth off": right(rows, temperature * np.float32(1.001)),
        "the row before": np.roll(found, 1, axis=0),
        "every probability at the next entry": np.roll(found, 1, axis=1),
        "two entries exchanged": pair,
        "no temperature": right(rows, np.ones(4, np.float32)),
        "a sum a thousandth too large": found * np.float32(0.999),
        "not a number": np.where(found == found.max(), np.nan, found),
    }
    passed = [name for name, array in wrong.items() if probabilities(array, rows, temperature).ok]
    assert not passed
