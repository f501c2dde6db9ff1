"""Linear layers on CUDA: tensor-core instructions in the machine code of prefill, dlight's GEMV kernels in decode."""

from __future__ import annotations

import ctypes
import functools
import gzip
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tvm
from tvm import relax as rx
from tvm import s_tir, tirx

from stagegraph.stage import SourceFiles
from stages.config_parse import ConfigParse
from stages.lowering.merge import merge
from stages.lowering.pipeline import phases
from stages.lowering.schedules import tensor_tiles
from stages.lowering.schedules.tensor_matmul import TensorMatmul
from stages.param_register import ParamRegister
from stages.quantization.parameter import restored
from stages.quantization.schemes import SCHEMES
from stages.targets import toolchain
from stages.targets.cuda import fatbin
from stages.targets.table import TARGETS
from stages.targets.tvm_target import build_target
from tests.support import compiled_qwen
from tests.support.checkpoints import write_hollow
from tests.support.local_context import LocalContext, run_stage

ROW = TARGETS["cuda"]
DATA = Path(__file__).parents[1] / "data"
CONFIGS, EMULATED = DATA / "configs", DATA / "cuda" / "emulated"


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    """Make the inner dimension long enough for the loop over it to stay one, as in a real model."""
    monkeypatch.setattr(compiled_qwen, "MODEL", {**compiled_qwen.MODEL, "hidden": 512, "heads": 4, "ff": 1024})


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_what_tiles_do_is_what_tvm_says(dtype):
    from tvm.s_tir.tensor_intrin import cuda

    size, shared = (16, 16, 16), "shared.dyn"
    expected = [
        cuda.get_wmma_load_intrin(*size, dtype, shared, is_b=False, is_col_major=False),
        cuda.get_wmma_load_intrin(*size, dtype, shared, is_b=True, is_col_major=True),
        cuda.get_wmma_store_intrin(*size, "float32", shared),
        cuda.get_wmma_fill_intrin(*size, "float32"),
        cuda.get_wmma_sync_intrin(*size, dtype, "float32", b_transposed=True),
    ]
    found = [
        tensor_tiles.load(dtype, shared, "a", "row_major"),
        tensor_tiles.load(dtype, shared, "b", "col_major"),
        tensor_tiles.store(shared),
        tensor_tiles.clear(),
        tensor_tiles.multiply(dtype),
    ]
    for pair in zip(found, expected, strict=True):
        for ours, theirs in zip(*pair, strict=True):
            tvm.ir.assert_structural_equal(*(each.without_attr("global_symbol") for each in (ours, theirs)))


SCHEDULED = """
import sys
from stages import profiles
profiles.compiler()
from tests.stages import test_tensor_cores as cores
found = cores.products(cores.Path(sys.argv[1]), "q4f16_1")
assert "wmma" in found.after[sorted(found.prefill - found.decode)[0]].script()
assert "tvm.s_tir.tensor_intrin" not in sys.modules
"""


def test_no_intrinsics_of_other_processors_are_parsed(tmp_path):
    subprocess.run([sys.executable, "-c", SCHEDULED, str(tmp_path)], check=True, cwd=Path(__file__).parents[2])


def callees(module, name):
    """Return the names of the kernels that a function calls."""
    found = set()
    rx.analysis.post_order_visit(
        module[name], lambda node: found.add(node.name_hint) if isinstance(node, tvm.ir.GlobalVar) else None
    )
    return found


def merged(folder, registered):
    """Return the graphs of prefill and decode."""
    contexts = [
        compiled_qwen.build_graph(folder / name, registered, "cuda", name, prefill_chunk=32, max_batch=2)
        for name in ("prefill", "decode")
    ]
    return merge([tvm.ir.load_json((context.out / "module.json").read_text()) for context in contexts])


