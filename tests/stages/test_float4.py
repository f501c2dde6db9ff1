"""MXFP4 in NumPy, against every code and exponent tried in turn."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from stages.quantization import float4
from stages.quantization.blocks import UnfitError
from stages.quantization.schemes import SCHEMES
from stages.verification import allowed

ROW = SCHEMES["mxfp4"].body
assert ROW is not None
GRID = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


def stored(weight: np.ndarray) -> np.ndarray:
    return float4.dequantize(*float4.quantize(weight, ROW), ROW, weight.shape[1])


@pytest.mark.parametrize("most", [1, 2, 3, 5, 8])  # the codes that a group has
def test_what_was_mxfp4_is_stored_exactly(most: int) -> None:
    draw = np.random.default_rng(most)
    codes, signs = draw.integers(0, most, (64, 96)), draw.choice([-1, 1], (64, 96))
    scales = np.ldexp(np.float32(1), draw.integers(-110, 110, (64, 3))).repeat(32, axis=1)
    weight = (GRID[codes] * signs * scales).astype(np.float32)
    np.testing.assert_array_equal(stored(weight), weight)


def test_what_ggml_makes_mxfp4_is_stored_exactly() -> None:
    kind = gguf.GGMLQuantizationType.MXFP4
    weight = np.random.default_rng(0).normal(0, 0.02, (64, 256)).astype(np.float32)
    theirs = gguf.quants.dequantize(gguf.quants.quantize(weight, kind), kind)
    np.testing.assert_array_equal(stored(theirs), theirs)


def test_a_group_has_the_better_of_two_exponents_and_each_value_the_nearest_code() -> None:
    weight = np.random.default_rng(0).normal(0, 0.02, (48, 70)).astype(np.float32)
    found, padded = stored(weight), np.zeros((48, 96), np.float32)
    padded[:, :70] = weight
    groups, larger = padded.reshape(48, 3, 32), 0
    for row, part in np.ndindex(48, 3):
        values = groups[row, part]
        least = int(np.floor(np.log2(np.abs(values).max()))) - 2
        tried = []
        for exponent in (least, least + 1):
            scale = 2.0**exponent
            near = GRID[np.abs(np.abs(values)[:, None] / scale - GRID).argmin(axis=1)] * np.sign(values) * scale
            tried.append(((near - values) ** 2).sum())
        error = ((found[row, 32 * part : 32 * part + 32] - values[: 70 - 32 * part]) ** 2).sum()
        assert error == pytest.approx(min(tried), rel=1e-4)
        larger += tried[1] < tried[0]
    assert 0 < larger < 144
    assert (np.abs(found - weight) <= allowed.of_values(weight, ROW, "max")).all()


def test_what_no_group_can_hold_is_zero_or_named() -> None:
    weight = np.full((2, 64), 2.0**-122, np.float32)
    weight[1, 40] = 1
    assert not stored(weight)[0].any()
    weight[1, 3] = np.inf
    with pytest.raises(UnfitError) as raised:
        float4.quantize(weight, ROW)
    assert raised.value.index == [1, 3]
