"""The arithmetic of the group schemes against a plain-loop statement of it, and the tensor-cache files against TVM."""

from __future__ import annotations

import functools
import math
import struct
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
import pytest

from stages.quantization import compiled, float8, layouts, minimum, tensor_cache, two_level
from stages.quantization.blocks import BLOCK_BYTES, UnfitError, cast, relative_error
from stages.quantization.dtypes import numpy_dtype
from stages.quantization.group import dequantize, quantize
from stages.quantization.parameter import convert, kernel_names, restored
from stages.quantization.parameter import quantize as quantize_row
from stages.quantization.rows import Row
from stages.quantization.schemes import SCHEMES
from stages.quantization.tensor_cache import Tensor, shard_name, shards, write_index
from stages.quantization.words import pack, unpack
from stages.sizes import PLANES
from stages.targets import processor, toolchain

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

ALL_ROWS = {row.name: row for scheme in SCHEMES.values() for row in scheme.rows if row.kind == "group"}
SYMMETRIC = [row for row in ALL_ROWS.values() if not row.minimum]
ROWS = {name: scheme.body for name, scheme in SCHEMES.items() if scheme.body}


def float32(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]


def rounded(value: float, dtype: str) -> float:
    if dtype == "bfloat16":  # half to even at the 16th bit of a float32
        bits = struct.unpack("I", struct.pack("f", value))[0]
        bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
        return struct.unpack("f", struct.pack("I", bits))[0]
    return struct.unpack("e", struct.pack("e", value))[0] if dtype == "float16" else float32(value)


