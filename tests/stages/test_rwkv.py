"""RWKV-4 before it runs: config keys, the register, the exported graph, the kernels by themselves, CUDA libraries."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import numpy as np
import pytest

from stagegraph.stage import StageError
from stages.checkpoint.errors import ConfigError
from stages.graph import RECURRENT
from stages.graph_build import GraphBuild
from stages.models import load_family
from stages.models.rwkv import FAMILY, RwkvConfig
from stages.runtime import manifest
from stages.targets import toolchain
from tests.support import compiled_qwen, rwkv_models

ROOT = Path(__file__).parents[2]
OLD = {
    "architectures": ["RwkvForCausalLM"],
    "attention_hidden_size": 768,
    "bos_token_id": 0,
    "context_length": 1024,
    "eos_token_id": 0,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "layer_norm_epsilon": 1e-05,
    "model_type": "rwkv",
    "num_hidden_layers": 12,
    "rescale_every": 6,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.28.0.dev0",
    "use_cache": True,
    "vocab_size": 50277,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return rwkv_models.write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


def test_a_published_config_of_either_generation_is_read(checkpoint):
    config = FAMILY.parse(OLD)
    assert config == RwkvConfig(50277, 768, 768, 3072, 12, 1e-5, 6, 1024)
    assert FAMILY.parse(json.loads((checkpoint / "config.json").read_text())).rescale_every == 2
    bare = {key: OLD[key] for key in ("hidden_size", "num_hidden_layers", "vocab_size")}
    assert FAMILY.parse(bare) == config, "what the keys leave out is transformers' default"
    assert FAMILY.parse({**OLD, "rescale_every": -1}).rescale_every == 0


def test_every_problem_of_a_config_is_listed():
    wrong = {"tie_word_embeddings": True, "rescale_every": "often", "per_layer_config": {"0": {}}, "context_length": 0}
    with pytest.raises(ConfigError) as error:
        FAMILY.parse({**OLD, **wrong})
    text = str(error.value)
    for part in (
        "tie_word_embeddings = true",
        "rescale_every = 'often'",
        "per_layer_config = {",
        "context_length",
    ):
        assert part in text
    assert len(error.value.problems) == 4


def test_a_context_may_be_longer_than_the_training_was():
    config = FAMILY.parse(OLD)
    assert FAMILY.context_window(config, 0) == 1024
    assert FAMILY.context_window(config, 100_000) == 100_000


def test_the_parameters_are_transformers_own(checkpoint):
    import transformers

    raw = json.loads((checkpoint / "config.json").read_text())
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert {param.name: param.shape for param in FAMILY.params(FAMILY.parse(raw))} == expected


def test_matrices_are_quantized_and_vectors_stay_float32(tmp_path, checkpoint):
    registered, _ = rwkv_models.parse(tmp_path, checkpoint, "q4f16_1")
    registry = json.loads(registered.params.read_text())
    assert {len(entry["shape"]) == 2 for entry in registry["logical"] if entry["quantize"]} == {True}
    kept = {entry["name"]: entry["dtype"] for entry in registry["logical"] if not entry["quantize"]}
    assert {len(entry["shape"]) == 2 for entry in registry["logical"] if not entry["quantize"]} == {False}
    assert set(kept.values()) == {"float32"}
    stored = {entry["name"]: entry["dtype"] for entry in registry["params"]}
    assert stored["rwkv.blocks.3.attention.time_decay"] == stored["rwkv.blocks.3.attention.time_first"] == "float32"
    assert stored["rwkv.blocks.3.attention.key.q_scale"] == "float16"


@pytest.mark.parametrize(
    ("function", "exported"),
    [
        ("prefill", ["batch_prefill", "prefill"]),
        ("decode", ["batch_decode", "decode"]),
        ("kv", ["create_rnn_state"]),
    ],
)
def test_the_graph_has_a_state_and_no_attention(tmp_path, checkpoint, function, exported):
    registered, _ = rwkv_models.parse(tmp_path, checkpoint, "q4f16_1", "cuda")
    context = compiled_qwen.build_graph(tmp_path / "graph", registered, "cuda", function)
    graph = json.loads((context.out / "graph.json").read_text())
    assert sorted(graph["functions"]) == exported
    assert (graph["state"], graph["kv_dtype"], graph["page_size"]) == ("rnn", None, None)
    assert "attention_kv" not in context.views["ir"]
    assert "paged" not in context.views["ir"]
    layers = rwkv_models.MODEL["num_hidden_layers"]
    for name in exported:
        counts = graph["operators"][name]
        if function == "kv":
            assert counts["vm.builtin.rnn_state_create"] == 1
        else:
            assert counts["vm.builtin.rnn_state_get"] == counts["vm.builtin.rnn_state_set"] == 5 * layers
            assert counts["wkv"] == layers


def test_states_are_float16_only_where_they_are_activations(tmp_path, checkpoint):
    registered, _ = rwkv_models.parse(tmp_path, checkpoint, "q4f16_1", "cuda")
    context = compiled_qwen.build_graph(tmp_path / "graph", registered, "cuda", "kv")
    made = re.findall(
        r'R\.full\(R\.shape\(\[96\]\), R\.const\((.*?), "float\d\d"\), dtype="(float\d\d)"\)', context.views["ir"]
    )
    assert [dtype for _, dtype in made] == ["float16", "float16", "float32", "float32", "float32"]
    assert [float(value) for value, _ in made] == pytest.approx([0, 0, 0, 0, -1e30])


def test_a_kv_dtype_is_refused(tmp_path, checkpoint):
    registered, _ = rwkv_models.parse(tmp_path, checkpoint, "q0f32")
    with pytest.raises(StageError, match="rwkv is recurrent and has no KV cache"):
        compiled_qwen.build_graph(tmp_path / "graph", registered, "llvm", "kv", kv_dtype="float32")


def test_only_recurrent_families_reach_the_recurrent_functions():
    params = GraphBuild.Params(target="llvm", function="prefill")
    assert GraphBuild().rows(params, {"family": "qwen", "state": "kv"})["stages.graph:RECURRENT"] == ()
    assert GraphBuild().rows(params, {"family": "rwkv", "state": "rnn"})["stages.graph:RECURRENT"] == "prefill"
    assert load_family("qwen").state == "kv"
    modules = {row.partition(":")[0] for row in RECURRENT.values()}
    for path in (ROOT / "stages").rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text("utf-8"))))
        imported = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        assert not imported & modules, f"{path} imports {imported & modules}"


def run_kernel(kernel, arrays, outputs):
    import tvm

    tensors = [tvm.runtime.tensor(array) for array in (*arrays, *outputs)]
    tvm.compile(tvm.IRModule({"main": kernel.with_attr("global_symbol", "main")}), target="llvm")["main"](*tensors)
    return [tensor.numpy() for tensor in tensors[len(arrays) :]]


@pytest.mark.parametrize("width", [32, 33])
def test_the_scan_equals_plain_sums_in_float64_even_where_exponentials_overflow(width):
    import tvm

    from stages.kernels import wkv as rwkv_kernels

    random = np.random.default_rng(0)
    rows, ends = 11, np.array([3, 4, 10], "int32")
    k, v = (random.standard_normal((2, rows, width)) * [[[60]], [[1]]]).astype("float32")
    decay, bonus = random.standard_normal((2, width)).astype("float32")
    zeros = np.zeros((3, width), "float32")
    with tvm.target.Target("llvm"):
        kernel = rwkv_kernels.wkv(width, "float32")
    arrays = (k, v, decay, bonus, zeros, zeros, zeros - np.float32(1e30), ends)
    y, *_ = run_kernel(kernel, arrays, [np.empty_like(k), zeros.copy(), zeros.copy(), zeros.copy()])
    fade = np.exp(decay.astype("float64"))
    for start, end in ((0, 3), (4, 4), (5, 10)):
        for t in range(start, end + 1):
            powers = np.stack([k[i] - (t - 1 - i) * fade for i in range(start, t)] + [k[t] + bonus.astype("float64")])
            shares = np.exp(powers - powers.max(0))
            wanted = (shares * v[start : t + 1]).sum(0) / shares.sum(0)
            assert np.abs(y[t] - wanted).max() < 1e-4


def test_ends_outside_the_rows_are_clipped():
    import tvm

    from stages.kernels import wkv as rwkv_kernels

    x = np.arange(40, dtype="float32").reshape(5, 8)
    before = -np.ones((3, 8), "float32")
    with tvm.target.Target("llvm"):
        kernel = rwkv_kernels.token_shift(8, "float32")
    (shifted,) = run_kernel(kernel, (x, before, np.array([-7, 2, 10**6], "int32")), [np.zeros_like(x)])
    assert np.array_equal(shifted, np.concatenate([before[:1], x[:2], before[:1], x[3:4]]))


def test_the_interface_page_tells_what_creates_the_state(tmp_path, checkpoint):
    registered, _ = rwkv_models.parse(tmp_path, checkpoint, "q0f32")
    context = compiled_qwen.build_graph(tmp_path / "graph", registered, "llvm", "kv")
    signature = json.loads((context.out / "graph.json").read_text())["functions"]["create_rnn_state"]
    told = ", ".join(f"{name}: {ty}" for name, ty in signature["inputs"])
    page = " ".join((ROOT / "docs" / "abi.md").read_text("utf-8").split())
    assert f"create_rnn_state({told}) -> {signature['output']}" in page


def test_a_manifest_needs_the_sizes_of_its_kind_of_state():
    sizes = dict.fromkeys(("context_window", "prefill_chunk", "max_batch", "vocab_size", "hidden_size"), 1)
    sizes |= {"sep_embed": True, "scheme": "q0f32", "compute_dtype": "float32"}
    files = {name: {"sha256": "", "size": 1} for name in (*manifest._NEEDED, "rwkv_vocab.txt")}
    texts = {"schema": 1, "name": "", "target": "llvm", "machine": "x86_64", "tvm": {}, "device_code": []}
    texts["cpu"] = {"features": []}

    def problems(**model):
        return manifest._problems_of_form({**texts, "files": files, "model": {**sizes, **model}})

    assert problems(state="rnn", page_size=None) == problems(state="kv", page_size=16) == []
    assert problems(state="kv", page_size=None) == ["'model.page_size' must be a positive 32-bit integer, found None"]
    assert problems(state="ssm") == ["'model.state' is 'ssm'; this runtime knows kv, rnn, hybrid"]


@pytest.mark.slow
@pytest.mark.skipif(toolchain.toolkit() is None, reason="no CUDA toolkit on this machine")
@pytest.mark.parametrize("scheme", ["q0f32", "q4f16_1"])
def test_a_cuda_library_compiles(tmp_path, checkpoint, scheme):
    registered, _ = rwkv_models.parse(tmp_path, checkpoint, scheme, "cuda")
    graphs = compiled_qwen.build_graphs(tmp_path, registered, "cuda", prefill_chunk=32, max_batch=2)
    context = compiled_qwen.compile_library(tmp_path / "compile", graphs, registered, target="cuda", archs=(80, 90))
    metadata = json.loads((context.out / "metadata.json").read_text())
    assert metadata["model"]["state"] == "rnn"
    assert "create_rnn_state" in metadata["functions"]
    kernels = {name.removesuffix("_kernel")[: -len("_01234567")] for name in metadata["kernels"]}
    assert {"wkv", "token_shift", "state_get_", "state_set_"} <= kernels, kernels
    assert {entry["arch"] for entry in metadata["device_code"]} == {80, 90}


def test_on_a_gpu_each_channel_of_each_sequence_is_a_thread():
    import tvm

    from stages.kernels import wkv as rwkv_kernels

    with tvm.target.Target({"kind": "cuda", "arch": "sm_80"}):
        text = rwkv_kernels.wkv(160, "float16").script()
    assert "thread_binding" in text
    assert "batch * T.int64(160)" in text or "batch * 160" in text, text
