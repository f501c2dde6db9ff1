"""The CPU kernels of chosen experts against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import tvm

from stages.kernels.cpu.experts import Experts, experts_kernel, order_kernel
from stages.kernels.cpu.linear_float import LinearLayer
from stages.kernels.cpu.stored import Stored
from stages.quantization import group, layouts
from stages.quantization.schemes import SCHEMES

COUNT, N, K, EACH = 5, 64, 320, 2


def run(function: tvm.tirx.PrimFunc, *arguments: np.ndarray) -> None:
    built = tvm.compile(tvm.IRModule({"main": function.with_attr("global_symbol", "main")}), target="llvm")
    tensors = [tvm.runtime.tensor(each) for each in arguments]
    built["main"](*tensors)
    arguments[-1][...] = tensors[-1].numpy()
    arguments[-2][...] = tensors[-2].numpy()


@pytest.mark.parametrize("scheme", ["q0f32", "q4f16_1"])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_each_row_is_multiplied_by_the_weights_of_its_expert(scheme: str, tokens: int) -> None:
    random = np.random.default_rng(1)
    weight = random.standard_normal((COUNT * N, K), np.float32)
    x = random.standard_normal((tokens, K), np.float32)
    chosen = random.integers(0, COUNT, tokens * EACH).astype(np.int32)
    stored, tensors, moved = Stored(COUNT * N, K, "float32"), [weight], ((),)
    if scheme != "q0f32":
        row = SCHEMES[scheme].row("linear")
        stored = Stored(COUNT * N, K, "float16", 4, 32)
        tensors, moved = [*group.quantize(weight, row)], row.element_bits
        weight = group.dequantize(*tensors, row, K)
    each = zip(tensors, moved, strict=True)
    packed = [np.ascontiguousarray(layouts.arrange("n32", tensor, bits)) for tensor, bits in each]
    rows = tokens * EACH
    y = np.full((rows, N), np.nan, np.float32)
    if tokens == 1:
        run(experts_kernel(Experts(LinearLayer(stored, rows, 0), COUNT, EACH)), x, chosen, *packed, y)
    else:
        order, starts = np.empty(rows, np.int32), np.empty(COUNT + 1, np.int32)
        run(order_kernel(COUNT), chosen, order, starts)
        assert [*chosen[order]] == sorted(chosen)
        assert [*np.diff(starts)] == [*np.bincount(chosen, minlength=COUNT)]
        run(experts_kernel(Experts(LinearLayer(stored, None, 0), COUNT, EACH)), x, order, starts, *packed, y)
    wanted = np.stack([weight.reshape(COUNT, N, K)[e] @ x[at // EACH] for at, e in enumerate(chosen)])
    assert np.abs(y - wanted).max() < 2e-5 * np.abs(wanted).max()
