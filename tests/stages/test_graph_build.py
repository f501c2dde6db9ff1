"""graph-build: what is exported, that it is the same every time, and what a disagreement looks like."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tvm

from stagegraph.stage import StageError
from stages.config_parse import ConfigParse
from stages.graph import FUNCTIONS
from stages.graph_build import GraphBuild
from stages.param_register import ParamRegister
from tests.support import compiled_qwen
from tests.support.checkpoints import write_qwen
from tests.support.local_context import run_stage

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def registered(tmp_path_factory):
    return compiled_qwen.register(tmp_path_factory.mktemp("registered"), "q4f32_1", "llvm")


@pytest.mark.parametrize(
    ("function", "exported"),
    [
        ("embed", ["embed"]),
        ("prefill", ["batch_prefill", "batch_verify", "prefill"]),
        ("decode", ["batch_decode", "decode"]),
        ("kv", ["create_tir_paged_kv_cache"]),
        ("softmax", ["softmax_with_temperature"]),
    ],
)
def test_a_node_exports_its_own_functions_only(tmp_path, registered, function, exported):
    context = compiled_qwen.build_graph(tmp_path, registered, "llvm", function, prefill_chunk=32, max_batch=3)
    graph = json.loads((tmp_path / "graph.json").read_text())
    module = tvm.ir.load_json((tmp_path / "module.json").read_text())
    assert sorted(graph["functions"]) == exported
    found = [var.name_hint for var, fn in module.functions_items() if isinstance(fn, tvm.relax.Function)]
    assert sorted(found) == exported
    for name in exported:
        assert dict(module[name].attrs["tir_var_upper_bound"]) == {"batch_size": 3, "seq_len": 32, "verify_len": 32}
    assert set(context.views) == {"operators", "cost", "ir", "structure.json"}
    assert graph["prefill_chunk"] == 32
    assert graph["page_size"] == 16


@pytest.mark.parametrize("target", ["llvm", "cuda"])
def test_the_kernels_of_the_cache_read_pages_of_the_one_size(tmp_path, target):
    registered = compiled_qwen.register(tmp_path / "registered", "q4f16_1", target)
    compiled_qwen.build_graph(tmp_path, registered, target, "kv")
    page_size = json.loads((tmp_path / "graph.json").read_text())["page_size"]
    module = tvm.ir.load_json((tmp_path / "module.json").read_text())
    found = set()
    for _, function in module.functions_items():
        shapes = re.findall(r"\bpages: T.Buffer\(\(([^)]+)\)", function.script())
        found |= {shape.split(", ")[-2] for shape in shapes}
    assert {size for size in found if size.isdigit()} == {str(page_size)}
    assert "page_size" not in {field.name for field in dataclasses.fields(GraphBuild.Params)}


def test_the_chunk_is_no_longer_than_the_context(tmp_path, registered):
    compiled_qwen.build_graph(tmp_path, registered, "llvm", "softmax", prefill_chunk=100_000)
    context_window = json.loads(registered.model.read_text())["context_window"]
    assert json.loads((tmp_path / "graph.json").read_text())["prefill_chunk"] == context_window


def test_a_chunk_holds_a_token_of_every_sequence(tmp_path, registered):
    compiled_qwen.build_graph(tmp_path / "equal", registered, "llvm", "softmax", prefill_chunk=4, max_batch=4)
    with pytest.raises(StageError, match=r"prefill_chunk: 3 is less than max_batch: 4; .* have at least 4 tokens, or"):
        compiled_qwen.build_graph(tmp_path / "less", registered, "llvm", "softmax", prefill_chunk=3, max_batch=4)
    context_window = json.loads(registered.model.read_text())["context_window"]
    given = {"prefill_chunk": 9999, "max_batch": context_window + 1}
    with pytest.raises(StageError, match=f"prefill_chunk: 9999, bounded to {context_window} by the context, is less"):
        compiled_qwen.build_graph(tmp_path / "context", registered, "llvm", "softmax", **given)


SCRIPT = """
import sys, pathlib
from tests.support import compiled_qwen
model, params, out = map(pathlib.Path, sys.argv[1:])
for function in ("decode", "kv"):
    compiled_qwen.build_graph(out / function, compiled_qwen.Registered(model, params), "llvm", function)
