"""FLOPs and bytes of exported functions, against what the register of parameters says of the matrices."""

from __future__ import annotations

import json
import math

import pytest
import tvm

from stages.graph import cost
from tests.support import compiled_qwen

DTYPE_BYTES = {"uint32": 4, "float32": 4}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    registered = compiled_qwen.register(tmp_path_factory.mktemp("registered"), "q4f32_1", "llvm")
    modules = {}
    for function in ("embed", "prefill", "decode"):
        folder = tmp_path_factory.mktemp(function)
        compiled_qwen.build_graph(folder, registered, "llvm", function, prefill_chunk=32, max_batch=3)
        modules[function] = tvm.ir.load_json((folder / "module.json").read_text())
    params = json.loads(registered.params.read_text())
    return modules, params


def matrices(params, *kinds):
    return sum(math.prod(entry["shape"]) for entry in params["logical"] if entry["kind"] in kinds)


def test_decode_multiplies_and_dequantizes_every_matrix_once(built):
    modules, params = built
    found = cost.costs(modules["decode"])["decode"]
    weights = matrices(params, "linear", "head")
    assert set(found.flops) == {()}
    assert 3 * weights < found.flops[()] < 3.1 * weights  # a multiply-add each, and the dequantized value
    assert found.runtime_calls > 0


def test_prefill_grows_with_the_tokens_and_needs_the_head_once(built):
    modules, params = built
    found = cost.costs(modules["prefill"])["prefill"]
    linear = matrices(params, "linear")
    assert 2 * linear < found.flops["seq_len",] < 2.2 * linear


def test_parameters_are_read_as_they_are_stored(built):
    modules, params = built
    found = cost.costs(modules["decode"])["decode"]
    embedding = next(entry for entry in params["logical"] if entry["kind"] == "embedding")["stored"]
    stored = {p["name"]: math.prod(p["shape"]) * DTYPE_BYTES[p["dtype"]] for p in params["params"]}
    assert found.weights == {(): sum(size for name, size in stored.items() if name not in embedding)}


def test_an_embedding_reads_the_rows_it_takes(built):
    modules, params = built
    found = cost.costs(modules["embed"])["embed"]
    embedding = next(entry for entry in params["logical"] if entry["kind"] == "embedding")
    stored = [p for p in params["params"] if p["name"] in embedding["stored"]]
    row = sum(p["shape"][1] * DTYPE_BYTES[p["dtype"]] for p in stored)
    assert found.weights == {("seq_len",): row}
    assert f"{row:,} * seq_len ({32 * row:,} at seq_len = 32)" in cost.cost_table(modules["embed"])


def test_the_structure_is_of_calls_and_kernels_not_of_names(built):
    modules, _ = built
    found = json.loads(cost.structure(modules["decode"]))
    again = json.loads(cost.structure(tvm.ir.load_json(tvm.ir.save_json(modules["decode"]))))
    assert found == again
    assert any(line.startswith("matmul(float32[1, 1, ") for line in found["functions"]["decode"])
    prefill = json.loads(cost.structure(modules["prefill"]))
    assert prefill["kernels"].items() >= {n: h for n, h in found["kernels"].items() if n == "dequantize"}.items()
