"""CPU libraries of a tiny Qwen against transformers with the same weights."""

from __future__ import annotations

import dataclasses
import functools
import json
import subprocess

import numpy as np
import pytest

from stages.quantization.schemes import SCHEMES as TABLE
from stages.targets import processor
from stages.targets.table import TARGETS
from tests.support import compiled_qwen
from tests.support.bytes_cache import in_bytes

CHUNK = 24
BATCH = 3
# Each dequantization once; what differs from another in the dtype of scales alone waits for `-m slow`.
QUICK = ("q0f32", "q0f16", "q3f16_1", "q4f32_1", "q4f16_1", "q4bf16_1", "e4m3_f16")
SCHEMES = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in TABLE]
IDS = [int(token) for token in np.random.default_rng(3).integers(0, compiled_qwen.ROWS, 64)]
TOLERANCE = 1e-3


class Built:
    """One compiled library with its weights and the reference's logits of IDS."""

    def __init__(self, folder, scheme, *, target="llvm", sep_embed=True, kv_dtype="auto", **options):
        self.registered = compiled_qwen.register(folder, scheme, target)
        sizes = {"prefill_chunk": CHUNK, "max_batch": BATCH, "sep_embed": sep_embed, "kv_dtype": kv_dtype}
        ports = compiled_qwen.build_graphs(folder, self.registered, target, **sizes)
        self.context = compiled_qwen.compile_library(
            folder / "compile", ports, self.registered, target=target, **options
        )
        self.weights = compiled_qwen.weights(self.registered)
        self.expected = compiled_qwen.reference_logits(self.registered, self.weights.meant, IDS)

    def runner(self, sequences=1):
        return compiled_qwen.Runner(self.context.out / "model.so", self.weights.stored, sequences=sequences)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    @functools.cache
    def build(scheme, **options):
        return Built(tmp_path_factory.mktemp(scheme), scheme, **options)

    return build


@pytest.mark.parametrize("scheme", SCHEMES)
def test_prefill_in_chunks_then_decode_equals_the_reference(built, scheme):
    library = built(scheme)
    runner = library.runner()
    at, errors = 0, []
    for size in (1, 17, CHUNK):
        errors.append(compiled_qwen.relative(runner.prefill(IDS[at : at + size]), library.expected[at + size - 1]))
        at += size
    for position in range(at, len(IDS)):
        errors += [compiled_qwen.relative(runner.decode(IDS[position]), library.expected[position])]
    assert max(errors) < TOLERANCE, errors


def test_a_cache_in_bytes_moves_logits_by_what_rounding_keys_and_values_does(tmp_path, monkeypatch):
    """transformers with keys and values that torch rounds; read in chunks, alone or beside others, it is the same."""
    library = Built(tmp_path, "q4f32_1", kv_dtype="int8")
    in_bytes(monkeypatch, "qwen2")
    wanted = compiled_qwen.reference_logits(library.registered, library.weights.meant, IDS)
    moved = compiled_qwen.relative(wanted, library.expected)
    runner = library.runner(BATCH)
    found = [runner.prefill(IDS[:17]), runner.prefill(IDS[17:34])]
    found += [runner.decode(token) for token in IDS[34:36]]
    errors = [compiled_qwen.relative(*each) for each in zip(found, wanted[[16, 33, 34, 35]], strict=True)]
    runner.call("fork_sequence", 0, 9, 20)
    errors.append(compiled_qwen.relative(runner.decode(IDS[20], 9), wanted[20]))
    assert max(errors) < moved / 10, (moved, errors)
    model = json.loads((library.context.out / "metadata.json").read_text())["model"]
    assert model["kv_dtype"] == "int8"
    assert model["cache_bytes_per_token"] == 2 * 2 * 80  # 2 * (32 + 4) for keys, in fours of floats; floats take 256


@pytest.mark.slow
def test_a_target_of_the_processor_is_one_row(tmp_path, monkeypatch):
    """Here one that leaves every kernel to TVM."""
    row = dataclasses.replace(TARGETS["llvm"], name="plain", layout="nk", cpu_kernels=False, long_windows=False)
    monkeypatch.setitem(TARGETS, "plain", row)
    library = Built(tmp_path, "q4f16_1", target="plain")
    metadata = json.loads((library.context.out / "metadata.json").read_text())
    assert metadata["target"]["target"] == "plain"
    assert not [name for name in metadata["kernels"] if name.startswith(("linear_", "silu_gate_"))]
    runner = library.runner()
    errors = [compiled_qwen.relative(runner.prefill(IDS[:CHUNK]), library.expected[CHUNK - 1])]
    errors += [compiled_qwen.relative(runner.decode(IDS[at]), library.expected[at]) for at in range(CHUNK, CHUNK + 8)]
    assert max(errors) < TOLERANCE, errors


