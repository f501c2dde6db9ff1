"""The figures of device code, read from machine code, against what the CUDA assembler prints of the same kernels."""

from __future__ import annotations

import gzip
import re
import subprocess
from pathlib import Path

import pytest

from stages.codegen import views
from stages.targets import toolchain
from stages.targets.cuda import cubin, fatbin

DATA = Path(__file__).parents[1] / "data" / "cuda"
# One kernel in the log of `ptxas -v`; only up to sm_89 does it tell the constants.
PRINTED = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<arch>\d+)'\n.*\n +(?P<stack>\d+) bytes stack frame, "
    r"(?P<spill_stores>\d+) bytes spill stores, (?P<spill_loads>\d+) bytes spill loads\n"
    r".*Used (?P<registers>\d+) registers[^\n]*?(?:, (?P<shared>\d+) bytes smem)?"
    r"(?:, (?P<constant>\d+) bytes cmem.*)?\n"
)


def printed(log):
    """Return architecture -> kernel -> figure -> value."""
    found = {}
    for match in PRINTED.finditer(log):
        figures = {name: int(value or 0) for name, value in match.groupdict().items() if name != "name"}
        arch = figures.pop("arch")
        if arch >= 90:
            del figures["constant"]
        found.setdefault(arch, {})[match["name"]] = figures
    return found


def assert_equal_figures(kernels, log):
    expected = printed(log)
    assert {arch: set(found) for arch, found in kernels.items()} == {a: set(found) for a, found in expected.items()}
    for arch, found in expected.items():
        for name, figures in found.items():
            assert {figure: getattr(kernels[arch][name], figure) for figure in figures} == figures, (arch, name)


@pytest.fixture
def recorded(tmp_path):
    (tmp_path / "library").write_bytes(b"noise" + gzip.decompress((DATA / "kernels.fatbin.gz").read_bytes()) + b"tail")
    return tmp_path / "library"


def test_the_figures_are_those_that_the_assembler_printed(recorded):
    kernels = fatbin.kernels(recorded)
    assert_equal_figures(kernels, (DATA / "ptxas.log").read_text("utf-8"))
    assert {name for name, kernel in kernels[80].items() if kernel.spills} == {"spill"}
    assert {name for name, kernel in kernels[90].items() if kernel.matrix} == {"matrix"}
    assert kernels[80]["stack"].document() == {"registers": 30, "stack": 256, "constant": 368, "code": 3072}


def test_the_table_begins_with_what_spills(recorded):
    figures = {
        f"sm_{arch}": {name: kernel.document() for name, kernel in found.items()}
        for arch, found in fatbin.kernels(recorded).items()
    }
    lines = views.device(figures).splitlines()
    assert lines[0].split(" | ")[2:8] == ["registers", "shared", "stack", "spill stores", "spill loads", "matrix"]
    assert lines[2] == "| spill | sm_80 | 32 | 0 | 192 | 288 | 316 | 0 | 364 | 5,504 | SPILLS |"
    assert [line.endswith("SPILLS |") for line in lines] == [False, False, True, True] + [False] * 6
    assert len({line.count("|") for line in lines}) == 1
    metadata = {"kernels": ["a"] * 4, "device_code": [{"kind": "ptx", "arch": 90}], "device_kernels": figures}
    assert views.summary(metadata, 10**6) == "1.00 MB, 4 kernels, 1 spill, ptx 90"


def test_machine_code_that_is_cut_compressed_or_unknown_is_refused(recorded, tmp_path):
    whole = next(content for _, content in fatbin.machine_code(recorded))
    for size in range(0, len(whole), 97):
        with pytest.raises(cubin.CubinError):
            cubin.kernels(whole[:size])
    with pytest.raises(cubin.CubinError, match="not a 64-bit ELF file for CUDA"):
        cubin.kernels(b"\x28\xb5\x2f\xfd".ljust(len(whole), b"\0"))
    note = next(iter(re.finditer(rb"\x04\x55(..)\x01\0\0\0", whole, re.DOTALL)))
    with pytest.raises(cubin.CubinError, match="kernel spill has an annotation of kind 9"):
        cubin.kernels(whole[: note.end() - 4] + b"\x09" + whole[note.end() - 3 :])
    library = tmp_path / "other"
    library.write_bytes(b"no device code")
    assert fatbin.kernels(library) == {}


@pytest.mark.skipif(toolchain.toolkit() is None, reason="no CUDA toolkit on this machine")
def test_the_compiler_of_this_machine_writes_machine_code_as_recorded(tmp_path):
    from stages.targets.cuda import backend, device_code, nvrtc

    toolkit, archs, said = toolchain.toolkit(), (75, 86, 120), ""
    source = (DATA / "kernels.cu").read_text("utf-8")
    ptxas, library, header = (toolchain.part(toolkit, name) for name in ("ptxas", "libnvrtc.so.13", "mma.h"))
    assert set(backend.ARCHS) <= set(nvrtc.architectures(library))
    with pytest.raises(device_code.CudaError, match="does not compile for 9999; it knows 75, "):
        device_code.check_archs(toolkit, (80, 9999))
    made = tmp_path / "made"
    made.write_bytes(device_code.compile_fatbin(source, toolkit, archs))
    for arch in archs:
        options = [f"-arch=compute_{arch}", "-std=c++17", "-w"]
        (tmp_path / "k.ptx").write_bytes(nvrtc.compile_ptx(source, library, header.parent, options))
        command = [ptxas, "-v", f"-arch=sm_{arch}", tmp_path / "k.ptx", "-o", tmp_path / "k.cubin"]
        said += subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert_equal_figures(fatbin.kernels(made), said)