"""


@pytest.mark.slow
def test_two_processes_write_the_same_bytes(tmp_path, registered):
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        out = tmp_path / seed
        command = [sys.executable, "-c", SCRIPT, str(registered.model), str(registered.params), str(out)]
        subprocess.run(command, env=environment, check=True, cwd=tmp_path)
    for function in ("decode", "kv"):
        for file in ("module.json", "graph.json"):
            assert (tmp_path / "1" / function / file).read_bytes() == (tmp_path / "2" / function / file).read_bytes()


def test_every_disagreement_with_the_register_is_listed(tmp_path, registered):
    registry = json.loads(registered.params.read_text())
    by_name = {entry["name"]: entry for entry in registry["params"]}
    by_name["transformer.h.1.mlp.c_proj.q_weight"]["shape"][0] += 1
    registry["params"] = [entry for entry in registry["params"] if entry["name"] != "transformer.ln_f.weight"]
    (tmp_path / "params.json").write_text(json.dumps(registry))
    changed = compiled_qwen.Registered(registered.model, tmp_path / "params.json")
    with pytest.raises(StageError) as error:
        compiled_qwen.build_graph(tmp_path / "out", changed, "llvm", "embed")
    text = str(error.value)
    assert "transformer.h.1.mlp.c_proj.q_weight: stored as [3, 12, 32], the model needs [2, 12, 32]" in text
    assert "transformer.ln_f.weight: the model needs it, the register has no such parameter" in text


@pytest.mark.parametrize("change", ["surplus", "order"])
def test_the_packed_order_is_checked(tmp_path, registered, change):
    registry = json.loads(registered.params.read_text())
    if change == "surplus":
        registry["params"].append({"name": "extra.weight", "shape": [1], "dtype": "float32"})
        message = "extra.weight: registered, but the model does not use it"
    else:
        registry["params"][:2] = registry["params"][1::-1]
        message = "parameter 0: the model packs transformer.wte.q_weight where transformer.wte.q_scale is registered"
    (tmp_path / "params.json").write_text(json.dumps(registry))
    with pytest.raises(StageError, match=message):
        compiled_qwen.build_graph(
            tmp_path / "out", compiled_qwen.Registered(registered.model, tmp_path / "params.json"), "llvm", "embed"
        )


def test_options_that_do_not_fit_are_refused(tmp_path, registered):
    with pytest.raises(StageError, match="float16 does not fit: target llvm computes q4f32_1 in float32"):
        compiled_qwen.build_graph(tmp_path, registered, "llvm", "kv", kv_dtype="float16")
    on_cuda = compiled_qwen.register(tmp_path / "cuda", "q4f16_1", "cuda")
    with pytest.raises(StageError, match="kv_dtype: int8 cannot be built for target cuda; target llvm can"):
        compiled_qwen.build_graph(tmp_path, on_cuda, "cuda", "kv", kv_dtype="int8")
    with pytest.raises(StageError, match="registered for target llvm, this graph is for cuda"):
        compiled_qwen.build_graph(tmp_path, registered, "cuda", "kv")


def test_a_node_uses_its_own_row_and_nothing_shared_reaches_a_function():
    params = GraphBuild.Params(target="llvm", function="softmax")
    assert GraphBuild().rows(params, {})["stages.graph:FUNCTIONS"] == "softmax"
    modules = {row.partition(":")[0] for row in FUNCTIONS.values()}
    for path in (ROOT / "stages").rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text("utf-8"))))
        imported = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        imported |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        assert not imported & modules, f"{path} imports {imported & modules}"


@pytest.mark.parametrize("function", ["prefill", "decode"])
def test_a_graph_grows_by_the_same_with_every_layer(tmp_path, function):
    """Operators, and the bytes that are written, stored and read for them; benchmarks/families.py has the seconds."""
    sizes, calls = [], []
    for layers in (2, 4, 8):
        folder = tmp_path / str(layers)
        checkpoint = write_qwen(folder / "checkpoint", hidden=32, ff=32, layers=layers)
        run_stage(ConfigParse(), folder / "config", {"checkpoint": str(checkpoint)})
        ports = {name: folder / "config" / ConfigParse.outputs[name].path for name in ("config", "tensors")}
        run_stage(ParamRegister(), folder / "params", {"scheme": "q4f32_1", "target": "llvm"}, ports)
        registered = compiled_qwen.Registered(ports["config"], folder / "params" / "params.json")
        out = compiled_qwen.build_graph(folder / "graph", registered, "llvm", function).out
        # Digits apart: numbers of more nodes are longer, and nothing else is.
        sizes.append(len(re.sub(rb"\d+", b"0", (out / "module.json").read_bytes())))
        calls.append(sum(json.loads((out / "graph.json").read_text())["operators"][function].values()))
    assert calls[2] - calls[1] == 2 * (calls[1] - calls[0]) > 0
    assert sizes[2] - sizes[1] == pytest.approx(2 * (sizes[1] - sizes[0]), rel=1e-3)
