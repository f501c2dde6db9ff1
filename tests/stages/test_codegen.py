"""A library kernel by kernel: what names and keeps a kernel, what is compiled again, and what a failure says."""

from __future__ import annotations

import functools
import json
import os
import signal

import pytest
import tvm
from tvm import te, tirx

from stagegraph.stage import Instance, StageError
from stages import profiles
from stages.codegen import forked, objects
from stages.ir.content import WRITTEN, content, written
from stages.ir.text import SCHEDULED, without_places
from stages.lowering.name_kernels import name_kernels
from stages.lowering.plain_names import plain_names
from stages.targets import processor
from tests.support import compiled_qwen, family_models
from tests.support.checkpoints import write_hollow
from tests.support.compiled_qwen import Registered

SIZES = {"prefill_chunk": 32, "max_batch": 2}
CONFIG = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 512, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
    "hidden_act": "silu", "tie_word_embeddings": False, "rope_theta": 1e4, "torch_dtype": "float16",
}  # fmt: skip
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **CONFIG}
MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None, **CONFIG}


def kernel(name, *, scale=2.0, variable="x"):
    data = te.placeholder((8,), name=variable)
    return te.create_prim_func([data, te.compute((8,), lambda i: data[i] * scale, name="y")]).with_attr(
        "global_symbol", name
    )


def names(module):
    return {var.name_hint for var, _ in module.functions_items()}


def test_a_kernel_is_named_by_its_content():
    profiles.compiler()
    first, again, other = (name_kernels(tvm.IRModule({name: kernel(name, scale=scale)})) for name, scale in (
        ("scale3", 2.0), ("scale17", 2.0), ("scale3", 3.0)))  # fmt: skip
    assert names(first) == names(again) != names(other)
    (name,) = names(first)
    assert name == f"scale_{content(first[name])[:8]}"


def test_a_kernel_that_stays_as_it_was_written_is_not_saved_again(monkeypatch):
    profiles.compiler()
    first = name_kernels(tvm.IRModule({"scale": written(kernel("scale"))}))
    text = tvm.ir.save_json(tvm.IRModule({"scale": written(kernel("scale")).with_attr("op_pattern", 0)}))
    saved, save = [], tvm.ir.save_json
    monkeypatch.setattr(tvm.ir, "save_json", lambda node: saved.append(type(node)) or save(node))
    (var,) = name_kernels(tvm.ir.load_json(text)).get_global_vars()
    assert tirx.PrimFunc not in saved
    assert names(first) != {var.name_hint}, "an attribute is content too"


def test_a_kernel_that_was_changed_after_it_was_written_has_another_name():
    profiles.compiler()
    one, other = written(kernel("scale")), written(kernel("scale", scale=3.0))
    stale = other.with_attr(WRITTEN, one.attrs[WRITTEN])
    found = [names(name_kernels(tvm.IRModule({"scale": each}))) for each in (one, other, stale)]
    assert len(set(map(frozenset, found))) == 3


def test_two_contents_with_the_same_beginning_have_two_names(monkeypatch):
    profiles.compiler()
    monkeypatch.setattr("stages.lowering.name_kernels.SUFFIX", 0)
    module = tvm.IRModule({"scale": kernel("scale"), "scale1": kernel("scale1", scale=3.0)})
    named = name_kernels(module)
    assert len(named.functions) == 2
    assert {content(function) for _, function in named.functions_items()} == {
        content(name_kernels(tvm.IRModule({"scale": kernel(name, scale=scale)}))["scale_"])
        for name, scale in (("scale", 2.0), ("scale1", 3.0))
    }


def test_variables_of_the_graph_leave_no_trace():
    modules = [tvm.IRModule({"scale": kernel("scale", variable=variable)}) for variable in ("rms_norm25", "rms_norm49")]
    before, after = ([names(name_kernels(step(module))) for module in modules] for step in (lambda m: m, plain_names))
    assert before[0] != before[1]
    assert after[0] == after[1]
    scheduled = tvm.IRModule({"scale": kernel("scale").with_attr("tirx.is_scheduled", True)})
    tvm.ir.assert_structural_equal(plain_names(scheduled), scheduled)
    assert tvm.ir.save_json(plain_names(scheduled)["scale"]) == tvm.ir.save_json(scheduled["scale"])