@pytest.mark.slow
def test_transposed_matrices_are_read_where_no_kernel_has_a_layout_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setitem(TARGETS, "llvm", dataclasses.replace(TARGETS["llvm"], layout="nk"))
    library = Built(tmp_path, "q4f16_0")
    shapes = {entry["name"]: entry["shape"] for entry in json.loads(library.registered.params.read_text())["params"]}
    assert shapes["transformer.h.0.mlp.c_proj.q_weight"] == [96 // 8, 64]
    assert shapes["transformer.wte.q_weight"] == [compiled_qwen.ROWS, 64 // 8]
    runner = library.runner()
    errors = [compiled_qwen.relative(runner.prefill(IDS[:CHUNK]), library.expected[CHUNK - 1])]
    errors += [compiled_qwen.relative(runner.decode(IDS[at]), library.expected[at]) for at in range(CHUNK, CHUNK + 8)]
    assert max(errors) < TOLERANCE, errors


@pytest.mark.parametrize("scheme", ["q0f32", "q4f32_1"])
def test_sequences_of_a_batch_do_not_see_each_other(built, scheme):
    library = built(scheme)
    runner = library.runner(BATCH)
    lengths = (5, 11, 8)
    chunks = {sequence: IDS[:length] for sequence, length in enumerate(lengths)}
    last = np.cumsum(lengths, dtype="int32") - 1
    logits = runner.forward("batch_prefill", chunks, (1, sum(lengths)), last.astype("int32"))
    for row, length in zip(logits, lengths, strict=True):
        assert compiled_qwen.relative(row, library.expected[length - 1]) < TOLERANCE
    for step in range(4):
        tokens = {sequence: [IDS[length + step]] for sequence, length in enumerate(lengths)}
        logits = runner.forward("batch_decode", tokens, (BATCH, 1))
        for row, length in zip(logits, lengths, strict=True):
            assert compiled_qwen.relative(row, library.expected[length + step]) < TOLERANCE


@pytest.mark.parametrize(
    ("cpu", "activations", "instruction", "tolerance"),
    [
        ("x86-64-v3", "float", "vfmadd231ps", TOLERANCE),
        ("x86-64-v3", "int8", "vpmaddubsw", 5e-2),
        ("x86-64-v3+avxvnni", "int8", "vpdpbusd", 5e-2),
    ],
)
def test_code_for_processors_without_avx512_is_as_right(built, cpu, activations, instruction, tolerance):
    if not set(processor.required_features(cpu)) <= set(processor.required_features(processor.host_cpu())):
        pytest.skip("this processor cannot run it")
    library = built("q4f32_1", mcpu=cpu, activations=activations)
    code = subprocess.run(
        ["objdump", "-d", library.context.out / "model.so"], check=True, capture_output=True, text=True
    ).stdout
    assert instruction in code
    assert "%zmm" not in code
    runner = library.runner()
    errors = [compiled_qwen.relative(runner.prefill(IDS[:CHUNK]), library.expected[CHUNK - 1])]
    errors += [compiled_qwen.relative(runner.decode(IDS[i]), library.expected[i]) for i in range(CHUNK, len(IDS))]
    assert max(errors) < tolerance, errors


def test_embedding_inside_prefill_and_decode(built):
    library = built("q4f32_1", sep_embed=False)
    runner = library.runner()
    assert compiled_qwen.relative(runner.prefill(IDS[:20]), library.expected[19]) < TOLERANCE
    assert compiled_qwen.relative(runner.decode(IDS[20]), library.expected[20]) < TOLERANCE


def test_weights_matter_to_this_comparison(built):
    """Negative control: with one matrix of one layer changed, the logits leave the tolerance."""
    library = built("q0f32")
    stored = list(library.weights.stored)
    names = [param["name"] for param in library.runner().metadata["params"]]
    at = names.index("transformer.h.1.mlp.c_proj.weight")
    stored[at] = stored[at] * np.float32(1.05)
    runner = compiled_qwen.Runner(library.context.out / "model.so", stored)
    assert compiled_qwen.relative(runner.prefill(IDS[:20]), library.expected[19]) > TOLERANCE


def test_an_id_outside_the_vocabulary_is_clipped(built):
    runner = built("q4f32_1").runner()
    assert np.array_equal(runner.embed([compiled_qwen.ROWS + 5, -3]), runner.embed([compiled_qwen.ROWS - 1, 0]))


def test_softmax_with_temperature(built):
    runner = built("q0f32").runner()
    logits = np.random.default_rng(0).standard_normal((2, 1, compiled_qwen.ROWS)).astype("float32") * 10
    temperature = np.array([0.5, 1.7], "float32")
    tensors = [runner.tvm.runtime.tensor(array) for array in (logits, temperature)]
    found = runner.vm["softmax_with_temperature"](*tensors).numpy()
    scaled = logits.astype("float64") / temperature[:, None, None]
    expected = np.exp(scaled - scaled.max(-1, keepdims=True))
    expected /= expected.sum(-1, keepdims=True)
    assert np.abs(found - expected).max() < 1e-6
