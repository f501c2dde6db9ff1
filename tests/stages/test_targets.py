"""The host's processor as a literal, the look-up of compilers, and the reading of device code."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct

import pytest

from stagegraph.stage import StageError
from stages.compile import Compile
from stages.runtime.host import missing_features
from stages.targets import processor, toolchain
from stages.targets.cuda import fatbin
from stages.targets.cuda.fatbin import FatbinEntry
from stages.targets.table import TARGETS
from stages.targets.toolchain import Program

V2 = "cx16 popcnt lahf_lm pni sse4_1 sse4_2 ssse3"
V3 = f"{V2} avx avx2 bmi1 bmi2 f16c fma abm movbe xsave"
V4 = f"{V3} avx512bw avx512cd avx512dq avx512f avx512vl"


@pytest.mark.parametrize(
    ("flags", "literal"),
    [
        ("", "x86-64"),
        (V2, "x86-64-v2"),
        (V3, "x86-64-v3"),
        (f"{V3} avx_vnni", "x86-64-v3+avxvnni"),
        (V3.replace(" fma", ""), "x86-64-v2"),
        # A virtual machine that hides AVX-512 itself but not an extension of it.
        (f"{V3} avx512_vnni", "x86-64-v3"),
        (f"{V4} avx512_vnni gfni", "x86-64-v4+avx512vnni+gfni"),
    ],
)
def test_a_processor_is_its_highest_full_level_and_the_extras(flags, literal):
    assert processor.describe(frozenset(f"sse sse2 {flags}".split())) == literal


X86 = """\
processor\t: 0
vendor_id\t: {vendor}
cpu family\t: 25
model\t\t: {model}
model name\t: {name}