def test_no_path_of_this_machine_is_in_a_graph(graphs):
    texts = [instance.path.read_text() for instance in graphs(LLAMA)[0]["module"]]
    assert not [text for text in texts if ".py" in text]
    from tvm.relax.frontend.nn.llm import _page_kernels

    noted = tvm.ir.save_json(_page_kernels._copy_single_page_cpu(1, 16, 32, "float32"))
    assert "_page_kernels.py" in noted
    plain = without_places(noted)
    assert "_page_kernels.py" not in plain
    tvm.ir.assert_structural_equal(tvm.ir.load_json(plain), tvm.ir.load_json(noted))


@pytest.fixture(scope="module")
def graphs(tmp_path_factory):
    """Return config -> (the ports of its graphs, the registered model)."""

    def build(config, scheme="q4f32_1", target="llvm"):
        folder = tmp_path_factory.mktemp("model")
        profiles.compiler()
        write_hollow(folder / "checkpoint", config)
        ports = family_models.parse_and_register(folder, folder / "checkpoint", scheme, target)
        registered = Registered(ports["config"], ports["params"])
        return compiled_qwen.build_graphs(folder, registered, target, **SIZES), registered

    known = {}

    def remembered(config, *more):
        key = json.dumps([config, *more])
        known[key] = known.get(key) or build(config, *more)
        return known[key]

    return remembered


@pytest.fixture(scope="module")
def memo(tmp_path_factory, graphs):
    """Return a memo in which everything of LLAMA is."""
    folder = tmp_path_factory.mktemp("memo")
    compiled(folder / "library", graphs(LLAMA), folder / "memo")
    return folder / "memo"


def compiled(folder, model, memo, **options):
    """Compile; return the kernels that were compiled and not reused, by their names without the digest."""
    ports, registered = model
    context = compiled_qwen.compile_library(folder, ports, registered, memo=memo, **{"target": "llvm", **options})
    rows = [row.strip("| ").split(" | ") for row in context.views["kernels"].splitlines()[2:]]
    made = [name.rpartition("_")[0] for name, seconds, *_ in rows if "reused" not in seconds]
    counts = context.memo.counts["kernel"]
    assert (counts["made"], counts["reused"]) == (len(made), len(rows) - len(made))
    return sorted(made)


def test_kernels_of_the_cache_are_finished_in_the_graph(graphs):
    (cache,) = [port for port in graphs(LLAMA)[0]["module"] if port.each["function"] == "kv"]
    module = tvm.ir.load_json(cache.path.read_text())
    kernels = {var.name_hint: each for var, each in module.functions_items() if isinstance(each, tirx.PrimFunc)}
    assert len(kernels) > 10
    assert not [name for name, each in kernels.items() if SCHEDULED not in each.attrs]
    assert WRITTEN in kernels["batch_decode_paged_kv_cpu"].attrs


def test_nothing_is_compiled_twice(tmp_path, graphs, memo):
    assert compiled(tmp_path, graphs(LLAMA), memo) == []
    assert (tmp_path / "model.so").read_bytes() == (memo.parent / "library" / "model.so").read_bytes()


def test_one_changed_operator_is_one_compiled_kernel(tmp_path, graphs, memo):
    ports, registered = graphs(LLAMA)
    changed = next(port for port in ports["module"] if port.each["function"] == "softmax")
    text = changed.path.read_text()
    assert text.count('"relax.divide"') == 1
    (tmp_path / "module.json").write_text(text.replace('"relax.divide"', '"relax.multiply"'))
    modules = [Instance({}, tmp_path / "module.json") if port is changed else port for port in ports["module"]]
    assert compiled(tmp_path / "out", ({**ports, "module": modules}, registered), memo) == ["multiply"]


@pytest.mark.parametrize(("change", "expected"), [
    ({"rms_norm_eps": 1e-6}, ["rms_norm", "rms_norm"]),  # of one row and of many
    ({"num_hidden_layers": 3}, ["tir_kv_cache_debug_get_kv"]),
    ({"max_position_embeddings": 256}, ["fused_rope"]),  # it refuses positions beyond the context
    ({"rope_theta": 1e6}, []),  # the cache holds the frequencies, its kernels read them
])  # fmt: skip
def test_a_change_compiles_what_it_changes(tmp_path, graphs, memo, change, expected):
    assert compiled(tmp_path / "out", graphs({**LLAMA, **change}), memo) == expected


