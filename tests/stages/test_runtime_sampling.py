"""Sampling against the probabilities written down by hand."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from stages.runtime.errors import RequestError
from stages.runtime.sampling import Sampler, Settings, _descending, of_checkpoint

# probabilities 0.5, 0.3, 0.15, 0.05; then two rows without a token, likelier than all
LOGITS = np.log(np.array([0.15, 0.5, 0.05, 0.3, 40.0, 90.0])).astype(np.float32)


def frequencies(count=20_000, **settings):
    sampler = Sampler(4, Settings(**settings), seed=1)
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
        sampler = Sampler(4, Settings(temperature=1.0), seed=seed)
        return [sampler.pick(LOGITS) for _ in range(50)]

    assert draws(7) == draws(7) != draws(8)


def test_extreme_logits_do_not_overflow():
    logits = np.array([-3e38, 3e38, 0.0], np.float32)
    assert Sampler(3, Settings(temperature=1e-3)).pick(logits) == 1
    assert Sampler(4, Settings(temperature=1e-310)).pick(LOGITS) == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_p": 0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"min_p": 1.5},
        {"repetition_penalty": 0},
        {"repetition_penalty": float("inf")},
    ],
)
def test_settings_out_of_range(settings):
    with pytest.raises(RequestError, match=next(iter(settings))):
        Settings(**settings)


def test_a_negative_seed():
    with pytest.raises(RequestError, match="seed -1"):
        Sampler(4, seed=-1)


def test_the_penalty_moves_the_greedy_choice_and_only_of_what_came():
    logits = np.array([1.0, 1.1, -0.5, -0.6], np.float32)
    assert Sampler(4, Settings(repetition_penalty=1.2)).pick(logits, [1]) == 0
    assert Sampler(4, Settings(repetition_penalty=1.2)).pick(logits, [2, 9]) == 1
    assert logits[1] == np.float32(1.1)  # what was passed stays as it was


SETTINGS = [
    {"temperature": 0.7},
    {"temperature": 1.3, "top_k": 5},
    {"temperature": 0.9, "top_p": 0.6},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 1.0, "repetition_penalty": 1.3},
    {"temperature": 1.4, "top_k": 40, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.2},
    {"temperature": 0.3, "top_k": 3, "top_p": 0.99, "repetition_penalty": 0.8},
    {"temperature": 2.5, "top_k": 1000, "top_p": 0.95, "min_p": 0.001},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_distribution_is_that_of_transformers(settings):
    torch = pytest.importorskip("torch")
    generation = pytest.importorskip("transformers.generation.utils")
    config = generation.GenerationConfig(do_sample=True, **{"top_k": 0, **settings})
    model = type("Model", (generation.GenerationMixin,), {"config": SimpleNamespace(is_encoder_decoder=False)})()
    processors = model._get_logits_processor(config, input_ids_seq_length=3)  # in the order of generate()
    random = np.random.default_rng(3)
    sampler = Sampler(500, Settings(**settings))
    for _ in range(20):
        logits = (4 * random.standard_normal(500)).astype(np.float32)
        before = random.integers(0, 500, 60).tolist()
        scores = processors(torch.tensor([before]), torch.tensor(logits)[None])
        expected = torch.softmax(scores[0].double(), dim=-1).numpy()
        ids, weights = sampler.distribution(logits, before)
        found = np.zeros(500)
        found[ids] = weights / weights.sum()
        assert set(ids) == set(np.flatnonzero(expected))
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=0)  # the logits are divided in float32 there


def test_level_tokens_stay_together_in_top_k_as_in_transformers():
    logits = np.array([2.0, 1.0, 1.0, 1.0, 0.0], np.float32)
    assert set(Sampler(5, Settings(temperature=1.0, top_k=2)).distribution(logits)[0]) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        ({}, "greedy"),
        ({"temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1}, "greedy, repetition_penalty 1.1"),
        ({"do_sample": True}, "temperature 1, top_k 50"),
        ({"do_sample": True, "top_k": 0, "top_p": 0.8, "max_new_tokens": 512}, "temperature 1, top_p 0.8"),
        ({"do_sample": True, "temperature": 0.0}, "greedy"),
    ],
)
def test_a_checkpoint_is_sampled_as_transformers_would(sampling, expected):
    assert str(Settings(**of_checkpoint(sampling))) == expected


def test_the_order_is_that_of_a_stable_sort():
    random = np.random.default_rng(0)
    for logits in (random.normal(0, 5, 4096), random.normal(0, 2, 4096).round(1) + 0.0, [1, -np.inf, 0, np.inf, -1, 1]):
        row = np.array(logits, np.float32)
        np.testing.assert_array_equal(_descending(row), np.argsort(-row, kind="stable"))
