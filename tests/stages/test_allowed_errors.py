"""What verify lets a stored weight be off by: never less than what quantizing it rightly does, whatever the values."""

from __future__ import annotations

import numpy as np
import pytest

from stages.quantization.feedback import Feedback
from stages.quantization.parameter import quantize, restored
from stages.quantization.rows import Row
from stages.quantization.schemes import SCHEMES
from stages.verification.weights import _allowed

K, N = 512, 48
ROWS = {row.name: row for scheme in SCHEMES.values() for row in scheme.rows if row.kind == "group"}


def values(kind: str) -> np.ndarray:
    chance = np.random.default_rng(5)
    found = {
        "normal": chance.standard_normal((N, K)),
        "outliers": chance.standard_t(2, (N, K)),
        "positive": np.abs(chance.standard_normal((N, K))) + 0.5,
        "negative": -np.abs(chance.standard_normal((N, K))) - 0.5,
        "one large group": chance.standard_normal((N, K)) * np.where(np.arange(K) % 256 < 32, 40, 0.05),
        "lattice": chance.integers(0, 16, (N, K)) * 0.01 - 0.07,
    }
    return found[kind].astype(np.float32)


KINDS = ("normal", "outliers", "positive", "negative", "one large group", "lattice")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scales", ["max", "mse", "importance", "gptq"])
@pytest.mark.parametrize("name", ROWS)
def test_right_weights_are_never_refused(name: str, scales: str, kind: str) -> None:
    row, weight = ROWS[name], values(kind)
    importance = np.exp(4 * np.random.default_rng(1).standard_normal(K)).astype(np.float32)
    # More feedback than any real one: every error goes on whole to the next column.
    feedback = Feedback(np.arange(K), np.eye(K, k=1, dtype=np.float32)) if scales == "gptq" else None
    held = restored(quantize(weight, row, scales, importance, feedback), row, K)
    assert (np.abs(held - weight) <= _allowed(weight, row, scales)).all()


@pytest.mark.parametrize("name", ROWS)
def test_weights_of_a_neighbouring_group_are_refused(name: str) -> None:
    row, weight = ROWS[name], values("outliers")
    size: int = row.group_size
    held = np.roll(restored(quantize(weight, row, "max"), row, K), size, axis=1)
    wrong = np.abs(held - weight) > _allowed(weight, row, "max")
    assert wrong.any(axis=1).all()


def test_there_are_rows_of_every_form() -> None:
    assert {(row.minimum, row.levels) for row in ROWS.values()} == {(False, False), (True, False), (True, True)}
    assert isinstance(next(iter(ROWS.values())), Row)