def test_a_second_model_of_the_same_shapes_compiles_nothing(tmp_path, graphs, memo):
    assert compiled(tmp_path / "out", graphs(MISTRAL), memo) == []


@pytest.mark.slow
def test_the_cache_has_the_same_kernels_whatever_the_weights(tmp_path, graphs, memo):
    ports, registered = graphs(LLAMA, "q0f32")
    cache = next(port.path for port in ports["module"] if port.each["function"] == "kv")
    made = compiled(tmp_path / "out", (ports, registered), memo)
    assert made
    assert not [name for name in made if name in cache.read_text()]


def softmax_of(model):
    ports, registered = model
    chosen = {port: [i for i in instances if i.each["function"] == "softmax"] for port, instances in ports.items()}
    return chosen, registered


def test_another_processor_or_level_is_other_code(tmp_path, graphs, memo):
    other = next(level for level in ("x86-64-v3", "x86-64-v2") if level != processor.host_cpu())
    for number, options in enumerate(({"opt": 2}, {"mcpu": other})):
        found = compiled(tmp_path / str(number), softmax_of(graphs(LLAMA)), memo, **options)
        assert {"divide", "softmax"} < set(found)


def test_a_kept_kernel_is_read_as_it_was_written(tmp_path):
    for number, code in enumerate((objects.Code(b"object"), objects.Code(b"object", b"device", b"launch"))):
        files = [tmp_path / f"{number}{copy}" for copy in "ab"]
        for file in files:
            code.write(file)
            assert objects.Code.read(file) == code
        assert files[0].read_bytes() == files[1].read_bytes()


def test_jobs_that_fail_end_alone(tmp_path):
    def crash():
        os.write(2, b"LLVM ERROR: out of registers\n")
        os.kill(os.getpid(), signal.SIGSEGV)

    def fail():
        print("noise")
        raise ValueError("no such intrinsic")

    jobs = [
        functools.partial((tmp_path / "done").write_text, "done"),
        crash,
        fail,
        *(functools.partial(os._exit, code) for code in (3, 1)),
    ]
    ended = {number: problem for number, _, problem in forked.run(jobs, tmp_path)}
    assert ended.pop(1).startswith("the compiler crashed (SIGSEGV)\nLLVM ERROR: out of registers")
    silent = {number: f"the compiler crashed (exit code {code})" for number, code in ((3, 3), (4, 1))}
    assert ended == {0: "", 2: "no such intrinsic", **silent}
    assert (tmp_path / "done").read_text() == "done"


@pytest.fixture
def softmax(graphs):
    """Return the graph of softmax alone, which makes a library of its own."""
    ports, registered = graphs(LLAMA)
    return {port: [i for i in all_ if i.each["function"] == "softmax"] for port, all_ in ports.items()}, registered


def test_a_crash_of_the_compiler_is_named_and_the_rest_is_kept(tmp_path, softmax, monkeypatch):
    compile_kernel = objects.compile_kernel

    def crash(name, *arguments):
        if name.startswith("divide"):
            os.write(2, b"PLEASE submit a bug report\n")
            os.kill(os.getpid(), signal.SIGSEGV)
        compile_kernel(name, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(objects, "compile_kernel", crash)
        with pytest.raises(StageError) as error:
            compiled(tmp_path / "crashed", softmax, tmp_path / "memo")
    first, *log = str(error.value).splitlines()
    assert first.startswith("kernel divide_")
    assert first.endswith(" of softmax_with_temperature: the compiler crashed (SIGSEGV)")
    assert log[0] == "PLEASE submit a bug report"
    assert not list((tmp_path / "crashed").iterdir()), "what was begun is removed"
    assert compiled(tmp_path / "healed", softmax, tmp_path / "memo") == ["divide"]


def test_an_error_of_the_compiler_is_quoted(tmp_path):
    profiles.compiler()
    bad = tirx.PrimFunc([], tirx.Evaluate(tirx.call_llvm_intrin("int32", "llvm.ctlz", tirx.const(1))))
    target = tvm.target.Target("llvm")
    job = functools.partial(objects.compile_kernel, "bad", bad.with_attr("global_symbol", "bad"), target, None)
    ((_, _, problem),) = forked.run([functools.partial(job, tmp_path / "bad")], tmp_path)
    assert "llvm.ctlz" in problem