def products(folder, scheme, arch=80, registered=None):
    """Return the linear layers of prefill and decode, before and after they are scheduled, and who calls them."""
    module = merged(folder, registered or compiled_qwen.register(folder, scheme, "cuda"))
    target, steps = build_target(ROW, "x86-64-v3", [], opt=3, attributes={"arch": f"sm_{arch}"}), phases(ROW)
    with target:
        before = tvm.transform.Sequential([*steps["graph"], *steps["kernels"]])(module)
        after = tvm.transform.Sequential(steps["schedule"])(before.clone())
    functions = ("prefill", "batch_prefill", "decode", "batch_decode")
    called = {name: {kernel for kernel in callees(before, name) if "NT_matmul" in kernel} for name in functions}
    return SimpleNamespace(target=target, before=before, after=after, **called)


def machine_code(found, names, folder, archs):
    """Compile kernels and return architecture -> kernel -> figures."""
    from stages.targets.cuda import device_code

    toolkit = toolchain.toolkit()
    device_code.load_cuda_side(toolkit, toolchain.cxx())
    compile_source = functools.partial(device_code.compile_fatbin, toolkit=toolkit, archs=archs)
    tvm.register_global_func("tvm_callback_cuda_compile", compile_source, override=True)
    kernels = {name: found.after[name].with_attr("global_symbol", name) for name in names}
    with found.target:
        tvm.compile(tvm.IRModule(kernels), target=found.target).export_library(str(folder / "kernels.so"))
    return {
        arch: {name.removesuffix("_kernel"): kernel for name, kernel in kernels.items()}
        for arch, kernels in fatbin.kernels(folder / "kernels.so").items()
    }


@pytest.mark.skipif(toolchain.toolkit() is None, reason="no CUDA toolkit on this machine")
@pytest.mark.parametrize("scheme", ["q0f16", "q0bf16", "q4f16_1", "q4bf16_1"])
def test_prefill_multiplies_on_tensor_cores_and_decode_does_not(scheme, tmp_path):
    found = products(tmp_path, scheme)
    many, one = found.prefill | found.batch_prefill | found.batch_decode, found.decode
    assert len(many - one) == len(one) == 5, "q, k and v; attention's output; gate and up; down; head"
    assert all(("dequantize" in name) == scheme.startswith("q4") for name in many | one), "one kernel per layer"
    for figures in machine_code(found, many | one, tmp_path, (80, 90)).values():
        assert {name for name, kernel in figures.items() if kernel.matrix} == many - one
        assert not any(kernel.spills or kernel.stack for kernel in figures.values())
        # Two blocks of 256 threads on an SM of 64 Ki registers: one loads while the other multiplies.
        assert all(figures[name].registers <= 128 for name in many - one)


@pytest.mark.parametrize("scheme", ["q4f16_1", "q4bf16_1"])
def test_one_row_is_multiplied_by_the_kernels_for_vectors(scheme, tmp_path):
    from tvm.s_tir.dlight import gpu

    found = products(tmp_path, scheme)
    for name in found.decode:
        expected = gpu.GEMV().apply(found.before[name], found.target, False).mod["main"]
        scheduled = found.after[name].without_attr("tirx.is_scheduled")
        tvm.ir.assert_structural_equal(scheduled, expected, map_free_vars=True)


def shared_bytes(kernel, target):
    """Return what a launch of a scheduled kernel grants a block beside what the kernel declares."""
    module = tvm.IRModule({"kernel": kernel.with_attr("global_symbol", "kernel")})
    with target:
        split = s_tir.pipeline.default_s_tir_pipeline()[0](tirx.transform.BindTarget(target)(module))
    launches = re.findall(r"T\.int64\((\d+)\), launch_params=\[.*\"tirx\.use_dyn_shared_memory\"\]", split.script())
    assert len(launches) == 1
    return int(launches[0])


@pytest.mark.parametrize("scheme", ["q0f16", "q4bf16_1"])
def test_a_block_fits_every_architecture(scheme, tmp_path):
    found = products(tmp_path, scheme)
    for name in found.prefill - found.decode:
        assert shared_bytes(found.after[name], found.target) == 32768 <= ROW.limits["max_shared_memory_per_block"]


