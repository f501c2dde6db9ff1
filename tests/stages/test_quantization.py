"""The arithmetic of the group schemes against a plain-loop statement of it, and the tensor-cache files against TVM."""

from __future__ import annotations

import math
import struct
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
import pytest

from stages.quantization import layouts
from stages.quantization.blocks import BLOCK_BYTES, cast, relative_error
from stages.quantization.group import dequantize, quantize
from stages.quantization.schemes import SCHEMES, Scheme
from stages.quantization.tensor_cache import TensorCacheWriter

if TYPE_CHECKING:
    from pathlib import Path

GROUP_SCHEMES = [scheme for scheme in SCHEMES.values() if scheme.kind == "group"]


def float32(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]


def rounded(value: float, dtype: str) -> float:
    return struct.unpack("e", struct.pack("e", value))[0] if dtype == "float16" else float32(value)


def by_plain_loops(weight: np.ndarray, scheme: Scheme) -> tuple[list[list[int]], list[list[float]]]:
    """Words and scales from Python floats, integers and loops; doubles rounded to float32 after each operation."""
    n, k = weight.shape
    words = [[0] * math.ceil(k / 8) for _ in range(n)]
    scales = []
    for i in range(n):
        row = [float(value) for value in weight[i]]
        row_scales = []
        for start in range(0, k, 32):
            group = row[start : start + 32]
            scale = rounded(float32(max(abs(value) for value in group) / 7), scheme.storage_dtype)
            row_scales.append(scale)
            for j, value in enumerate(group, start=start):
                code = min(max(round(float32(value / scale)) + 7, 0), 14) if scale else 7
                words[i][j // 8] |= code << 4 * (j % 8)
        scales.append(row_scales)
    return words, scales


@pytest.mark.parametrize("scheme", GROUP_SCHEMES, ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("shape", [(1, 32), (3, 64), (7, 96), (5, 40), (4, 31), (2, 1), (3, 77)], ids=str)
def test_words_and_scales_equal_the_plain_statement(scheme, dtype, shape):
    random = np.random.default_rng(sum(shape))
    weight = (random.standard_normal(shape) * random.choice([1e-6, 1e-2, 1, 300], shape)).astype(dtype)
    words, scales = by_plain_loops(weight, scheme)
    q_weight, q_scale = quantize(weight, scheme)
    assert (q_weight.dtype, q_scale.dtype) == (np.uint32, np.dtype(scheme.storage_dtype))
    assert q_weight.tolist() == words
    assert q_scale.tolist() == scales


def test_blocks_of_rows_do_not_show():
    k = 96
    weight = np.random.default_rng(1).standard_normal((3 * BLOCK_BYTES // (4 * k) + 5, k)).astype(np.float32)
    whole, scales = quantize(weight, SCHEMES["q4f16_1"])
    one_by_one = [quantize(row[None], SCHEMES["q4f16_1"]) for row in weight]
    assert np.array_equal(whole, np.concatenate([q for q, _ in one_by_one]))
    assert np.array_equal(scales, np.concatenate([s for _, s in one_by_one]))


def test_a_group_computed_by_hand():
    # largest |w| is 14, so the scale is 2: w/2 = 7, -7, 0.5, 1.5, 2.5, -0.5, -3, 0; halves round to even
    weight = np.array([[14, -14, 1, 3, 5, -1, -6, 0] + [0] * 24], np.float32)
    q_weight, q_scale = quantize(weight, SCHEMES["q4f16_1"])
    # codes 14, 0, 7, 9, 9, 7, 4, 7: the first in the lowest bits
    assert q_weight.tolist() == [[0x7479970E, 0x77777777, 0x77777777, 0x77777777]]
    assert q_scale.tolist() == [[2.0]]
    assert dequantize(q_weight, q_scale, SCHEMES["q4f16_1"], 8).tolist() == [[14, -14, 0, 4, 4, 0, -6, 0]]


@pytest.mark.parametrize("scheme", GROUP_SCHEMES, ids=lambda scheme: scheme.name)
def test_restored_values_are_within_half_a_step(scheme):
    weight = np.random.default_rng(2).standard_normal((64, 256)).astype(np.float32)
    q_weight, q_scale = quantize(weight, scheme)
    restored = dequantize(q_weight, q_scale, scheme, 256)
    steps = np.repeat(q_scale.astype(np.float32), 32, axis=1)
    # the stored scale may be rounded down by half a unit in its last place: the largest value then lies that far out
    slack = 7 * float(np.finfo(scheme.storage_dtype).eps) / 2 + 1e-6
    assert (np.abs(weight - restored) <= steps * (0.5 + slack)).all()
    assert relative_error(weight, lambda rows: restored[rows]) == pytest.approx(
        (
            np.sqrt(((weight - restored) ** 2).mean() / (weight**2).mean()),
            np.abs(weight - restored).max() / np.abs(weight).max(),
        ),
        rel=1e-5,
    )


@pytest.mark.parametrize("scheme", GROUP_SCHEMES, ids=lambda scheme: scheme.name)
def test_zero_and_vanishing_groups_are_zero(scheme):
    weight = np.zeros((2, 64), np.float32)
    weight[1, 32:] = 1e-8 if scheme.storage_dtype == "float16" else 0  # its scale is below float16's range
    q_weight, q_scale = quantize(weight, scheme)
    assert np.all(q_weight == 0x77777777)
    assert not q_scale.any()
    assert not dequantize(q_weight, q_scale, scheme, 64).any()


@pytest.mark.parametrize(
    ("value", "message"), [(np.nan, "is nan"), (-np.inf, "is -inf"), (1e6, "does not fit float16")]
)
def test_what_cannot_be_stored_is_named_with_its_index(value, message):
    weight = np.ones((3000, 64), np.float32)
    weight[2777, 33] = value
    with pytest.raises(ValueError, match=rf"\[2777, 33\].*{message}"):
        quantize(weight, SCHEMES["q4f16_1"])
    with pytest.raises(ValueError, match=rf"\[2777, 33\].*{message}"):
        cast(weight, "float16")


def test_cast_rounds_half_to_even_like_ieee():
    values = np.array([1 + 2**-11, 1 + 3 * 2**-11, 65504, 2**-25], np.float32)
    assert cast(values, "float16").tolist() == [rounded(float(value), "float16") for value in values]
    assert np.array_equal(cast(values.astype(ml_dtypes.bfloat16), "float32"), values.astype(ml_dtypes.bfloat16))


def test_shards_load_through_tvm(tmp_path: Path):
    import tvm
    from tvm.contrib import tvmjs

    random = np.random.default_rng(3)
    tensors = {
        "a.q_weight": random.integers(0, 2**32, (33, 8), np.uint32),
        "a.q_scale": random.standard_normal((33, 2)).astype(np.float16),
        "norm": random.standard_normal(50).astype(np.float32),
        "too large for a shard": random.standard_normal((40, 40)).astype(np.float32),
        "last": random.standard_normal(3).astype(np.float32),
    }
    with TensorCacheWriter(tmp_path / "weights", shard_bytes=2048) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        writer.finish({"ParamSize": len(tensors)})
    assert sorted(path.stat().st_size for path in (tmp_path / "weights").glob("*.bin")) == [12, 1388, 6400]

    loaded, metadata = tvmjs.load_tensor_cache(str(tmp_path / "weights"), tvm.cpu())
    assert metadata == {"ParamSize": 5}
    assert list(loaded) == list(tensors)
    tvm.get_global_func("vm.builtin.tensor_cache.load")(str(tmp_path / "weights"), tvm.cpu().dlpack_device_type(), 0)
    get = tvm.get_global_func("vm.builtin.tensor_cache.get")
    for name, tensor in tensors.items():
        for array in (loaded[name].numpy(), get(name).numpy()):
            assert array.dtype == tensor.dtype
            assert np.array_equal(array, tensor)
    tvm.get_global_func("vm.builtin.tensor_cache.clear")()


def test_a_failed_writer_leaves_nothing(tmp_path: Path):
    def interrupted() -> None:
        with TensorCacheWriter(tmp_path / "weights") as writer:
            writer.add("a", np.ones(3, np.float32))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        interrupted()
    assert not (tmp_path / "weights").exists()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_error_of_values_whose_squares_fit_no_float32(scale):
    """The same error at every scale."""
    source = np.linspace(1, 2, 64, dtype=np.float32).reshape(8, 8) * np.float32(scale)
    rmse, worst = relative_error(source, lambda rows: source[rows] * np.float32(1.25))
    assert rmse == pytest.approx(0.25, rel=1e-5)
    assert worst == pytest.approx(0.25, rel=1e-5)


@pytest.mark.parametrize("n", [1, 32, 70])
@pytest.mark.parametrize("bits", [4, 8])
def test_layouts_are_undone_and_put_elements_where_they_say(n, bits):
    words = np.random.default_rng(n).integers(0, 2**32, (n, 12), dtype=np.uint32)
    assert layouts.arrange("nk", words, bits) is words
    blocks = layouts.arrange("n32", words, bits)
    assert list(blocks.shape) == layouts.shape("n32", words.shape)
    assert np.array_equal(layouts.restore("n32", blocks, n, bits), words)
    mask, row = np.uint32(2**bits - 1), n - 1
    for element in range(32 // bits):
        bit = 8 * (element % 4) + 4 * (element // 4) if bits == 4 else 8 * element
        wanted = (words[row] >> np.uint32(bits * element)) & mask
        assert np.array_equal((blocks[row // 32, :, row % 32] >> np.uint32(bit)) & mask, wanted)
    floats = words.view("<f2")
    assert np.array_equal(
        layouts.restore("n32", layouts.arrange("n32", floats, bits), n, bits).view("<u2"), floats.view("<u2")
    )
