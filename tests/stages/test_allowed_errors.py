"""What verify lets a stored weight be off by: never less than what quantizing it rightly does, whatever the values."""

from __future__ import annotations

import math
import time
from threading import Lock

import numpy as np
import pytest

from stages.quantization.feedback import Feedback
from stages.quantization.parameter import quantize, restored
from stages.quantization.rows import Row
from stages.quantization.schemes import SCHEMES
from stages.verification import allowed, weights

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
    passed_on, costs = np.eye(K, k=1, dtype=np.float32), np.ones(K, np.float32)
    feedback = Feedback(np.arange(K), passed_on, costs) if scales == "gptq" else None
    held = restored(quantize(weight, row, scales, importance, feedback), row, K)
    assert (np.abs(held - weight) <= allowed.of_values(weight, row, scales)).all()


@pytest.mark.parametrize("name", ROWS)
def test_weights_of_a_neighbouring_group_are_refused(name: str) -> None:
    row, weight = ROWS[name], values("outliers")
    size: int = row.group_size
    held = np.roll(restored(quantize(weight, row, "max"), row, K), size, axis=1)
    wrong = np.abs(held - weight) > allowed.of_values(weight, row, "max")
    assert wrong.any(axis=1).all()


def test_there_are_rows_of_every_form() -> None:
    assert {(row.minimum, row.levels) for row in ROWS.values()} == {(False, False), (True, False), (True, True)}
    assert isinstance(next(iter(ROWS.values())), Row)


def test_what_is_compared_at_once_is_no_more_than_thrice_the_largest(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a hundred processors does not hold a hundred matrices."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(100))
    lock, held, most = Lock(), 0, 0

    def compare(entry):
        nonlocal held, most
        with lock:
            held += math.prod(entry["shape"])
            most = max(most, held)
        time.sleep(0.01)
        with lock:
            held -= math.prod(entry["shape"])
        return [str(entry["shape"])]

    entries = [{"shape": [size, 2]} for size in (1, 50, 3, 100, 7, *[20] * 40)]
    found = list(weights._side_by_side(compare, entries))
    assert found == [[str(entry["shape"])] for entry in entries]
    assert most <= weights.SHARE * 200
