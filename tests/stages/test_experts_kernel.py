"""The CPU kernels of chosen experts against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import tvm

from stages.kernels.cpu.experts import Experts, experts_kernel, order_kernel
from stages.kernels.cpu.linear_float import LinearLayer
from stages.kernels.cpu.linear_int8 import offset_factor, quantizer, with_bytes
from stages.kernels.cpu.stored import Stored
from stages.quantization import group, layouts
from stages.quantization.schemes import SCHEMES
from stages.targets import processor
from tests.support.compiled_qwen import in_bytes

V3 = "x86-64-v3"
COUNT, N, K, EACH = 5, 64, 320, 2


def run(function: tvm.tirx.PrimFunc, *arguments: np.ndarray, cpu: str = "") -> None:
    target = tvm.target.Target({"kind": "llvm", **({"mcpu": cpu} if cpu else {})})
    built = tvm.compile(tvm.IRModule({"main": function.with_attr("global_symbol", "main")}), target=target)
    tensors = [tvm.runtime.tensor(each) for each in arguments]
    built["main"](*tensors)
    for array, tensor in zip(arguments, tensors, strict=True):
        array[...] = tensor.numpy()


def quantized(x: np.ndarray, linear: LinearLayer) -> list[np.ndarray]:
    """Return the bytes, scales and offsets of activations."""
    rows, k, size = *x.shape, linear.weight.group
    made = [
        np.empty((rows, width), dtype)
        for width, dtype in ((k // 4, np.int32), (k // size, np.float32), (k // size, np.int32))
    ]
    run(quantizer(None, 0, k, size, offset_factor(linear)), x, *made, cpu=V3)
    return made


@pytest.mark.parametrize(("scheme", "activations"), [("q0f32", "float"), ("q4f16_1", "float"), ("q4f16_1", "int8")])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_each_row_is_multiplied_by_the_weights_of_its_expert(scheme: str, activations: str, tokens: int) -> None:
    cpu, dot = "", ""
    if activations == "int8":
        cpu, dot = V3, processor.byte_product(processor.required_features(V3))
        if not set(processor.required_features(V3)) <= set(processor.required_features(processor.host_cpu())):
            pytest.skip("this processor cannot run it")
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
    linear = LinearLayer(stored, rows if tokens == 1 else None, 0)
    if dot:
        linear = with_bytes(linear, dot)
    layer, read = Experts(linear, COUNT, EACH), quantized(x, linear) if dot else [x]
    y = np.full((rows, N), np.nan, np.float32)
    if tokens == 1:
        run(experts_kernel(layer), *read, chosen, *packed, y, cpu=cpu)
    else:
        order, starts = np.empty(rows, np.int32), np.empty(COUNT + 1, np.int32)
        run(order_kernel(COUNT), chosen, order, starts)
        assert [*chosen[order]] == sorted(chosen)
        assert [*np.diff(starts)] == [*np.bincount(chosen, minlength=COUNT)]
        run(experts_kernel(layer), *read, order, starts, *packed, y, cpu=cpu)
    x = in_bytes(x, stored.group) if dot else x
    wanted = np.stack([weight.reshape(COUNT, N, K)[e] @ x[at // EACH] for at, e in enumerate(chosen)])
    assert np.abs(y - wanted).max() < 2e-5 * np.abs(wanted).max()
