"""Sampling against the probabilities written down by hand."""

from __future__ import annotations

import numpy as np
import pytest

from stages.runtime.errors import RequestError
from stages.runtime.sampling import Sampler

# probabilities 0.5, 0.3, 0.15, 0.05; then two rows without a token, likelier than all
LOGITS = np.log(np.array([0.15, 0.5, 0.05, 0.3, 40.0, 90.0])).astype(np.float32)


def frequencies(count=20_000, **settings):
    sampler = Sampler(4, seed=1, **settings)
    return np.bincount([sampler.pick(LOGITS) for _ in range(count)], minlength=4) / count


def test_greedy_takes_the_likeliest_that_has_a_token():
    assert Sampler(4).pick(LOGITS) == 1
    assert Sampler(6).pick(LOGITS) == 5


def test_draws_follow_the_probabilities():
    np.testing.assert_allclose(frequencies(temperature=1.0), [0.15, 0.5, 0.05, 0.3], atol=0.015)


def test_temperature_sharpens_and_flattens():
    probabilities = np.array([0.15, 0.5, 0.05, 0.3])
    for temperature in (0.5, 2.0):
        powered = probabilities ** (1 / temperature)
        np.testing.assert_allclose(frequencies(temperature=temperature), powered / powered.sum(), atol=0.015)


@pytest.mark.parametrize(("top_p", "kept"), [(0.4, {1}), (0.6, {1, 3}), (0.9, {0, 1, 3}), (1.0, {0, 1, 2, 3})])
def test_the_nucleus_includes_the_token_that_reaches_it(top_p, kept):
    found = frequencies(2000, temperature=1.0, top_p=top_p)
    assert set(np.flatnonzero(found)) == kept


def test_a_seed_fixes_the_draws():
    def draws(seed):
        sampler = Sampler(4, temperature=1.0, seed=seed)
        return [sampler.pick(LOGITS) for _ in range(50)]

    assert draws(7) == draws(7) != draws(8)


def test_extreme_logits_do_not_overflow():
    logits = np.array([-3e38, 3e38, 0.0], np.float32)
    assert Sampler(3, temperature=1e-3, seed=0).pick(logits) == 1
    assert Sampler(4, temperature=1e-310, seed=0).pick(LOGITS) == 1


@pytest.mark.parametrize(
    "settings", [{"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0}, {"top_p": 1.1}, {"seed": -1}]
)
def test_settings_out_of_range(settings):
    with pytest.raises(RequestError, match=next(iter(settings))):
        Sampler(4, **settings)
