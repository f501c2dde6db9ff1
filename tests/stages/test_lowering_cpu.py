"""The passes of CPU targets: the IR before and after, and what their kernels compute."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tvm
from tvm import relax as rx
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import op

from stages.graph.views import operators
from stages.kernels.cpu import attention as cpu_attention
from stages.kernels.cpu import kv_cache
from stages.kernels.cpu.byte_products import DOTS
from stages.kernels.cpu.kv_cache import Heads, copy_page
from stages.kernels.cpu.kv_cache_int8 import Int8Heads
from stages.kernels.cpu.linear_float import PANEL, linear_kernel
from stages.kernels.cpu.linear_float import LinearLayer as FloatLinear
from stages.kernels.cpu.linear_int8 import PANEL as BYTES_PANEL
from stages.kernels.cpu.linear_int8 import int8_kernel, offset_factor, quantizer, with_bytes
from stages.kernels.cpu.stored import Stored
from stages.lowering.cpu_gate import cpu_gate
from stages.lowering.cpu_linear import cpu_linear, register_tile
from stages.lowering.cpu_norm import cpu_norm
from stages.models.layers import GatedMLP, LayerNorm, Linear, RMSNorm
from stages.models.matrices import FloatMatrix, GroupMatrix, Layout
from stages.quantization import layouts
from stages.quantization.parameter import quantize, restored
from stages.quantization.schemes import SCHEMES
from stages.sizes import PAGE_SIZE as PAGE
from stages.targets import processor
from stages.targets.processor import byte_product
from stages.targets.table import TARGETS
from stages.targets.tvm_target import build_target, host_triple
from tests.stages.test_lowering_passes import export, random
from tests.support import compiled_qwen

BLOCKS = Layout("n32")
V3 = "x86-64-v3"


def matrix(n, k, stored):
    """Return a matrix of the graph, what is stored for it, and its values."""
    weight = np.random.default_rng(n + k).standard_normal((n, k)).astype("float32")
    if stored in SCHEMES:
        row = SCHEMES[stored].body
        packed = quantize(weight, row, "max")
        arrays = [layouts.arrange("n32", t, bits) for t, bits in zip(packed, row.element_bits, strict=True)]
        parameters = [nn.Parameter(array.shape, str(array.dtype)) for array in arrays]
        options = {"bits": row.bits, "group_size": row.group_size, "compute_dtype": "float32"}
        found = GroupMatrix(**dict(zip(row.parts, parameters, strict=True)), shape=(n, k), layout=BLOCKS, **options)
        return found, arrays, restored(packed, row, k)
    array = layouts.arrange("n32", weight.astype(stored))
    found = FloatMatrix(nn.Parameter(array.shape, stored), n, "float32", BLOCKS)
    return found, [array], weight.astype(stored).astype("float32")


def run(module, cpu, name, *arrays):
    return runner(module, cpu, name)(*arrays)


def runner(module, cpu, name):
    """Return the function ``name`` of ``module``, compiled, as one of arrays."""
    mcpu, features = processor.parse(cpu)
    target = build_target(TARGETS["llvm"], mcpu, features, opt=3)
    library = tvm.compile(module, target=target, relax_pipeline=rx.get_default_pipeline(target))
    machine = rx.VirtualMachine(library, tvm.cpu())

    def call(sign, arrays):
        """Memory is used again: what a kernel leaves out must not be there from a call with the same values."""
        tensors = [
            [tvm.runtime.tensor(b) for b in a]
            if isinstance(a, list)
            else tvm.runtime.tensor(np.ascontiguousarray(a * sign))
            for a in arrays
        ]
        return machine[name](*tensors).numpy()

    def twice(*arrays):
        call(np.int8(-1), arrays)
        return call(np.int8(1), arrays)

    return twice


def compiled(cpu, **kernels):
    mcpu, features = processor.parse(cpu)
    module = tvm.IRModule({name: kernel.with_attr("global_symbol", name) for name, kernel in kernels.items()})
    return tvm.compile(module, target=build_target(TARGETS["llvm"], mcpu, features, opt=3))


def relative(found, wanted):
    return np.abs(found - wanted).max() / np.abs(wanted).max()


class Block(nn.Module):
    def __init__(self, weight, bias):
        self.linear = Linear(weight, nn.Parameter(bias.shape, str(bias.dtype)))

    def forward(self, x, residual):
        return residual + self.linear(x)


@pytest.mark.parametrize("cpu", list(dict.fromkeys([processor.host_cpu(), V3, "x86-64"])))
@pytest.mark.parametrize(
    ("stored", "n", "k"),
    [
        ("q4f32_1", 96, 2 * PANEL + 64),
        ("q4f16_1", 45, 96),
        ("q4a32", 45, 96),
        ("q4a128", 661, 2 * PANEL + 128),
        ("q4a16", 70, 48),
        ("q4k", 70, 2 * PANEL + 96),
        ("q3k", 70, 4 * PANEL + 96),
        ("q6k", 45, 96),
        ("mxfp4", 70, PANEL + 96),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in (("q2k", 70, 96), ("q5k", 640, 2 * PANEL + 64))),
        ("float16", 70, 41),
        ("float32", 20, PANEL + 3),
        *((stored, n, 64) for stored in ("q8f16_1", "float16") for n in (640, 661)),  # streams of blocks
    ],
)
def test_a_linear_with_bias_and_residual_becomes_one_kernel(cpu, stored, n, k):
    if not set(processor.required_features(cpu)) <= set(processor.required_features(processor.host_cpu())):
        pytest.skip("this processor cannot run it")
    weight, arrays, values = matrix(n, k, stored)
    bias = random(n).astype("float16")
    for rows in ("s", 1):
        before = export(Block(weight, bias), x=([1, rows, k], "float32"), residual=([1, rows, n], "float32"))
        assert {"matmul", "dequantize", "add"} <= set(operators(before)["forward"])
        after = cpu_linear(processor.required_features(cpu))(before)
        ((kernel, calls),) = operators(after)["forward"].items()
        assert (kernel.rstrip("0123456789"), calls) == ("linear", 1)
        forward = runner(after, cpu, "forward")
        for count in (1, 2, 3, 7, 8, 21) if rows == "s" else (1,):
            x, residual = random(1, count, k), random(1, count, n)
            wanted = x @ values.T + bias.astype("float32") + residual
            assert relative(forward(x, residual, [*arrays, bias]), wanted) < 1e-5


@pytest.mark.parametrize("stored", ["q4f16_1", "q8f16_1"])
def test_one_row_of_one_sign_keeps_its_digits(stored):
    """What elements count from must not add up over such a row: taken off only group by group, it cost 4e-6."""
    row, (n, k) = SCHEMES[stored].body, (64, 256)
    _, arrays, values = matrix(n, k, stored)
    layer = FloatLinear(Stored(n, k, "float16", row.bits, row.group_size), 1, 0)
    x, y = np.abs(random(1, k)), tvm.runtime.tensor(np.zeros((1, n), "float32"))
    kernel = compiled(processor.host_cpu(), row=linear_kernel(layer))["row"]
    kernel(*map(tvm.runtime.tensor, (x, *arrays)), y)
    assert relative(y.numpy(), x.astype("float64") @ values.astype("float64").T) < 6e-7


@pytest.mark.parametrize("cpu", list(dict.fromkeys([processor.host_cpu(), f"{V3}+avxvnni", V3])))
@pytest.mark.parametrize(
    ("stored", "n", "k"),
    [
        ("q4f16_1", 96, 2 * BYTES_PANEL + 64),
        ("q8f16_1", 661, 64),
        ("q4k", 70, 2 * BYTES_PANEL + 96),
        ("q6k", 45, 96),
        ("mxfp4", 70, BYTES_PANEL + 96),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in (
                ("q2k", 45, 96),
                ("q3k", 661, BYTES_PANEL + 32),
                ("q5k", 70, 96),
                ("q4f32_1", 45, 96),
                ("q8f32_1", 70, BYTES_PANEL + 32),
                ("q4s16", 45, 48),
                ("q4s32", 45, 96),
                ("q4s64", 45, 192),
                ("q4s128", 640, 256),
                ("q4a16", 70, BYTES_PANEL + 48),
                ("q4a32", 45, 96),
                ("q4a64", 640, 128),
                ("q4a128", 661, 256),
            )
        ),
    ],
)
def test_quantized_activations_are_multiplied_exactly(cpu, stored, n, k):
    """By the formula of docs/abi.md in float64: what is left is the rounding of a float32 sum of groups."""
    features = processor.required_features(cpu)
    if not byte_product(features) or not set(features) <= set(processor.required_features(processor.host_cpu())):
        pytest.skip("this processor cannot run it")
    weight, arrays, values = matrix(n, k, stored)
    bias, group = random(n), SCHEMES[stored].body.group_size
    for rows in ("s", 1):
        before = export(Block(weight, bias), x=([1, rows, k], "float32"), residual=([1, rows, n], "float32"))
        after = cpu_linear(features, "int8")(before)
        assert sorted(name.rstrip("0123456789") for name in operators(after)["forward"]) == ["linear", "quantize_rows"]
        forward = runner(after, cpu, "forward")
        for count in (1, 2, 7, 13) if rows == "s" else (1,):
            x, residual = random(1, count, k), random(1, count, n)
            x[0, 0, :group] = 0
            wanted = compiled_qwen.in_bytes(x, group) @ values.T.astype("float64") + bias + residual
            found = forward(x, residual, [*arrays, bias])
            assert relative(found, wanted) < 2e-6
            assert 1e-4 < relative(found, x @ values.T + bias + residual) < 3e-2


@pytest.mark.parametrize(
    ("bits", "group", "minimum"),
    [
        (4, 64, True),
        (8, 16, False),
        *(
            pytest.param(bits, group, minimum, marks=pytest.mark.slow)
            for bits in (4, 8)
            for group in (16, 32, 64, 128)
            for minimum in (False, True)
        ),
    ],
)
def test_the_largest_codes_and_activations_do_not_saturate(bits, group, minimum):
    """Instructions that add pairs up in 16 bits saturate: every code and activation at its end, of equal signs."""
    features = processor.required_features(V3)
    weight = Stored(32, 2 * group, "float32", bits, group, minimum=minimum)
    layer = with_bytes(FloatLinear(weight, None, 0), byte_product(features))
    size = layer.rows, layer.outer, weight.k, group, offset_factor(layer)
    library = compiled(
        V3, quantize=quantizer(*size), several=int8_kernel(layer), one=int8_kernel(replace(layer, rows=1))
    )
    codes = np.full((2 * group // weight.per_word, 32), 0xFFFFFFFF, "uint32")
    codes[:, 16:] = 0
    scales, least = (np.ones((1, 2, 32), "float32") * value for value in (1, -3))
    x = np.ones((5, 2 * group), "float32")
    x[1::2] = -1
    tensors = [tvm.runtime.tensor(a) for a in (codes[None], scales, *[least][:minimum])]
    values = np.repeat([2**bits - 1.0, 0.0], 16) - (3 if minimum else weight.middle)
    for name, rows in (("several", 5), ("one", 1)):
        words, of_rows, offsets, y = (
            tvm.runtime.tensor(np.zeros(shape, dtype))
            for shape, dtype in (
                ((rows, weight.k // 4), "int32"),
                ((rows, 2), "float32"),
                ((rows, 2), "int32"),
                ((rows, 32), "float32"),
            )
        )
        library["quantize"](tvm.runtime.tensor(x[:rows]), words, of_rows, offsets)
        library[name](words, of_rows, offsets, *tensors, y)
        assert relative(y.numpy(), x[:rows].sum(1, keepdims=True) * values) < 1e-6


@pytest.mark.parametrize("stored", ["q6k", *(pytest.param(name, marks=pytest.mark.slow) for name in ("q3k", "q5k"))])
def test_the_largest_codes_of_planes_do_not_saturate(stored):
    features, row, (n, k) = processor.required_features(V3), SCHEMES[stored].body, (32, 64)
    held = np.ones((n, k), "float32")
    held[:, :: row.group_size] = 0  # the minimum: all other codes are the largest
    packed = quantize(held, row, "max")
    tensors = [layouts.arrange("n32", t, bits) for t, bits in zip(packed, row.element_bits, strict=True)]
    weight = Stored(n, k, row.scale_dtype, row.bits, row.group_size, row.minimum, row.levels)
    layer = with_bytes(FloatLinear(weight, 1, 0), byte_product(features))
    quantizes = quantizer(1, 0, k, row.group_size, offset_factor(layer))
    library = compiled(V3, quantize=quantizes, one=int8_kernel(layer))
    for sign in (1, -1):
        shapes = (((1, k // 4), "int32"), ((1, 2), "float32"), ((1, 2), "int32"), ((1, n), "float32"))
        *read, y = (tvm.runtime.tensor(np.zeros(shape, dtype)) for shape, dtype in shapes)
        x = np.full((1, k), sign, "float32")
        library["quantize"](tvm.runtime.tensor(x), *read)
        library["one"](*read, *map(tvm.runtime.tensor, tensors), y)
        assert relative(y.numpy(), x @ restored(packed, row, k).T) < 1e-6


def test_every_way_to_multiply_bytes_has_instructions():
    assert list(DOTS) == list(processor.BYTE_PRODUCTS)
    assert byte_product(processor.required_features(f"{V3}+avxvnni")) == "avxvnni"
    assert byte_product(processor.required_features("x86-64-v4+avx512vnni")) == "avx512vnni"
    assert byte_product(processor.required_features("x86-64-v4")) == "avx2"
    assert byte_product(processor.required_features("x86-64-v2")) == ""


def test_a_product_that_is_read_twice_is_not_taken_up():
    class Both(nn.Module):
        def __init__(self, weight):
            self.linear = Linear(weight, None)

        def forward(self, x, residual):
            product = self.linear(x)
            return residual + product, product

    weight, _, _ = matrix(96, 64, "float16")
    before = export(Both(weight), x=([1, "s", 64], "float32"), residual=([1, "s", 96], "float32"))
    after = cpu_linear(processor.required_features(V3))(before)
    assert operators(after)["forward"] == {"linear": 1, "add": 1}


def test_layers_with_float_weights_keep_float_activations():
    weight, _, _ = matrix(32, 32, "float16")
    before = export(Block(weight, random(32)), x=([1, "s", 32], "float32"), residual=([1, "s", 32], "float32"))
    ((kernel, _),) = operators(cpu_linear(("avx512f", "avx512vnni"), "int8")(before))["forward"].items()
    assert kernel.startswith("linear")


def test_what_two_read_is_computed_once():
    class Twice(nn.Module):
        def __init__(self, weight):
            self.linear = Linear(weight)

        def forward(self, x):
            y = self.linear(x)
            return op.silu(y) + y

    weight, arrays, values = matrix(32, 32, "float32")
    after = cpu_linear(())(export(Twice(weight), x=([1, "s", 32], "float32")))
    assert operators(after)["forward"] == {"linear": 1, "nn.silu": 1, "add": 1}
    x = random(1, 3, 32)
    y = x @ values.T
    assert relative(run(after, V3, "forward", x, arrays), y / (1 + np.exp(-y)) + y) < 1e-5


def test_accumulators_fit_the_registers():
    for features, registers, width in ((("avx2",), 16, 8), (("avx2", "avx512f"), 32, 16), ((), 16, 4)):
        rows, lanes = register_tile(features)
        assert rows * lanes // width + lanes // width + 1 <= registers


@pytest.mark.parametrize("stored", ["q4f32_1", "float16"])
def test_rows_of_a_table_in_blocks_are_read_alone_and_ids_clipped(stored):
    class Table(nn.Module):
        def __init__(self, weight):
            self.weight = weight

        def forward(self, ids):
            return self.weight.rows(ids)

    weight, arrays, values = matrix(70, 64, stored)
    module = export(Table(weight), ids=(["s"], "int32"))
    assert operators(module)["forward"] == {"rows": 1}
    ids = np.array([3, 69, 31, 500, -2], "int32")
    assert np.array_equal(run(module, V3, "forward", ids, arrays), values[[3, 69, 31, 69, 0]])


@pytest.mark.parametrize("shape", [(1, "s", 96), (1, 1, 70), ("s", 40), (1, "s", 3, 32)])
@pytest.mark.parametrize("centred", [False, True])
def test_a_norm_becomes_one_kernel(shape, centred):
    width = shape[-1]
    parameters = [random(width).astype("float16"), np.full(width, 0.25, "float16")][: 1 + centred]

    class Normed(nn.Module):
        def __init__(self):
            made = [nn.Parameter((width,), "float16") for _ in parameters]
            self.norm = LayerNorm(*made, 1e-5) if centred else RMSNorm(*made, 1e-5)

        def forward(self, x):
            return self.norm(x)

    before = export(Normed(), x=(list(shape), "float32"))
    after = cpu_norm(before)
    name = "layer_norm" if centred else "rms_norm"
    assert f"nn.{name}" in operators(before)["forward"]
    assert operators(after)["forward"] == {name: 1}
    for count in (1, 5, 4000):
        x = random(*(count if size == "s" else size for size in shape)) + 1
        middle = x - x.mean(-1, keepdims=True) if centred else x
        wanted = middle / np.sqrt((middle**2).mean(-1, keepdims=True) + 1e-5) * parameters[0].astype("float32")
        wanted = wanted + 0.25 if centred else wanted
        assert relative(run(after, V3, "forward", x, parameters), wanted) < 1e-5


def test_a_gate_becomes_one_kernel_and_survives_large_values():
    class Ones(nn.Module):
        def forward(self, x):
            return x

    before = export(GatedMLP(Ones(), Ones()), x=([1, "s", 140], "float32"))
    assert operators(before)["forward"] == {"multiply": 1, "nn.silu": 1, "split": 1}
    after = cpu_gate(before)
    assert operators(after)["forward"] == {"silu_gate": 1}
    x = random(1, 3, 140) * 50
    x[0, 0, :4] = 3e4, -3e4, 0, -87
    gate, up = np.split(x.astype("float64"), 2, -1)
    with np.errstate(over="ignore"):
        wanted = gate / (1 + np.exp(-gate)) * up
    found = run(after, V3, "forward", x, [])
    assert np.isfinite(found).all()
    assert np.abs(found - wanted).max() <= 1e-6 * np.abs(wanted).max()


def test_tokens_of_a_page_are_copied_with_their_transposed_keys():
    heads = Heads(2, 2, 32)
    library = compiled(V3, copy=copy_page(heads))
    pages = random(3, 2, 2, PAGE, 32)
    tensor = tvm.runtime.tensor(pages)
    library["copy"](tensor, 2, 0, 5)
    found = tensor.numpy()
    keys, before = (array[:, 0].reshape(3, 2, 32, PAGE) for array in (found, pages))
    assert np.array_equal(keys[0][..., :5], before[2][..., :5])
    assert np.array_equal(keys[0][..., 5:], before[0][..., 5:])
    assert np.array_equal(found[0, 1, :, :5], pages[2, 1, :, :5])
    assert np.array_equal(found[0, 1, :, 5:], pages[0, 1, :, 5:])


def test_attention_within_chunks_sees_those_tokens_of_a_prefill_that_are_of_the_chunk_of_each():
    """The scale's sign says whether a layer attends within chunks; positions begin where the prefill before ended."""
    heads, n, first, chunk = Heads(2, 1, 16), 13, 3, 5
    kernel = cpu_attention.prefill_ragged(heads, 16, cpu_attention.Options(chunk=chunk))
    library = compiled(V3, attend=kernel)
    q, k, v = random(n, 2, 16), random(n, 1, 16), random(n, 1, 16)
    positions = np.arange(first, first + n, dtype=np.int32)
    ends = np.array([0, n], np.int32)
    seen = np.tril(np.ones((n, n), bool))
    for scale, visible in ((0.3, seen), (-0.3, seen & (positions[:, None] // chunk == positions // chunk))):
        output, lse = tvm.runtime.tensor(np.empty_like(q)), tvm.runtime.tensor(np.empty((n, 2), np.float32))
        inputs = [tvm.runtime.tensor(each) for each in (q, ends, k, v, ends, positions, positions[:1].copy())]
        library["attend"](*inputs, output, lse, 1, 0, 1.0, 1.0, scale)
        scores = np.where(visible, np.einsum("qhd,kd->hqk", q, k[:, 0]) * abs(scale), -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        wanted = np.einsum("hqk,kd->qhd", weights / weights.sum(-1, keepdims=True), v[:, 0])
        assert np.abs(output.numpy() - wanted).max() < 1e-5


def test_kernels_are_made_for_aarch64(tmp_path):
    heads, tile = Heads(6, 2, 32), register_tile(())
    made = {
        "decode": cpu_attention.decode(heads, 32),
        "window": cpu_attention.prefill(heads, 32, 20),
        "ragged": cpu_attention.prefill_ragged(heads, 32),
        "append": kv_cache.append(heads),
        "bytes": cpu_attention.decode(Int8Heads(6, 2, 32), 32),
        "packed": linear_kernel(FloatLinear(Stored(96, 64, "float16", 4, 32), None, 1, tile=tile)),
        "plain": linear_kernel(FloatLinear(Stored(96, 64, "float16"), 1, 1, tile=tile)),
    }
    module = tvm.IRModule({name: kernel.with_attr("global_symbol", name) for name, kernel in made.items()})
    triple = host_triple("aarch64")
    target = tvm.target.Target({"kind": "llvm", "mtriple": triple, "mcpu": "generic", "mattr": ["+neon"]})
    code = tvm.compile(module, target=target).mod
    code.write_to_file(str(tmp_path / "kernels.o"), "o")
    assert int.from_bytes((tmp_path / "kernels.o").read_bytes()[18:20], "little") == 183  # ELF's number of aarch64
    assembly = code.inspect_source("s")
    assert all(instruction in assembly for instruction in ("fmla\tv", "fcvtl", "prfm"))


@pytest.mark.parametrize("stored", ["q2k", "q3k", "q5k", "q6k"])
def test_rows_of_a_table_in_planes_are_what_it_holds(stored):
    """By the operator that graphs rebuild weights with, which no kernel takes the place of."""
    weight, arrays, values = matrix(40, 320, stored)

    class Table(nn.Module):
        def __init__(self) -> None:
            self.weight = weight

        def forward(self, ids):
            return weight.rows(ids)

    forward = runner(export(Table(), ids=([3], "int32")), processor.host_cpu(), "forward")
    ids = np.array([39, 0, 17], np.int32)
    assert np.allclose(forward(ids, arrays), values[ids], rtol=1e-6, atol=1e-7)