processor\t: 1
vendor_id\t: another
"""
ARM = "processor\t: 0\nBogoMIPS\t: 243.75\nCPU implementer\t: 0x41\nCPU architecture: 8\nCPU part\t: 0xd40\n"


@pytest.mark.parametrize(
    ("text", "maker"),
    [
        (X86.format(vendor="AuthenticAMD", model=1, name="A"), "AuthenticAMD 25 1"),
        (X86.format(vendor="AuthenticAMD", model=1, name="B, at 3 GHz"), "AuthenticAMD 25 1"),
        (X86.format(vendor="AuthenticAMD", model=17, name="A"), "AuthenticAMD 25 17"),
        (X86.format(vendor="GenuineIntel", model=1, name="A"), "GenuineIntel 25 1"),
        (ARM, "0x41 8 0xd40"),
        ("", "unknown"),
    ],
)
def test_who_made_a_processor_is_told_beside_its_instructions(tmp_path, text, maker):
    """Two of the same instructions: by the maker libraries choose how they add up."""
    (tmp_path / "cpuinfo").write_text(text)
    assert processor.maker(tmp_path / "cpuinfo") == maker
    assert processor.maker(tmp_path / "none") == "unknown"
    assert processor.exact_cpu().startswith(f"{processor.host_cpu()} of ")


def test_required_features_spell_out_the_levels():
    assert set(processor.required_features("x86-64-v4+avx512vnni")) >= {"sse2", "avx2", "avx512f", "avx512vnni"}
    assert "avx512f" not in processor.required_features("x86-64-v3")
    assert {"aes", "vaes"} <= set(processor.required_features("x86-64-v4+vaes"))


# What LLVM lists beside instructions that a loader could look for: its tuning, and what every x86-64 processor has.
EVERY_X86_64 = ["64bit", "cmov", "crc32", "cx8", "fxsr", "mmx", "nopl", "x87"]
TUNING = re.compile(r"64bit-mode|idivq-to-divl|macrofusion|vzeroupper|(allow|fast|false-deps|prefer|slow)-.*")


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the levels are those of x86-64")
@pytest.mark.parametrize("cpu", [*processor.LEVELS, *(f"x86-64-v4+{extra}" for extra in processor.EXTRAS)])
def test_required_features_are_all_that_llvm_may_use(cpu):
    import tvm
    from tvm.target.codegen import llvm_get_cpu_features

    mcpu, added = processor.parse(cpu)
    triple = "x86_64-unknown-linux-gnu"
    attributes = [f"+{feature}" for feature in added]
    target = tvm.target.Target({"kind": "llvm", "mtriple": triple, "mcpu": mcpu, "mattr": attributes})
    used = {str(feature) for feature in llvm_get_cpu_features(target)}
    instructions = {feature for feature in used if not TUNING.fullmatch(feature)} - {*EVERY_X86_64}
    assert instructions == set(processor.required_features(cpu))


def test_the_runtime_reads_the_kernels_flags_as_we_do():
    for cpu in ("x86-64-v4", *(f"x86-64-v4+{extra}" for extra in processor.EXTRAS)):
        features = processor.required_features(cpu)
        flags = frozenset(processor.FLAGS.get(feature, feature) for feature in features)
        assert missing_features(features, flags) == [], cpu
        for feature in features:
            assert missing_features(features, flags - {processor.FLAGS.get(feature, feature)}) == [feature]


def test_this_machine_has_what_its_literal_says():
    mcpu, added = processor.parse(processor.host_cpu())
    assert mcpu in {*processor.LEVELS, "generic"}
    assert not processor.problems(processor.host_cpu()), added


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the levels are those of x86-64")
@pytest.mark.parametrize(
    ("cpu", "says"),
    [
        ("znver4", "'znver4' is not one of x86-64, x86-64-v2, x86-64-v3, x86-64-v4; take the highest"),
        ("native", "'native' is not one of"),
        ("generic", "'generic' is not one of"),
        ("", "'' is not one of"),
        ("x86-64-v4+avx512vni", "x86-64-v4 cannot be given 'avx512vni'; what it can be given: amx-bf16"),
        # LLVM would silently add all of AVX-512 and what is below it.
        ("x86-64-v2+avx512vnni", "x86-64-v2 cannot be given 'avx512vnni'; what it can be given: nothing"),
    ],
)
def test_a_processor_whose_instructions_nobody_wrote_down_is_refused(cpu, says):
    (problem,) = processor.problems(cpu)
    assert says in problem


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with nothing on PATH; returns a function that installs a program which prints a text and counts."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("CXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("sys.path", [])
    monkeypatch.setattr(toolchain, "SYSTEM_NVCC", "/nonexistent/nvcc")

    def forget():
        toolchain.cxx.cache_clear()
        toolchain.toolkit.cache_clear()

    def install(name, text):
        program = folder / name
        program.write_text(f"#!/bin/sh\necho called >> {tmp_path}/calls\necho '{text}'\n")
        program.chmod(0o755)
        forget()
        return program

    forget()
    yield install
    forget()


def test_no_compiler_is_none(machine):
    assert toolchain.cxx() is None
    assert toolchain.toolkit() is None


def test_a_version_is_asked_once_and_again_when_the_file_changes(machine, tmp_path):
    path = machine("g++", "13.9.0")
    assert toolchain.cxx() == Program("system", str(path), "g++ 13.9.0")
    toolchain.cxx.cache_clear()
    assert toolchain.cxx().version == "g++ 13.9.0"
    assert (tmp_path / "calls").read_text().count("called") == 1
    machine("g++", "14.0.1 longer")
    assert toolchain.cxx().version == "g++ 14.0.1 longer"


@pytest.mark.parametrize("memory", ["[not json", "[]", "7", "[" * 100_000])
def test_a_damaged_memory_is_ignored(machine, tmp_path, memory):
    (tmp_path / "cache" / "stagegraph").mkdir(parents=True)
    (tmp_path / "cache" / "stagegraph" / "compilers.json").write_text(memory)
    machine("clang++", "19.1")
    assert toolchain.cxx().version == "clang++ 19.1"


def test_a_compiler_that_does_not_answer_is_asked_again(machine):
    path = machine("g++", "13.9.0")
    answering = path.read_text()
    path.write_text("#!/missing/sh\n")
    assert toolchain.cxx().version == "g++ unknown (No such file or directory)"
    path.write_text(answering)
    toolchain.cxx.cache_clear()
    assert toolchain.cxx().version == "g++ 13.9.0"


@pytest.mark.parametrize("value", ["g++ -O0", "/missing/g++", "nvcc"])
def test_a_cxx_that_is_no_compiler_is_refused(machine, monkeypatch, value):
    machine("g++", "13.9.0")
    machine("nvcc", "usage: nvcc")
    monkeypatch.setenv("CXX", value)
    with pytest.raises(toolchain.ToolchainError, match=re.escape(f"CXX is set to {value!r}, which")):
        toolchain.cxx()
    with pytest.raises(StageError, match="CXX is set to"):
        Compile().resolve(Compile.Params(target="llvm"))
    monkeypatch.setenv("CXX", "g++")
    assert toolchain.cxx().version == "g++ 13.9.0"


def test_compilers_see_no_variable_that_changes_what_they_make(monkeypatch):
    monkeypatch.setenv("TMPDIR", "/somewhere")
    for name in ("CPATH", "LIBRARY_PATH", "NVCC_APPEND_FLAGS", "NVCC_CCBIN", "LD_RUN_PATH"):
        monkeypatch.setenv(name, "x")
    assert toolchain.environment()["TMPDIR"] == "/somewhere"
    assert set(toolchain.environment()) <= {"LC_ALL", *toolchain.PASSED_ON}


def test_the_packaged_toolkit_comes_before_the_system_one(machine, tmp_path, monkeypatch):
    machine("nvcc", "Cuda compilation tools, release 12.4, V12.4.131")
    assert toolchain.toolkit() == Program("system", str(tmp_path), "12.4.131")
    site = tmp_path / "site"
    packaged = site / "nvidia" / "cu13" / "bin" / "nvcc"
    packaged.parent.mkdir(parents=True)
    packaged.write_text("")
    (site / "nvidia_cuda_nvcc-13.0.88.dist-info").mkdir()
    monkeypatch.setattr("sys.path", [str(site)])
    toolchain.toolkit.cache_clear()
    assert toolchain.toolkit() == Program("pypi", str(site / "nvidia" / "cu13"), "13.0.88")
    assert toolchain.part(toolchain.toolkit(), "nvcc") == packaged
    assert toolchain.part(toolchain.toolkit(), "ptxas") is None
    assert toolchain.toolkit("system").path == str(tmp_path)


def test_a_script_on_path_that_calls_nvcc_is_not_a_toolkit(machine, tmp_path, monkeypatch):
    machine("nvcc", "V13.0.88")
    real = tmp_path / "cuda-13.0" / "bin"
    real.mkdir(parents=True)
    shutil.copy(tmp_path / "bin" / "nvcc", real / "nvcc")
    (real / "ptxas").write_text("")
    monkeypatch.setattr(toolchain, "SYSTEM_NVCC", str(real / "nvcc"))
    assert toolchain.toolkit() == Program("system", str(real.parent), "13.0.88")


def entry(kind, arch, payload=b"code"):
    header = struct.pack("<HHIQ", kind, 0x101, 64, len(payload)).ljust(28, b"\0") + struct.pack("<I", arch)
    return header.ljust(64, b"\0") + payload


def fat(*entries):
    body = b"".join(entries)
    return fatbin.MAGIC + struct.pack("<HHQ", 1, 16, len(body)) + body


def test_device_code_is_found_inside_other_bytes(tmp_path):
    library = tmp_path / "x.so"
    noise = fatbin.MAGIC + b"\xff" * 40  # the magic as an ordinary constant
    library.write_bytes(
        b"\x7fELF" + noise + fat(entry(2, 80), entry(1, 90)) + b"tail" + fat(entry(2, 90)) + fatbin.MAGIC
    )
    assert fatbin.entries(library) == [FatbinEntry(80, "elf"), FatbinEntry(90, "elf"), FatbinEntry(90, "ptx")]


def test_missing_device_code_is_named(tmp_path):
    library = tmp_path / "x.so"
    library.write_bytes(fat(entry(2, 80), entry(1, 80)))
    found = fatbin.entries(library)
    assert fatbin.missing(found, [80]) == []
    assert fatbin.missing(found, [80, 90]) == ["machine code for sm_90", "PTX for compute_90"]
    library.write_bytes(b'extern "C" __global__ void source_only()')
    assert fatbin.missing(fatbin.entries(library), [80]) == ["machine code for sm_80", "PTX for compute_80"]


def test_rows_are_named_as_they_are_keyed():
    assert {name: row.name for name, row in TARGETS.items()} == {name: name for name in TARGETS}
    json.dumps({name: dict(row.limits) for name, row in TARGETS.items()})