def source_of(kernel, target):
    """Return the CUDA source of a scheduled kernel."""
    from stages.targets.cuda import device_code

    device_code.load_cuda_side(toolchain.toolkit(), toolchain.cxx())
    sources = []

    def compile_source(code):
        sources.append(code)
        return gzip.decompress((EMULATED.parent / "kernels.fatbin.gz").read_bytes())  # any will do: it is never loaded

    tvm.register_global_func("tvm_callback_cuda_compile", compile_source, override=True)
    with target:
        tvm.tirx.build(tvm.IRModule({"kernel": kernel.with_attr("global_symbol", "kernel")}), target=target)
    return sources[0]


def emulate(source, names, arrays, grid, rows, folder):
    """Run a kernel's CUDA source on this processor; arrays are bound to parameters by name."""
    found = re.search(r"__global__ void __launch_bounds__\(256\) (\w+)\(([^)]*)\) \{", source)
    parameters = [re.fullmatch(r"(.*?)(\w+)", each.strip()).groups() for each in found[2].split(",")]
    order = {f"{name}_ptr": number for number, name in enumerate(names)}
    arguments = ", ".join(
        f"({ty.replace('__restrict__', '')})arrays[{order[name]}]" if "*" in ty else "rows" for ty, name in parameters
    )
    x, y = grid
    driver = f"""
extern "C" void run(void** arrays, int64_t rows) {{
  launch({{{x}, {y}, 1}}, {{32, 8, 1}}, [=] {{ {found[1]}({arguments}); }});
}}
"""
    (folder / "kernel.cc").write_text(source + driver)
    command = ["g++", "-std=c++17", "-O1", "-fno-strict-aliasing", "-w", "-shared", "-fPIC", "-pthread"]
    command += [f"-I{EMULATED}", "-o", str(folder / "kernel.so"), str(folder / "kernel.cc")]
    subprocess.run(command, check=True)
    pointers = (ctypes.c_void_p * len(arrays))(*(array.ctypes.data for array in arrays))
    ctypes.CDLL(str(folder / "kernel.so")).run(pointers, ctypes.c_int64(rows))