def by_plain_loops(weight: np.ndarray, row: Row) -> tuple[list[list[int]], list[list[float]]]:
    """Words and scales from Python floats, integers and loops; doubles rounded to float32 after each operation."""
    n, k = weight.shape
    size, bits, per_word, top = row.group_size, row.bits, 32 // row.bits, 2 ** (row.bits - 1) - 1
    words = [[0] * (math.ceil(k / size) * size // per_word) for _ in range(n)]
    scales = []
    for i in range(n):
        values = [float(value) for value in weight[i]]
        row_scales = []
        for start in range(0, k, size):
            group = values[start : start + size]
            scale = rounded(float32(max(abs(value) for value in group) / top), row.scale_dtype)
            row_scales.append(scale)
            for j, value in enumerate(group, start=start):
                code = min(max(round(float32(value / scale)) + top, 0), 2 * top) if scale else top
                words[i][j // per_word] |= code << bits * (j % per_word)
        scales.append(row_scales)
    return words, scales


DTYPES = pytest.mark.parametrize(
    "dtype",
    [np.float32, *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in (np.float16, ml_dtypes.bfloat16))],
    ids=lambda dtype: np.dtype(dtype).name,
)
SHAPES = [(1, 32), (3, 64), (7, 96), (5, 40), (4, 31), (2, 1), (3, 77), (2, 121), (67, 288)]


@pytest.fixture(scope="module")
def compile_kernels(tmp_path_factory: pytest.TempPathFactory) -> Callable[[type], compiled.Kernels]:
    """By dtype of a checkpoint: the kernels of every row from it, compiled for this machine."""
    cxx = toolchain.cxx()
    if cxx is None:
        pytest.skip("no C++ compiler")
    every = [(row, layout) for row in SYMMETRIC for layout in ("nk", "n32", "kn")]

    @functools.cache
    def build(dtype: type) -> compiled.Kernels:
        source = np.dtype(dtype).name
        names = {*kernel_names(source, every, "max", ("float32", "float16", "bfloat16"))}
        names.add(compiled.quantize_name(source, ROWS["q4f16_1"], "mse", "nk"))
        library = tmp_path_factory.mktemp("kernels") / "kernels.so"
        compiled.build(library, processor.host_cpu(), cxx.path, sorted(names), toolchain.environment())
        return compiled.Kernels(library)

    return build


@pytest.fixture
def kernels(request: pytest.FixtureRequest, compile_kernels: Callable[[type], compiled.Kernels]) -> compiled.Kernels:
    """The kernels that read the test's dtype."""
    return compile_kernels(request.getfixturevalue("dtype") if "dtype" in request.fixturenames else np.float32)


def sample(shape: tuple[int, int], dtype: type) -> np.ndarray:
    random = np.random.default_rng(sum(shape))
    return (random.standard_normal(shape) * random.choice([1e-6, 1e-2, 1, 300], shape)).astype(dtype)


@pytest.mark.parametrize("row", SYMMETRIC, ids=lambda row: row.name)
@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_words_and_scales_equal_the_plain_statement(row, dtype, shape, kernels):
    """NumPy's, and the compiled kernels', which read where a mapped file happens to begin."""
    weight = sample(shape, dtype)
    words, scales = by_plain_loops(weight, row)
    q_weight, q_scale = quantize(weight, row)
    assert (q_weight.dtype, q_scale.dtype) == (np.uint32, numpy_dtype(row.scale_dtype))
    assert q_weight.tolist() == words
    assert q_scale.tolist() == scales
    elsewhere = np.empty(weight.size + 1, dtype)[1:].reshape(shape)
    elsewhere[:] = weight
    error = relative_error(weight, lambda rows: dequantize(q_weight[rows], q_scale[rows], row, shape[1]))
    for layout in ("nk", "kn", *(["n32"] if row.bits in (4, 8) and not shape[1] % row.group_size else [])):
        parts = [elsewhere[: shape[0] // 2], elsewhere[shape[0] // 2 :]] if shape[0] > 1 else [elsewhere]
        done = convert(parts, row, shape=shape, dtype="", scales="max", layout=layout, kernels=kernels)
        assert layouts.restore(layout, done.stored[0], shape[0], row.element_bits[0]).tolist() == words
        assert layouts.restore(layout, done.stored[1], shape[0]).tolist() == scales
        expected = layouts.arrange(layout, q_weight, row.element_bits[0])  # with what a last block is filled up with
        assert np.array_equal(done.stored[0], expected)
        assert (done.rmse, done.worst) == pytest.approx(error, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("name", ["q3f16_1", "q4f16_1", "q8f16_1", "q4f32_1"])
def test_kernels_divide_as_exactly_at_the_middle_between_codes(name, kernels):
    """Values that are a middle times a scale, and their neighbours, fall on the side that a rounded quotient does."""
    row, random = ROWS[name], np.random.default_rng(0)
    rows = 500
    scale = random.uniform(1e-7, 2, (rows, 1)).astype(row.scale_dtype).astype(np.float32)
    middles = random.integers(-row.top, row.top, (rows, row.group_size)) + np.float32(0.5)
    weight = (middles * scale).astype(np.float32)
    up = random.integers(-1, 2, weight.shape).astype(np.float32)
    weight = np.where(up == 0, weight, np.nextafter(weight, np.copysign(np.float32(np.inf), up)))
    weight[:, 0] = row.top * scale[:, 0]
    how = {"shape": weight.shape, "dtype": "", "scales": "max"}
    found = convert([weight], row, kernels=kernels, **how).stored
    q_weight, q_scale = quantize(weight, row)
    assert np.array_equal(found[0], q_weight)
    assert np.array_equal(found[1], q_scale)


@DTYPES
@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shape", [(5,), (compiled.ROW,), (compiled.ROW + 1,), (70, 130)], ids=str)
def test_compiled_casts_are_numpys(dtype, stored, shape, kernels):
    weight = np.random.default_rng(1).standard_normal(shape).astype(dtype)
    expected = cast(weight, stored)
    found = np.empty_like(expected)
    sums = kernels.cast([weight[:2], weight[2:]], found)
    assert found.tobytes() == expected.tobytes()
    error = relative_error(weight, lambda rows: expected[rows].astype(np.float32))
    assert sums.relative() == pytest.approx(error, rel=1e-4, abs=1e-12)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e6])
def test_kernels_leave_it_to_numpy_to_say_what_is_wrong(value, kernels):
    weight = np.ones((9, 64), np.float32)
    weight[7, 33] = value
    stored = [np.empty((9, 8), np.uint32), np.empty((9, 2), np.float16)]
    assert kernels.quantize([weight], 9, ROWS["q4f16_1"], "max", "nk", stored) is None
    assert kernels.cast([weight], np.empty((9, 64), np.float16)) is None
    with pytest.raises(ValueError, match=r"\[7, 33\]"):
        convert([weight], ROWS["q4f16_1"], shape=weight.shape, dtype="float16", scales="max", kernels=kernels)


def squared_error(weight: np.ndarray, row: Row, q_weight: np.ndarray, q_scale: np.ndarray) -> np.ndarray:
    """The squared error of each group."""
    n, k = weight.shape
    error = np.zeros((n, row.groups(k) * row.group_size))
    error[:, :k] = weight - dequantize(q_weight, q_scale, row, k)
    return (error**2).reshape(n, -1, row.group_size).sum(axis=-1)


@pytest.mark.parametrize("row", SYMMETRIC, ids=lambda row: row.name)
@pytest.mark.parametrize("k", [256, 77])
def test_searched_scales_are_never_worse(row, k):
    weight = np.random.default_rng(4).standard_normal((40, k)).astype(np.float32)
    plain = squared_error(weight, row, *quantize(weight, row))
    searched = squared_error(weight, row, *quantize(weight, row, "mse"))
    assert (searched <= plain * (1 + 1e-5) + 1e-12).all()
    if row.bits < 8:
        assert np.sqrt(searched.sum()) < 0.9 * np.sqrt(plain.sum())


def test_a_searched_group_computed_by_hand():
    # fifteen steps of 1 fit between -7 and 8 without any error; the largest value alone would ask for steps of 8/7
    weight = np.arange(-7, 9, dtype=np.float32).repeat(2)[None]
    q_weight, q_scale = quantize(weight, ROWS["q4f32_1"], "mse")
    restored = dequantize(q_weight, q_scale, ROWS["q4f32_1"], 32)
    assert abs(q_scale[0, 0] - 1) < 0.02
    assert np.abs(restored - weight).max() < 0.15
    assert np.array_equal(quantize(-weight, ROWS["q4f32_1"], "mse")[0], q_weight)  # the sign is in the scale


def test_compiled_search_finds_scales_as_good(kernels):
    row, weight = ROWS["q4f16_1"], sample((64, 256), np.float32)
    q_weight, q_scale = convert([weight], row, shape=weight.shape, dtype="", scales="mse", kernels=kernels).stored
    ours, theirs = quantize(weight, row, "mse")
    assert (q_scale == theirs).mean() > 0.99  # near ties may go either way
    found = squared_error(weight.astype(np.float32), row, q_weight, q_scale)
    assert found == pytest.approx(squared_error(weight.astype(np.float32), row, ours, theirs), rel=1e-3)


MINIMUM = [row for row in ALL_ROWS.values() if row.minimum and not row.levels]


@pytest.mark.parametrize("row", MINIMUM, ids=lambda row: row.name)
@pytest.mark.parametrize("k", [256, 77])
def test_groups_with_a_minimum_equal_the_plain_statement(row, k):
    """Python floats and loops, rounded to float32 after each operation; and each group's value from its own codes."""
    weight = sample((5, k), np.float16)
    q_weight, q_scale, q_min = minimum.quantize(weight, row)
    found = minimum.dequantize(q_weight, q_scale, q_min, row, k)
    for i in range(5):
        for number, start in enumerate(range(0, k, row.group_size)):
            group = [float(value) for value in weight[i, start : start + row.group_size]]
            scale = rounded(float32(float32(max(group) - min(group)) / 15), row.scale_dtype)
            least = rounded(min(group), row.scale_dtype)
            assert (q_scale[i, number], q_min[i, number]) == (scale, least)
            for j, value in enumerate(group, start=start):
                code = int(q_weight[i, j // 8]) >> 4 * (j % 8) & 15
                assert code == (min(max(round(float32(float32(value - least) / scale)), 0), 15) if scale else 0)
                assert found[i, j] == float32(float32(code * scale) + least)
    assert (unpack(q_weight, 4, q_weight.shape[1] * 8)[:, k:] == 0).all()


@pytest.mark.parametrize("row", MINIMUM, ids=lambda row: row.name)
@pytest.mark.parametrize("k", [256, 77])
def test_a_searched_minimum_is_never_worse_and_much_better_on_the_whole(row, k):
    weight = np.random.default_rng(4).standard_normal((40, k)).astype(np.float32)
    groups = np.arange(0, k, row.group_size)
    errors = []
    for scales in ("max", "mse"):
        rest = weight - minimum.dequantize(*minimum.quantize(weight, row, scales), row, k)
        errors.append(np.add.reduceat(rest**2, groups, axis=1))
    assert (errors[1] <= errors[0] * (1 + 1e-4) + 1e-9).all()
    assert errors[1].sum() < 0.9 * errors[0].sum()


@pytest.mark.parametrize("scales", ["max", "mse"])
def test_weights_of_ggmls_forms_keep_every_bit(scales):
    """Q4_1 (code * d + m), and Q4_0 ((code - 8) * d) with d of either sign, as gguf dequantizes its own."""
    gguf = pytest.importorskip("gguf")
    weight = np.random.default_rng(7).standard_normal((64, 256)).astype(np.float32) + np.float32(0.1)
    kinds = gguf.GGMLQuantizationType
    lattice = gguf.quants.dequantize(gguf.quants.quantize(weight, kinds.Q4_1), kinds.Q4_1)
    row = ROWS["q4a32"]
    found = minimum.dequantize(*minimum.quantize(lattice, row, scales), row, 256)
    assert np.array_equal(found, lattice)
    lattice = gguf.quants.dequantize(gguf.quants.quantize(weight, kinds.Q4_0), kinds.Q4_0)
    row = ROWS["q4s32"]
    assert np.array_equal(dequantize(*quantize(lattice, row, "full"), row, 256), lattice)
    assert not np.array_equal(dequantize(*quantize(lattice, row, "max"), row, 256), lattice)


def test_two_levels_carry_ggmls_q4_k_bit_for_bit():
    """Random blocks of Q4_K, taken apart by the layout that ggml documents: d, dmin, 12 bytes of levels, nibbles."""
    gguf = pytest.importorskip("gguf")
    row, random = ROWS["q4k"], np.random.default_rng(5)
    blocks = random.integers(0, 256, (6, 144), np.uint8)
    floats = random.uniform(-1, 1, (6, 2)).astype(np.float16)
    blocks[:, :4] = floats.view(np.uint8)
    q = blocks[:, 4:16]
    levels = np.zeros((6, 2, 8), np.uint8)
    levels[:, 0, :4], levels[:, 1, :4] = q[:, :4] & 63, q[:, 4:8] & 63
    levels[:, 0, 4:], levels[:, 1, 4:] = q[:, 8:] & 15 | q[:, :4] >> 6 << 4, q[:, 8:] >> 4 | q[:, 4:8] >> 6 << 4
    nibbles = blocks[:, 16:].reshape(6, 4, 32)
    codes = np.stack([nibbles & 15, nibbles >> 4], axis=2).reshape(6, 256)
    stored = pack(codes, 4), two_level.pack_levels(levels[:, 0], levels[:, 1], 4), floats
    assert [x.shape for x in stored] == [shape for _, shape, _ in row.stored(6, 256)]
    wanted = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q4_K)
    assert np.array_equal(restored(stored, row, 256), wanted)


@pytest.mark.parametrize("name", ["q2k", "q3k", "q5k", "q6k"])
def test_planes_hold_every_code_where_the_table_says(name):
    """Codes one by one, by the words of docs/quantization.md: of a group, those of the lowest bits come first; in
    layout n32 every fourth of a word's is in the same byte.
    """
    row = ROWS[name]
    weight = np.random.default_rng(6).standard_normal((3, 96)).astype(np.float32)
    words, levels, outer = quantize_row(weight, row, "max")
    assert words.shape == (3, 3 * row.bits)
    blocks = layouts.arrange("n32", words, row.element_bits[0])
    assert np.array_equal(layouts.restore("n32", blocks, 3, row.element_bits[0]), words)
    codes, moved = np.zeros((2, 3, 96), np.int64)
    for n, i in np.ndindex(3, 96):
        begin, below = i // 32 * row.bits, 0
        for bits in PLANES[row.bits]:
            word, element = divmod(i % 32, 32 // bits)
            mask, place = (1 << bits) - 1, 8 * (element % 4) + bits * (element // 4)
            codes[n, i] |= (int(words[n, begin + word]) >> bits * element & mask) << below
            moved[n, i] |= (int(blocks[0, begin + word, n]) >> place & mask) << below
            begin, below = begin + bits, below + bits
    assert np.array_equal(moved, codes)
    values = restored((words, levels, outer), row, 96)
    for n, g in np.ndindex(3, 3):  # equal codes of a group are equal values, and as many steps apart as the codes
        mine, found = codes[n, 32 * g : 32 * g + 32], values[n, 32 * g : 32 * g + 32]
        step = (found.max() - found.min()) / (mine.max() - mine.min())
        assert np.allclose(found - found.min(), (mine - mine.min()) * step, atol=1e-5)
    assert codes.max() == 2**row.bits - 1


@pytest.mark.parametrize("groups", [1, 7, 8, 12, 18, 34])
@pytest.mark.parametrize(("name", "bits"), [("q2k", {8: 2.375}), ("q4k", {8: 4.5, 18: 4.5})])
def test_levels_lie_where_the_table_says(name, bits, groups):
    """Levels one by one, by the words of docs/quantization.md: groups that fill no block have the floats of the last
    one, and of six bits, those that fill no eight have words of their own.
    """
    row, random = ROWS[name], np.random.default_rng(8)
    k, whole, block, width = 32 * groups, groups // 8, (16, 8)[row.bits == 4], (4, 6)[row.bits == 4]
    code = np.full((2, k * row.bits // 32), 0xFFFFFFFF, np.uint32)  # every code is the largest
    levels = random.integers(0, 1 << width, (2, 2, groups))  # row, scale or minimum, group
    floats = random.uniform(0.5, 1, (2, 2 * max(1, groups // block))).astype(np.float16)
    words = two_level.pack_levels(levels[:, 0], levels[:, 1], row.bits)
    assert [x.shape for x in (code, words, floats)] == [shape for _, shape, _ in row.stored(2, k)]
    if groups in bits:
        assert round(row.bits + (32 * words.shape[1] + 16 * floats.shape[1]) / k, 3) == bits[groups]
    for n, which, g in np.ndindex(2, 2, groups):
        eight, number = divmod(g, 8)
        if width == 4:
            found = int(words[n, g // 4]) >> 8 * (g % 4) + 4 * which & 15
        elif (level := number + which * (8 if eight < whole else groups % 8)) < 15:
            found = int(words[n, 3 * eight + level // 5]) >> 6 * (level % 5) & 63
        else:
            found = sum((int(words[n, 3 * eight + j]) >> 30) << 2 * j for j in range(3))
        assert levels[n, which, g] == found
    shared = np.minimum(np.arange(groups) // block, max(0, groups // block - 1))
    scale, least = (floats[:, which::2][:, shared].astype(np.float32) * levels[:, which] for which in (0, 1))
    wanted = np.repeat(row.most * scale - least, 32, axis=1)
    assert np.allclose(restored((code, words, floats), row, k), wanted, rtol=1e-5, atol=1e-5)


def test_searched_levels_come_nearer_to_scales_that_no_level_is():
    """Weights on the lattice of a row with floats, as those that Q4_1 held: all that is lost is by levels."""
    rng = np.random.default_rng(7)
    scales, least = rng.uniform(0.5, 1.5, (48, 18)), rng.uniform(-9, -6, (48, 18))
    codes = rng.binomial(15, 0.5, (48, 18, 32))
    codes[..., :2] = 0, 15
    weight = ((codes + least[..., None]) * scales[..., None]).reshape(48, 576).astype(np.float32)
    lost = []
    for how in ("max", "mse"):
        error = restored(quantize_row(weight, ROWS["q4k"], how), ROWS["q4k"], 576) - weight
        lost.append(float(np.square(error).mean()))
    assert lost[1] < lost[0] / 2


@pytest.mark.parametrize("k", [256, 576, 77])
def test_two_levels_cost_little_more_than_floats_for_each_group(k):
    weight = np.random.default_rng(4).standard_normal((40, k)).astype(np.float32)
    plain, leveled = (
        np.square(weight - restored(quantize_row(weight, row, scales), row, k)).sum()
        for row, scales in ((ROWS["q4a32"], "max"), (ROWS["q4k"], "mse"))
    )
    assert leveled < plain
    row = ROWS["q4k"]
    words, levels, outer = quantize_row(weight, row, "max")
    assert [(x.shape, x.dtype) for x in (words, levels, outer)] == [
        (shape, np.dtype(dtype)) for _, shape, dtype in row.stored(40, k)
    ]
    peak = np.abs(weight).max()
    assert np.abs(weight - restored((words, levels, outer), row, k)).max() < peak * (2 / 15 / 2 + 2 / 63)
    assert not restored(quantize_row(np.zeros((2, k), np.float32), row, "mse"), row, k).any()


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e9])
def test_two_levels_say_what_does_not_fit(value):
    weight = np.ones((9, 64), np.float32)
    weight[7, 33] = value
    with pytest.raises(ValueError, match=r"\[7, 33\]"):
        two_level.quantize(weight, ROWS["q4k"])


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e6])
def test_a_group_with_a_minimum_says_what_does_not_fit(value):
    weight = np.ones((9, 64), np.float32)
    weight[7, 33] = value
    with pytest.raises(ValueError, match=r"\[7, 33\]"):
        minimum.quantize(weight, ROWS["q4a32"])


def test_groups_of_a_mixed_scheme_fill_every_row():
    body = ROWS["q4a128"]
    assert [body.fitting(k).group_size for k in (256, 576, 96, 48, 40)] == [128, 64, 32, 16, 128]
    scheme = SCHEMES["q4a128"]
    assert scheme.row("linear", 576).group_size == 64
    assert (scheme.row("embedding", 576).bits, scheme.row("norm", 576)) == (8, None)
    assert SCHEMES["q4f16_1"].row("linear", 40).group_size == 32  # MLC-LLM's last groups may be short


def test_float8_codes_and_scale_equal_the_plain_statement():
    """Every finite float8_e4m3fn value from its bits; the nearest one, half to even, for each quotient."""
    table = [
        (1 - 2 * (code >> 7))
        * ((code & 7) * 2**-9 if not code & 0x78 else (8 + (code & 7)) * 2.0 ** ((code >> 3 & 15) - 10))
        for code in range(256)
        if code & 0x7F != 0x7F
    ]
    weight = sample((11, 37), np.float32)
    codes, scale = float8.quantize(weight)
    expected = float32(float(np.abs(weight).max()) / 448)
    assert scale.tolist() == [expected]
    for value, code in zip(weight.ravel(), codes.astype(np.float32).ravel(), strict=True):
        quotient = float32(float(value) / expected)
        nearest = min(abs(quotient - entry) for entry in table)
        assert abs(quotient - code) == nearest
    assert np.array_equal(float8.dequantize(codes, scale), codes.astype(np.float32) * np.float32(expected))
    assert float8.quantize(np.zeros((2, 3), np.float32))[1].tolist() == [float32(1 / (448 * 512))]


def test_float8_in_groups_stores_what_is_such_codes_already_and_rounds_what_is_not():
    """Every finite code by scales of blocks of rows and columns, as FP8 checkpoints have them, the last one short."""
    row, rng = ROWS["e4m3_128"], np.random.default_rng(3)
    every = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    codes = rng.choice(every[np.isfinite(every)], (256, 300))
    codes[:, :128] *= np.float32(2) ** -rng.integers(0, 4, 256).astype(np.float32)[:, None]  # far from the largest code
    codes = codes.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    codes[5] = 0
    scales = np.exp(rng.uniform(-9, -2, (2, 3))).astype(np.float32).repeat(128, 0).repeat(128, 1)[:, :300]
    stored = quantize_row(codes * scales, row, "max")
    assert np.array_equal(restored(stored, row, 300), codes * scales)
    weight = sample((11, 150), np.float32)
    values, found = quantize_row(weight, row, "max")
    peaks = np.maximum.reduceat(np.abs(weight), [0, 128], axis=1)
    assert np.array_equal(found, peaks / np.float32(448))
    steps = np.repeat(found, 128, axis=1)[:, :150]
    assert np.array_equal(values, (weight / steps).astype(ml_dtypes.float8_e4m3fn))
    with pytest.raises(UnfitError):
        quantize_row(np.full((1, 3), np.nan, np.float32), row, "max")


def test_blocks_of_rows_do_not_show():
    k = 96
    weight = np.random.default_rng(1).standard_normal((3 * BLOCK_BYTES // (4 * k) + 5, k)).astype(np.float32)
    whole, scales = quantize(weight, ROWS["q4f16_1"])
    one_by_one = [quantize(row[None], ROWS["q4f16_1"]) for row in weight]
    assert np.array_equal(whole, np.concatenate([q for q, _ in one_by_one]))
    assert np.array_equal(scales, np.concatenate([s for _, s in one_by_one]))


def test_a_group_computed_by_hand():
    # largest |w| is 14, so the scale is 2: w/2 = 7, -7, 0.5, 1.5, 2.5, -0.5, -3, 0; halves round to even
    weight = np.array([[14, -14, 1, 3, 5, -1, -6, 0] + [0] * 24], np.float32)
    q_weight, q_scale = quantize(weight, ROWS["q4f16_1"])
    # codes 14, 0, 7, 9, 9, 7, 4, 7: the first in the lowest bits
    assert q_weight.tolist() == [[0x7479970E, 0x77777777, 0x77777777, 0x77777777]]
    assert q_scale.tolist() == [[2.0]]
    assert dequantize(q_weight, q_scale, ROWS["q4f16_1"], 8).tolist() == [[14, -14, 0, 4, 4, 0, -6, 0]]


@pytest.mark.parametrize("row", SYMMETRIC, ids=lambda row: row.name)
def test_restored_values_are_within_half_a_step(row):
    weight = np.random.default_rng(2).standard_normal((64, 256)).astype(np.float32)
    q_weight, q_scale = quantize(weight, row)
    restored = dequantize(q_weight, q_scale, row, 256)
    steps = np.repeat(q_scale.astype(np.float32), row.group_size, axis=1)[:, :256]
    # the stored scale may be rounded down by half a unit in its last place: the largest value then lies that far out
    slack = row.top * float(ml_dtypes.finfo(row.scale_dtype).eps) / 2 + 1e-5
    assert (np.abs(weight - restored) <= steps * (0.5 + slack)).all()
    assert relative_error(weight, lambda rows: restored[rows]) == pytest.approx(
        (
            np.sqrt(((weight - restored) ** 2).mean() / (weight**2).mean()),
            np.abs(weight - restored).max() / np.abs(weight).max(),
        ),
        rel=1e-5,
    )


@pytest.mark.parametrize("row", SYMMETRIC, ids=lambda row: row.name)
def test_zero_and_vanishing_groups_are_zero(row):
    weight = np.zeros((2, 64), np.float32)
    weight[1, 40:] = 1e-8 if row.scale_dtype == "float16" else 0  # its scale is below float16's range
    q_weight, q_scale = quantize(weight, row)
    codes = (q_weight[..., None] >> (np.arange(row.per_word, dtype=np.uint32) * np.uint32(row.bits))) & np.uint32(
        2**row.bits - 1
    )
    assert (codes.reshape(2, -1)[:, :64] == row.top).all()
    assert not q_scale.any()
    assert not dequantize(q_weight, q_scale, row, 64).any()


@pytest.mark.parametrize(
    ("value", "message"), [(np.nan, "is nan"), (-np.inf, "is -inf"), (1e6, "does not fit float16")]
)
def test_what_cannot_be_stored_is_named_with_its_index(value, message):
    weight = np.ones((3000, 64), np.float32)
    weight[2777, 33] = value
    with pytest.raises(ValueError, match=rf"\[2777, 33\].*{message}"):
        quantize(weight, ROWS["q4f16_1"])
    with pytest.raises(ValueError, match=rf"\[2777, 33\].*{message}"):
        cast(weight, "float16")


def test_cast_rounds_half_to_even_like_ieee():
    values = np.array([1 + 2**-11, 1 + 3 * 2**-11, 65504, 2**-25], np.float32)
    assert cast(values, "float16").tolist() == [rounded(float(value), "float16") for value in values]
    assert np.array_equal(cast(values.astype(ml_dtypes.bfloat16), "float32"), values.astype(ml_dtypes.bfloat16))


def test_shards_load_through_tvm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import tvm
    from tvm.contrib import tvmjs

    monkeypatch.setattr(tensor_cache, "OWN_SHARD_BYTES", 2048)
    random = np.random.default_rng(3)
    tensors = {
        "a.q_weight": random.integers(0, 2**32, (33, 8), np.uint32),
        "a.q_scale": random.standard_normal((33, 2)).astype(np.float16),
        "norm": random.standard_normal(50).astype(np.float32),
        "large": random.standard_normal((40, 40)).astype(np.float32),
        "last": random.standard_normal(3).astype(ml_dtypes.bfloat16),
    }
    entries = {name: Tensor(name, tensor.shape, str(tensor.dtype)) for name, tensor in tensors.items()}
    parameters = [["a.q_weight", "a.q_scale"], ["norm"], ["large"], ["last"]]
    planned = shards([[entries[name] for name in names] for names in parameters])
    assert planned == [[0, 1], [2], [3]]
    contents = [[name for index in shard for name in parameters[index]] for shard in planned]
    for number, names in enumerate(contents):
        (tmp_path / shard_name(number)).write_bytes(b"".join(tensors[name].tobytes() for name in names))
    write_index(tmp_path, [[entries[name] for name in names] for names in contents], {"ParamSize": 5})

    loaded, metadata = tvmjs.load_tensor_cache(str(tmp_path), tvm.cpu())
    assert metadata == {"ParamSize": 5}
    assert list(loaded) == list(tensors)
    tvm.get_global_func("vm.builtin.tensor_cache.load")(str(tmp_path), tvm.cpu().dlpack_device_type(), 0)
    get = tvm.get_global_func("vm.builtin.tensor_cache.get")
    for name, tensor in tensors.items():
        for array in (loaded[name].numpy(), get(name).numpy()):
            assert array.dtype == tensor.dtype
            assert np.array_equal(array, tensor)
    tvm.get_global_func("vm.builtin.tensor_cache.clear")()


def test_small_parameters_share_shards_of_a_limited_size():
    small = [[Tensor(str(i), (200, 250), "float32")] for i in range(1000)]
    planned = shards(small)
    assert [index for shard in planned for index in shard] == list(range(1000))
    assert {len(shard) for shard in planned[:-1]} == {32 * 2**20 // 200_000}


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_error_of_values_whose_squares_fit_no_float32(scale):
    """The same error at every scale."""
    source = np.linspace(1, 2, 64, dtype=np.float32).reshape(8, 8) * np.float32(scale)
    rmse, worst = relative_error(source, lambda rows: source[rows] * np.float32(1.25))
    assert rmse == pytest.approx(0.25, rel=1e-5)
    assert worst == pytest.approx(0.25, rel=1e-5)


@pytest.mark.parametrize("n", [1, 32, 70])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_layouts_are_undone_and_put_elements_where_they_say(n, bits):
    words = np.random.default_rng(n).integers(0, 2**32, (n, 12), dtype=np.uint32)
    assert layouts.arrange("nk", words, [bits]) is words
    blocks = layouts.arrange("n32", words, [bits])
    assert list(blocks.shape) == layouts.shape("n32", words.shape)
    assert np.array_equal(layouts.restore("n32", blocks, n, [bits]), words)
    mask, row = np.uint32(2**bits - 1), n - 1
    for element in range(32 // bits):
        bit = 8 * (element % 4) + bits * (element // 4)
        wanted = (words[row] >> np.uint32(bits * element)) & mask
        assert np.array_equal((blocks[row // 32, :, row % 32] >> np.uint32(bit)) & mask, wanted)
    floats = words.view("<f2")
    restored = layouts.restore("n32", layouts.arrange("n32", floats), n)
    assert np.array_equal(restored.view("<u2"), floats.view("<u2"))


def test_only_what_cpu_kernels_read_directly_is_stored_in_blocks():
    def of(scheme, kind, k):
        return layouts.of("n32", kind, SCHEMES[scheme], SCHEMES[scheme].row(kind, k), SCHEMES[scheme].storage_dtype, k)

    assert {of(scheme, "linear", 64) for scheme in ("q0f32", "q0f16", "q4f16_1", "q8f32_1")} == {"n32"}
    assert {of(scheme, "linear", 64) for scheme in ("q0bf16", "q4bf16_1", "q3f16_1", "e4m3_f16")} == {"nk"}
    assert of("q4f16_1", "linear", 70) == of("q4f16_1", "norm", 64) == "nk"
    assert layouts.of("nk", "linear", SCHEMES["q4f16_1"], SCHEMES["q4f16_1"].body, "float16", 64) == "nk"


def test_a_scheme_of_transposed_matrices_is_so_unless_kernels_read_them_in_blocks():
    def of(target, kind, k=64):
        return layouts.of(target, kind, SCHEMES["q4f16_0"], SCHEMES["q4f16_0"].row(kind, k), "float16", k)

    assert [of("nk", kind) for kind in ("linear", "head", "embedding", "norm")] == ["kn", "kn", "nk", "nk"]
    assert [of("n32", "linear"), of("n32", "linear", 70), of("n32", "embedding", 70)] == ["n32", "kn", "nk"]
