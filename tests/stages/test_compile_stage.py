"""compile as a stage: what it resolves, refuses and repeats, its interface page, and its CUDA libraries."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from stagegraph.errors import SpecError
from stagegraph.planning.dag import Dag
from stagegraph.spec.load import load
from stagegraph.stage import Instance, StageError
from stagegraph.store.index import Index
from stagegraph.store.objects import Store
from stages.codegen.agreement import takes_bytes
from stages.compile import Compile
from stages.targets import processor, toolchain
from stages.targets.cuda import fatbin
from stages.targets.cuda.fatbin import FatbinEntry
from stages.targets.table import TARGETS
from stages.targets.toolchain import Program
from stages.targets.tvm_target import build_target
from tests.support import compiled_qwen, family_models
from tests.support.checkpoints import write_qwen
from tests.support.local_context import Elsewhere

ROOT = Path(__file__).parents[2]
ABI = ROOT / "docs" / "abi.md"


@pytest.fixture(scope="module")
def graphs(tmp_path_factory):
    @functools.cache
    def build(target, scheme="q4f16_1"):
        folder = tmp_path_factory.mktemp(target)
        registered = compiled_qwen.register(folder, scheme, target)
        return registered, compiled_qwen.build_graphs(folder, registered, target, prefill_chunk=32, max_batch=2)

    return build


@pytest.fixture(scope="module")
def library(tmp_path_factory, graphs):
    registered, ports = graphs("llvm")
    return compiled_qwen.compile_library(tmp_path_factory.mktemp("library"), ports, registered, target="llvm")


def resolved(**params):
    return Compile().resolve(Compile.Params(**params))


def test_auto_becomes_a_literal():
    params = resolved(target="llvm")
    assert params.mcpu == processor.host_cpu() != "auto"
    assert (params.archs, params.fast_math, params.toolchain) == ((), False, "none")
    unused = {"archs": (90,), "fast_math": True, "cuda_graph": True}
    assert resolved(target="llvm", **unused) == params, "what llvm has no use for must not matter"


def test_architectures_are_sorted_and_checked():
    assert resolved(target="cuda", archs=(90, 80, 90)).archs == (80, 90)
    assert resolved(target="cuda", archs=(75, 200)).archs == (75, 200), "a toolkit to come may know it"
    with pytest.raises(StageError) as error:
        resolved(target="cuda", archs=(60, 77, 80), opt=4, mcpu="x86-64-v3+mmxx")
    assert [line.split(":")[0] for line in str(error.value).splitlines()][:1]
    for part in ("60 is not an architecture", "77 is not an architecture", "opt: 4", "'mmxx'"):
        assert part in str(error.value)


@pytest.mark.parametrize("choice", [{"target": "cuda"}, {"target": "llvm", "mcpu": "x86-64-v2"}])
def test_quantized_activations_need_the_instructions(choice):
    built_for = "mcpu x86-64-v2" if "mcpu" in choice else "target cuda"
    with pytest.raises(StageError, match=f"int8 cannot be built for {built_for}: it takes target llvm and .*x86-64-v3"):
        resolved(activations="int8", **choice)
    for mcpu in ("x86-64-v3", "x86-64-v3+avxvnni", "x86-64-v4", "x86-64-v4+avx512vnni"):
        assert resolved(target="llvm", mcpu=mcpu, activations="int8").activations == "int8"


@pytest.mark.parametrize("scheme", ["q0f32", "q3f16_1", "q4bf16_1", "e4m3_f16"])
def test_quantized_activations_need_weights_that_their_kernels_read(tmp_path, scheme):
    registered = compiled_qwen.register(tmp_path, scheme, "llvm")
    graph = compiled_qwen.build_graph(tmp_path / "graph", registered, "llvm", "softmax")
    ports = {port: [Instance({}, graph.out / f"{port}.json")] for port in ("module", "graph")}
    choice = {"target": "llvm", "mcpu": "x86-64-v4+avx512vnni", "activations": "int8"}
    with pytest.raises(StageError, match=f"int8 has no effect: no layer of this model in {scheme} has a kernel for it"):
        compiled_qwen.compile_library(tmp_path / "out", ports, registered, **choice)


def test_layers_whose_rows_are_not_of_whole_groups_are_known_to_compute_in_floats(tmp_path):
    checkpoint = write_qwen(tmp_path / "checkpoint", layers=1, ff=80)
    ports = family_models.parse_and_register(tmp_path, checkpoint, "q4f16_1")
    bytes_, floats = takes_bytes(json.loads(ports["params"].read_text()))
    assert floats == ["transformer.h.0.mlp.c_proj.weight"]
    block = "transformer.h.0"
    names = [f"{block}.attn.c_attn", f"{block}.attn.c_proj", f"{block}.mlp.gate_up_proj", "lm_head"]
    assert bytes_ == [f"{name}.weight" for name in names]


def test_planning_works_without_any_compiler(monkeypatch):
    monkeypatch.setattr(toolchain, "cxx", lambda: None)
    monkeypatch.setattr(toolchain, "toolkit", lambda kind="auto": None)
    params = resolved(target="cuda")
    assert params.toolchain == "missing"
    assert Compile().tools(params)["cuda"] == "missing"
    assert Compile().tools(params)["c++"] == "missing"


def test_every_package_of_a_toolkit_is_in_the_key_and_the_metadata(monkeypatch):
    monkeypatch.setattr(toolchain, "toolkit", lambda kind="auto": Program("pypi", "/cu13", "13.0.88"))
    monkeypatch.setattr("stages.compile.dist_versions", lambda *names: dict.fromkeys(names, "1.0"))
    packages = ("nvidia-cuda-crt", "nvidia-cuda-nvcc", "nvidia-cuda-nvrtc", "nvidia-cuda-runtime")
    assert dict.fromkeys(packages, "1.0").items() <= Compile().tools(resolved(target="cuda")).items()
    assert not set(packages) & set(Compile().tools(resolved(target="llvm")))
    monkeypatch.setattr(toolchain, "toolkit", lambda kind="auto": Program("system", "/cu13", "13.0.88"))
    assert not set(packages) & set(Compile().tools(resolved(target="cuda")))


def test_a_missing_compiler_fails_with_what_to_install(tmp_path, graphs, monkeypatch):
    registered, ports = graphs("llvm")
    monkeypatch.setattr(toolchain, "cxx", lambda: None)
    with pytest.raises(StageError, match="apt-get install g"):
        compiled_qwen.compile_library(tmp_path, ports, registered, target="llvm")


def test_a_processor_unknown_to_llvm_is_refused(tmp_path, graphs):
    registered, ports = graphs("llvm")
    with pytest.raises(StageError, match=r"'x86-64-v9' is not one of .*x86-64-v4"):
        compiled_qwen.compile_library(tmp_path, ports, registered, target="llvm", mcpu="x86-64-v9")
    with pytest.raises(ValueError, match=r"knows no processor 'x86-64-v9' .*x86-64-v"):
        build_target(TARGETS["llvm"], "x86-64-v9", [], opt=3)


def test_a_missing_toolkit_fails_with_what_to_install(tmp_path, graphs, monkeypatch):
    registered, ports = graphs("cuda")
    monkeypatch.setattr(toolchain, "toolkit", lambda kind="auto": None)
    with pytest.raises(StageError, match=r"pip install -e '\.\[cuda\]'"):
        compiled_qwen.compile_library(tmp_path, ports, registered, target="cuda")


def test_a_failing_linker_is_quoted(tmp_path, graphs, monkeypatch):
    registered, ports = graphs("llvm")
    linker = tmp_path / "g++"
    linker.write_text('#!/bin/sh\necho "ld: out of luck, LIBRARY_PATH is ${LIBRARY_PATH-unset}" >&2\nexit 1\n')
    linker.chmod(0o755)
    monkeypatch.setattr(toolchain, "cxx", lambda: Program("system", str(linker), "0"))
    monkeypatch.setenv("LIBRARY_PATH", "/elsewhere")
    with pytest.raises(StageError, match="ld: out of luck, LIBRARY_PATH is unset"):
        compiled_qwen.compile_library(tmp_path / "out", ports, registered, target="llvm")


def test_graphs_of_different_builds_are_refused(tmp_path, graphs):
    registered, ports = graphs("llvm")
    compiled_qwen.build_graph(tmp_path / "other", registered, "llvm", "softmax", prefill_chunk=16, max_batch=2)
    mixed = {port: list(instances) for port, instances in ports.items()}
    for port, instances in mixed.items():
        instances[-1] = Instance({"function": "softmax"}, tmp_path / "other" / f"{port}.json")
    with pytest.raises(StageError, match="the graphs disagree on prefill_chunk: 16, 32"):
        compiled_qwen.compile_library(tmp_path / "a", mixed, registered, target="llvm")
    twice = {port: [*instances, instances[-1]] for port, instances in ports.items()}
    with pytest.raises(StageError, match="two graphs export softmax_with_temperature"):
        compiled_qwen.compile_library(tmp_path / "b", twice, registered, target="llvm")
    with pytest.raises(StageError, match="built for target llvm, the library for cuda"):
        compiled_qwen.compile_library(tmp_path / "c", ports, registered, target="cuda")


SCRIPT = """
import json, os, pathlib, sys
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
from tests.support import compiled_qwen
out, target, options = pathlib.Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
registered = compiled_qwen.register(out, "q4f16_1", target)
ports = compiled_qwen.build_graphs(out, registered, target, prefill_chunk=32, max_batch=2)
compiled_qwen.compile_library(out / "library", ports, registered, target=target, **options)
"""


def same_elsewhere(folder, target, options, files):
    """Build all anew on one processor, in another folder and environment; compare with the bytes of ``files``."""
    out = folder / "elsewhere" / "deeper"
    for name in ("home", "tmp"):
        (folder / name).mkdir()
    environment = {
        **os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT), "TVM_NUM_THREADS": "1", "LC_ALL": "tr_TR.UTF-8",
        "LANG": "tr_TR.UTF-8", "HOME": str(folder / "home"), "TMPDIR": str(folder / "tmp"), "TZ": "Asia/Kathmandu",
        "SOURCE_DATE_EPOCH": "1", "USER": "somebody",
    }  # fmt: skip
    command = [sys.executable, "-c", SCRIPT, str(out), target, json.dumps(options)]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=True)
    assert "arning" not in done.stderr
    for name, file in files.items():
        assert (out / name).read_bytes() == file.read_bytes(), name
    library = (out / "library" / "model.so").read_bytes()
    assert not [place for place in (str(folder), str(ROOT), sys.prefix) if place.encode() in library]


def built_files(ports, library):
    files = {f"{port.path.parent.name}/module.json": port.path for port in ports["module"]}
    return {**files, **{f"library/{name}": library / name for name in ("model.so", "metadata.json")}}


def test_two_processes_build_the_same_bytes(tmp_path, graphs, library):
    _, ports = graphs("llvm")
    same_elsewhere(tmp_path, "llvm", {}, built_files(ports, library.out))


def test_kernels_that_others_compile_make_the_same_library(tmp_path, graphs, library):
    """They see none of the inputs; what is left to compile here is what is not asked for."""
    registered, ports = graphs("llvm")
    memo = tmp_path / "memo"
    index = Index(memo / "index")
    store, entries = Store(memo, index), dict(library.memo.entries)
    for name in [name for name, entry in entries.items() if entry["kind"] == "kernel"][:10]:
        del entries[name]
    for name, entry in entries.items():  # not the folder as it is: other workers write there
        kept = shutil.copy(library.memo._store.path(entry["digest"]), tmp_path)
        store.adopt(kept, entry["digest"])
        index.set(name, entry)
    index.close()
    others = Elsewhere(Compile(), tmp_path / "others")
    together = compiled_qwen.compile_library(
        tmp_path / "together", ports, registered, target="llvm", memo=memo, elsewhere=others
    )
    assert [entry["kind"] for entry in others.made] == ["kernel"] * 10
    assert len(list((tmp_path / "others").iterdir())) == 2
    assert together.memo.counts["kernel"]["made"] == 10
    for name in ("model.so", "metadata.json"):
        assert (together.out / name).read_bytes() == (library.out / name).read_bytes()


@pytest.mark.slow
@pytest.mark.skipif(toolchain.toolkit() is None, reason="no CUDA toolkit on this machine")
def test_two_processes_build_the_same_device_code(tmp_path, graphs):
    registered, ports = graphs("cuda")
    options = {"archs": (80, 90)}
    here = compiled_qwen.compile_library(tmp_path / "here", ports, registered, target="cuda", **options)
    same_elsewhere(tmp_path, "cuda", options, built_files(ports, here.out))


def table(heading, columns):
    """Return the rows of the first table after ``heading`` in the interface page."""
    text = ABI.read_text("utf-8").split(f"## {heading}", 1)[1]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return [row for row in rows[2:] if len(row) == columns]


def test_the_interface_page_tells_the_signatures(graphs):
    _, ports = graphs("llvm")
    documents = [json.loads(instance.path.read_text()) for instance in ports["graph"]]
    found = {}
    for graph in documents:
        for name, signature in graph["functions"].items():
            inputs = [f"{argument}: {re.sub(r'tuple of .*', 'tuple', ty)}" for argument, ty in signature["inputs"]]
            found[name] = (", ".join(inputs), signature["output"])
    letters = {"C": "compute_dtype", "h": "hidden_size", "V": "vocab_size"}
    expected = {}
    for name, arguments, result in list(table("Functions", 3)):
        cells = [
            re.sub(r"\b[ChV]\b", lambda m: str(documents[0][letters[m.group()]]), cell) for cell in (arguments, result)
        ]
        expected[name] = tuple(cells)
    assert found == expected


def test_the_interface_page_tells_the_metadata(library):
    metadata = json.loads((library.out / "metadata.json").read_text())
    fields = dict(table("Metadata", 2))
    assert set(fields) == set(metadata)
    assert set(metadata["model"]) == set(fields["model"].split(", "))


def test_the_library_tells_what_the_metadata_says(library):
    metadata = json.loads((library.out / "metadata.json").read_text())
    runner_metadata = compiled_qwen.metadata_of(library.out / "model.so")
    assert set(metadata) - set(runner_metadata) == {"kernels", "device_code", "device_kernels"}
    assert all(metadata[name] == value for name, value in runner_metadata.items())
    assert set(library.views) == {"functions", "kernels", "memory"}


needs_cuda = pytest.mark.skipif(toolchain.toolkit() is None, reason="no CUDA toolkit on this machine")


@needs_cuda
@pytest.mark.parametrize(
    ("scheme", "dtype", "replayed"),
    [("q4f16_1", "float16", False), ("q4bf16_1", "bfloat16", True)],
)
@pytest.mark.slow
def test_a_cuda_library_holds_device_code_for_every_architecture(tmp_path, graphs, scheme, dtype, replayed):
    registered, ports = graphs("cuda", scheme)
    options = {"target": "cuda", "archs": (80, 90), "cuda_graph": replayed}
    context = compiled_qwen.compile_library(tmp_path, ports, registered, **options)
    expected = [FatbinEntry(80, "elf"), FatbinEntry(90, "elf"), FatbinEntry(90, "ptx")]
    assert fatbin.entries(context.out / "model.so") == expected
    metadata = json.loads((context.out / "metadata.json").read_text())
    assert [FatbinEntry(**entry) for entry in metadata["device_code"]] == expected
    assert any("NT_matmul" in kernel for kernel in metadata["kernels"])
    assert any(re.fullmatch("batch_prefill_paged_kv_[0-9a-f]{8}_kernel", kernel) for kernel in metadata["kernels"])
    assert set(metadata["device_kernels"]) == {"sm_80", "sm_90"}
    launched = [name for name in metadata["kernels"] if name.endswith("_kernel")]  # others compute sizes on the host
    assert len(launched) > 30
    for found in metadata["device_kernels"].values():
        assert sorted(found) == launched
        assert all(kernel["registers"] > 0 and kernel["code"] > 0 for kernel in found.values())
    assert context.views["device"].count("\n") == 2 + 2 * len(launched)
    assert (metadata["model"]["compute_dtype"], metadata["model"]["kv_dtype"]) == (dtype, dtype)
    library = (context.out / "model.so").read_bytes()
    assert b"__global__" not in library
    assert (b"vm.builtin.cuda_graph.run_or_capture" in library) == metadata["target"]["cuda_graph"] == replayed


KERNEL = (
    'extern "C" __global__ void __launch_bounds__(8) twice(float* x) {\n  x[threadIdx.x] = expf(x[threadIdx.x]);\n}\n'
)


@needs_cuda
def test_the_compiler_is_told_the_architectures_and_the_arithmetic(tmp_path, monkeypatch):
    from stages.targets.cuda import device_code

    toolkit = toolchain.toolkit()
    exact = device_code.compile_fatbin(KERNEL, toolkit, [80])
    assert exact == device_code.compile_fatbin(KERNEL, toolkit, [80])
    assert exact != device_code.compile_fatbin(KERNEL, toolkit, [80], fast_math=True)
    monkeypatch.setenv("NVCC_APPEND_FLAGS", "--use_fast_math")
    assert exact == device_code.compile_fatbin(KERNEL, toolkit, [80])
    (tmp_path / "k").write_bytes(exact)
    assert fatbin.missing(fatbin.entries(tmp_path / "k"), [80]) == []
    with pytest.raises(
        device_code.CudaError,
        match=r'NVRTC of .* failed:\nkernels.cu\(2\): error: identifier "undeclared" is undefined',
    ):
        device_code.compile_fatbin(KERNEL.replace("expf", "undeclared"), toolkit, [80])


HALVES = """
#include <mma.h>
#include <cuda_fp16.h>
#include <cuda_bf16.h>
extern "C" __global__ void halves(half* x, __nv_bfloat16* y) {
  nvcuda::wmma::fragment<nvcuda::wmma::accumulator, 16, 16, 16, float> sum;
  nvcuda::wmma::fragment<nvcuda::wmma::matrix_a, 16, 16, 16, half, nvcuda::wmma::row_major> a;
  nvcuda::wmma::fragment<nvcuda::wmma::matrix_b, 16, 16, 16, half, nvcuda::wmma::col_major> b;
  nvcuda::wmma::fill_fragment(sum, 0.0f);
  nvcuda::wmma::load_matrix_sync(a, x, 16);
  nvcuda::wmma::load_matrix_sync(b, x + 256, 16);
  nvcuda::wmma::mma_sync(sum, a, b, sum);
  x[threadIdx.x] = __float2half(sum.x[0]) * __hmax(x[threadIdx.x], x[0]);
  y[threadIdx.x] = __hadd(y[threadIdx.x], __hmin(y[0], y[1]));
}
"""
BYTES = """
#include <cuda_fp8.h>
extern "C" __global__ void bytes(__nv_fp8_e4m3* x, float* y) { y[threadIdx.x] = float(x[threadIdx.x]); }
"""


@needs_cuda
def test_a_generation_shares_its_ptx_where_that_is_the_same():
    from stages.targets.cuda import device_code, nvrtc

    assert device_code._generated(HALVES, [80, 86, 89, 90]) == {80: [80, 86, 89], 90: [90]}
    assert device_code._generated(HALVES, [86]) == {86: [86]}
    assert len(device_code._generated(BYTES, [80, 86, 89, 90])) == 4

    library, include = (toolchain.part(toolchain.toolkit(), name) for name in ("libnvrtc.so.13", "cuda_fp16.h"))

    def ptx(code, arch):
        text = nvrtc.compile_ptx(code, library, include.parent, [f"-arch=compute_{arch}"]).decode()
        assert f".target sm_{arch}" in text
        return re.sub(r"\.target sm_\d+|//.*", "", text)

    assert ptx(HALVES, 80) == ptx(HALVES, 86) == ptx(HALVES, 89)
    assert ptx(BYTES, 80) != ptx(BYTES, 89)


LOAD = """
from stages import profiles
profiles.compiler()
from stages.targets import toolchain
from stages.targets.cuda import device_code
device_code.load_cuda_side(toolchain.toolkit(), toolchain.cxx())
"""


@needs_cuda
def test_an_installed_driver_is_not_asked(tmp_path):
    """A driver from before the functions that TVM links against."""
    old = tmp_path / "libcuda.so.1"
    (tmp_path / "old.cc").write_text('extern "C" int cuInit(unsigned) { return 0; }\n')
    build = [toolchain.cxx().path, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", old, tmp_path / "old.cc"]
    subprocess.run(build, check=True)
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", LOAD], cwd=ROOT, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


def test_a_toolkit_without_its_parts_fails_once_with_what_it_lacks(tmp_path, graphs, monkeypatch):
    registered, ports = graphs("cuda")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ptxas").write_text("")
    monkeypatch.setattr(toolchain, "toolkit", lambda kind="auto": Program("system", str(tmp_path), "13.0.88"))
    monkeypatch.setattr("stages.codegen.build.lower", lambda *_, **__: pytest.fail("seconds before it is said"))
    with pytest.raises(StageError) as error:
        compiled_qwen.compile_library(tmp_path / "out", ports, registered, target="cuda")
    lacking = "libcudart.so.13, libnvrtc.so.13, fatbinary, cuda_fp16.h: pip install -e '.[cuda]'"
    assert str(error.value).startswith(f"the CUDA toolkit in {tmp_path} has no {lacking}")


@needs_cuda
def test_a_compiler_that_leaves_an_architecture_out_is_noticed(tmp_path, graphs, monkeypatch):
    """And nothing of what it made is kept for the next time."""
    from stages.targets.cuda import device_code

    registered, ports = graphs("cuda")
    whole = toolchain.toolkit()
    for folder, name in (("lib", "ptxas"), ("lib64", "libnvrtc.so.13"), ("include", "cuda_fp16.h")):
        (tmp_path / folder).symlink_to(toolchain.part(whole, name).parent)  # searched after bin, which has its own
    script = tmp_path / "bin" / "fatbinary"
    script.parent.mkdir()
    script.write_text(
        f'#!/bin/sh\nexec {toolchain.part(whole, "fatbinary")} $(echo "$*" | sed "s/--image3=[^ ]*90[^ ]*//g")\n'
    )
    script.chmod(0o755)
    lazy = whole._replace(path=str(tmp_path))
    with pytest.raises(device_code.CudaError, match="made code that lacks machine code for sm_90, PTX for compute_90"):
        device_code.compile_fatbin(KERNEL, lazy, [80, 90])
    monkeypatch.setattr(device_code, "compile_fatbin", functools.partial(_refuse, "lacks machine code for sm_90"))
    memo, options = tmp_path / "memo", {"target": "cuda", "archs": (80, 90)}
    with pytest.raises(StageError, match=r"kernel softmax_\w{8} of softmax_with_temperature: lacks machine code"):
        compiled_qwen.compile_library(tmp_path / "out", ports, registered, memo=memo, **options)


def _refuse(message, *_, **__):
    raise ValueError(message)


def test_every_function_of_the_model_is_asked_for(tmp_path):
    text = (ROOT / "pipeline.yaml").read_text().replace(", softmax]", "]")
    file = tmp_path / "pipeline.yaml"
    file.write_text(text)
    with pytest.raises(SpecError) as refused:
        Dag(load(file))
    expected = (
        "graph-build has no instance with function softmax, and compile reads all on port 'module': "
        "add softmax to its 'foreach'"
    )
    assert str(refused.value).partition(": ")[2] == expected