@pytest.mark.skipif(toolchain.toolkit() is None, reason="TVM's CUDA side takes the CUDA runtime library")
@pytest.mark.parametrize(
    ("scheme", "rows", "kernels"),
    [
        ("q4bf16_1", 70, 1),
        ("q4a32", 70, 1),
        *(pytest.param(*case, 5, marks=pytest.mark.slow) for case in (("q0f16", 70), ("q0bf16", 70), ("q4f16_1", 1))),
        pytest.param("mxfp4", 70, 1, marks=pytest.mark.slow),
    ],
)
def test_the_source_of_a_kernel_computes_the_layer(scheme, rows, kernels, tmp_path, monkeypatch):
    # Sizes that are no whole blocks: rows, 3 * 160 features, 160 columns.
    monkeypatch.setattr(compiled_qwen, "MODEL", {**compiled_qwen.MODEL, "hidden": 160, "heads": 5, "ff": 224})
    found, draw = products(tmp_path, scheme), np.random.default_rng(3)
    dtype = np.dtype(SCHEMES[scheme].model_dtype)
    tolerance = 2.0 ** {"float16": -10, "bfloat16": -7}[dtype.name]
    for number, name in enumerate(sorted(found.prefill - found.decode)[:kernels]):
        params = [param for param in found.before[name].params if isinstance(param, tirx.Buffer)]
        shapes = [[int(size) if isinstance(size, tirx.IntImm) else rows for size in param.shape] for param in params]
        integers = {"uint32": (0, 2**32), "uint8": (118, 124)}  # codes; exponents of powers of two
        arrays = [
            draw.integers(*integers[param.dtype], shape, param.dtype)
            if param.dtype in integers
            else draw.standard_normal(shape).astype(param.dtype)
            for param, shape in zip(params, shapes, strict=True)
        ]
        *given, out = arrays
        x, *extra = [array for array in given if array.ndim != 2]
        stored = [array for array in given if array.ndim == 2]
        weight = restored(stored, SCHEMES[scheme].body, x.shape[-1]) if len(stored) > 1 else stored[0]
        product = x.astype("float32") @ weight.astype(dtype).astype("float32").T
        expected = product.astype(out.dtype).astype("float32") + sum(array.astype("float32") for array in extra)
        out[...] = np.nan
        names = [param.name for param in params]
        folder = tmp_path / str(number)
        folder.mkdir()
        grid = -(-rows // 64), -(-out.shape[-1] // 128)
        emulate(source_of(found.after[name], found.target), names, arrays, grid, rows, folder)
        assert np.abs(out.astype("float32") - expected).max() <= tolerance * np.abs(expected).max(), name


def test_what_no_tensor_core_takes_is_left_to_other_rules(tmp_path):
    found = products(tmp_path, "q4bf16_1", arch=75)
    rule = TensorMatmul()
    assert all(rule.apply(found.before[name], found.target, False) is None for name in found.prefill | found.decode)
    sm80 = build_target(ROW, "x86-64-v3", [], opt=3, attributes={"arch": "sm_80"})
    taken = {name for name in found.prefill | found.decode if rule.apply(found.before[name], sm80, False) is not None}
    assert taken == found.prefill - found.decode
    floats = products(tmp_path / "floats", "q0f32")
    assert all(rule.apply(floats.before[name], sm80, False) is None for name in floats.prefill)


def hollow(folder, config, scheme):
    """Parse and register a checkpoint with a hole for weights."""
    checkpoint = write_hollow(folder / "checkpoint", config)
    files = SourceFiles(checkpoint, {path.name: path for path in checkpoint.iterdir()}, {})
    params = ConfigParse.Params(checkpoint=str(checkpoint), context_window=1024)
    (folder / "config").mkdir()
    ConfigParse().run(LocalContext(params, folder / "config", {}, {"checkpoint": files}))
    ports = {name: folder / "config" / ConfigParse.outputs[name].path for name in ("config", "tensors")}
    run_stage(ParamRegister(), folder / "params", {"scheme": scheme, "target": "cuda"}, ports)
    return compiled_qwen.Registered(ports["config"], folder / "params" / "params.json")


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["q4f16_1", "q0bf16"])
@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_layers_of_published_models_run_on_tensor_cores(path, scheme, tmp_path):
    config = {**json.loads(path.read_text("utf-8")), "num_hidden_layers": 2}
    found = products(tmp_path, scheme, registered=hollow(tmp_path, config, scheme))
    assert len(found.prefill - found.decode) >= 4
    for name in found.prefill | found.batch_decode:
        assert ("tvm_mma_sync" in found.after[name].script()) == (name not in found.decode), name


def test_only_steps_of_decode_with_static_sizes_are_captured(tmp_path):
    module = merged(tmp_path, compiled_qwen.register(tmp_path, "q4f16_1", "cuda"))
    target = build_target(ROW, "x86-64-v3", [], opt=3, attributes={"arch": "sm_80"})
    steps = phases(ROW, cuda_graph=True)
    with target:
        planned = tvm.transform.Sequential([*steps["graph"], *steps["kernels"], *steps["plan"]])(module)
        after = steps["finalize"][0](planned.clone())
    captured = sorted(name for name in names(after) - names(planned) if "capture" in name)
    assert captured == ["decode_cuda_graph_capture", "decode_cuda_graph_capture1", "decode_cuda_graph_capture2"]
    replayed = "vm.builtin.cuda_graph.run_or_capture"
    assert {name for name in names(after) if replayed in after[name].script()} == {"decode"}
    # Before the first attention, between two, after the last; the cache decides at every step what attention launches.
    matrices = [sum("NT_matmul" in name for name in callees(after, run)) for run in captured]
    assert matrices == [1, 3, 3]
    assert all("attention_kv_cache" not in after[run].script() for run in captured)
    assert after["decode"].script().count("attention_kv_cache") == 2


def names(module):
    return {var.name_hint for var in module.get_global_vars()}
