"""What tiles take for equal is what the comparison value by value takes for equal, whatever one bit of it is."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest

from stages.quantization import layouts
from stages.quantization.parameter import quantize, restored
from stages.quantization.rows import Row
from stages.quantization.schemes import SCHEMES
from stages.verification import allowed, tiles

ROWS = {row.name: row for scheme in SCHEMES.values() for row in scheme.rows if row.kind == "group" and row.bits != 3}
ROWS |= {row.name: row for row in SCHEMES["q3k"].rows}
N, K = 70, 640  # the last block of 32 rows is not full, nor is the last block of levels
DTYPES = (ml_dtypes.bfloat16, np.float16, np.float32)


def sources(dtype: type, seed: int = 3) -> list[np.ndarray]:
    """Two tensors that are stored as one, the border within a block of rows."""
    chance = np.random.default_rng(seed)
    whole = (chance.standard_t(3, (N, K)) * 0.02).astype(dtype)
    whole[5, 64:128] = 0
    return [whole[:41], whole[41:]]


def entry(layout: str, row: Row | None) -> dict:
    return {"transform": "concat0", "layout": layout, "shape": [N, K], "quantize": row and row.document()}


@pytest.mark.parametrize("layout", ["n32", "nk", "kn"])
@pytest.mark.parametrize("name", ROWS)
def test_a_flipped_bit_is_found_if_it_counts(name: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    row, chance = ROWS[name], np.random.default_rng(len(name))
    monkeypatch.setattr(tiles, "VALUES", 1 << 14)  # so that there are several tiles
    outcomes = set()
    for dtype, scales in itertools.product(DTYPES, ("max", "mse")):
        originals = sources(dtype)
        wanted = np.concatenate(originals).astype(np.float32)
        stored = [*quantize(np.concatenate(originals), row, scales)]
        for number in range(12):
            flipped = [array.copy() for array in stored]
            if number:
                victim = flipped[number % len(flipped)].view(np.uint8)
                victim[tuple(chance.integers(victim.shape))] ^= np.uint8(1 << chance.integers(8))
            with np.errstate(all="ignore"):
                away = np.abs(restored(flipped, row, K) - wanted)
                right = bool((away <= allowed.of_values(wanted, row, scales)).all())
            laid = [layouts.arrange(layout, array, bits) for array, bits in zip(flipped, row.element_bits, strict=True)]
            assert tiles.agree(entry(layout, row), laid, originals, scales) == right, (dtype, scales, number)
            assert right or number
            outcomes.add(right)
    assert outcomes == {True, False}


@pytest.mark.parametrize("layout", ["n32", "nk"])
@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("source", DTYPES)
def test_floats_are_equal_bit_for_bit_as_rounded(source: type, stored: type, layout: str) -> None:
    originals = sources(source)
    originals[0][3, :4] = [1e-7, -0.0, 6e-8, -3e-6]  # below float16's normal range
    right = np.concatenate(originals).astype(np.float32).astype(stored)
    for at, value in (((0, 0), None), ((69, 639), 9.0), ((3, 1), 0.0), ((40, 0), np.nan), ((41, 5), np.inf)):
        held = right.copy()
        if value is not None:
            held[at] = value
        laid = layouts.arrange(layout, held)
        assert tiles.agree(entry(layout, None), [laid], originals, "max") == (value in (None, 0.0))
    originals[1][0, 5] = np.inf  # and where the checkpoint has what is no number, this is for others to say
    held = np.concatenate(originals).astype(np.float32).astype(stored)
    assert not tiles.agree(entry(layout, None), [layouts.arrange(layout, held)], originals, "max")


def test_float16_is_widened_exactly() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    finite = np.isfinite(bits.view(np.float16))
    found, wanted = tiles._widened(bits)[finite], bits.view(np.float16)[finite].astype(np.float32)
    assert np.array_equal(found.view(np.uint32), wanted.view(np.uint32))


def test_what_is_made_otherwise_is_left_to_the_comparison_value_by_value() -> None:
    row = SCHEMES["q4f16_1"].rows[0]
    originals = sources(np.float16)
    stored = [*quantize(np.concatenate(originals), row, "max")]
    assert tiles.agree(entry("nk", row), stored, originals, "max")
    assert not tiles.agree({**entry("nk", row), "transform": "interleaved_qkv:2"}, stored, originals, "max")
    assert not tiles.agree(entry("nk", row), stored, [originals[0], originals[1].astype(np.float32)], "max")
