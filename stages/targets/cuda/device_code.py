"""CUDA device code without a GPU: TVM's CUDA side without a driver, and fatbins for several architectures."""

from __future__ import annotations

import ctypes
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import tvm

from stages.targets import toolchain
from stages.targets.backends import DeviceCodeError
from stages.targets.cuda import fatbin, nvrtc
from stages.targets.cuda.nvrtc import NvrtcError
from stages.targets.toolchain import Program

LOADER = "ffi.Module.create.cuda"  # registered by TVM's CUDA side; without it code generation ships source, silently
# Every function that TVM's CUDA side takes from the driver; 100 is CUDA_ERROR_NO_DEVICE.
DRIVER_FUNCTIONS = (
    "cuDeviceGetName",
    "cuFuncSetAttribute",
    "cuGetErrorName",
    "cuGetErrorString",
    "cuLaunchKernelEx",
    "cuModuleGetFunction",
    "cuModuleLoadData",
    "cuModuleUnload",
    "cuTensorMapEncodeTiled",
)
# What compiling takes of a toolkit.
RUNTIME, COMPILER, HEADER = "libcudart.so.13", "libnvrtc.so.13", "cuda_fp16.h"
ASSEMBLER, PACKER = "ptxas", "fatbinary"
LOG_TAIL = 30


class CudaError(DeviceCodeError):
    """CUDA code could not be made; the message says what failed and what to do."""


def load_cuda_side(toolkit: Program, cxx: Program) -> None:
    """Load TVM's CUDA side with a stand-in for the driver, also where there is one.

    Compiling asks nothing of a driver, and an installed one may lack functions or answer for a GPU that is not the
    target. The stand-in only satisfies the linker: every call of it reports that there is no device.
    :class:`CudaError` says what is missing, of the toolkit all at once.
    """
    parts = {name: toolchain.part(toolkit, name) for name in (RUNTIME, COMPILER, ASSEMBLER, PACKER, HEADER)}
    if missing := [name for name, found in parts.items() if found is None]:
        raise CudaError(
            f"the CUDA toolkit in {toolkit.path} has no {', '.join(missing)}: pip install -e '.[cuda]', or install a "
            "whole CUDA 13 toolkit"
        )
    if tvm.get_global_func(LOADER, allow_missing=True):
        return
    try:
        _load_driver_stub(cxx)
        ctypes.CDLL(str(parts[RUNTIME]), ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(Path(tvm.__file__).parent / "lib" / "libtvm_runtime_cuda.so"), ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise CudaError(f"TVM's CUDA side cannot be loaded: {error}") from None
    if not tvm.get_global_func(LOADER, allow_missing=True):
        raise CudaError(f"TVM's CUDA side was loaded but registers no {LOADER}: this TVM was built without CUDA")


def _load_driver_stub(cxx: Program) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "stub.cc", Path(folder) / "libcuda.so.1"
        source.write_text("".join(f'extern "C" int {name}() {{ return 100; }}\n' for name in DRIVER_FUNCTIONS), "utf-8")
        command = [cxx.path, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(library), str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=toolchain.environment())
        if done.returncode:
            raise CudaError(f"{cxx.path} cannot build a shared library:\n{_tail(done.stderr)}")
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)


def check_archs(toolkit: Program, archs: Sequence[int]) -> None:
    """Raise :class:`CudaError` for architectures that the toolkit does not compile for."""
    try:
        known = nvrtc.architectures(_part(toolkit, COMPILER))
    except NvrtcError as error:
        raise CudaError(str(error)) from None
    if unknown := [arch for arch in archs if arch not in known]:
        raise CudaError(
            f"archs: CUDA {toolkit.version} does not compile for {', '.join(map(str, unknown))}; it knows "
            f"{', '.join(map(str, known))}"
        )


def compile_fatbin(
    code: str, toolkit: Program, archs: Sequence[int], *, opt: int = 3, fast_math: bool = False
) -> bytes:
    """Compile CUDA source to a fatbin: machine code for each of ``archs`` (80 is sm_80), PTX of the highest for GPUs to
    come. :class:`CudaError` ends with the last lines of the compiler's log.
    """
    compiler, include = _part(toolkit, COMPILER), _part(toolkit, HEADER).parent
    arithmetic = ["--use_fast_math"] if fast_math else []
    images = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for virtual, real in _generated(code, archs).items():
            options = [f"-arch=compute_{virtual}", "-std=c++17", "-w", *arithmetic]
            try:
                ptx = nvrtc.compile_ptx(code, compiler, include, options)
            except NvrtcError as error:
                raise CudaError(f"NVRTC of {toolkit.path} {toolkit.version} failed:\n{_tail(str(error))}") from None
            (folder / f"{virtual}.ptx").write_bytes(ptx)
            for arch in real:
                _run(
                    toolkit, folder, ASSEMBLER, f"-O{opt}", f"-arch=sm_{arch}", f"{virtual}.ptx", "-o", f"{arch}.cubin"
                )
                images.append(f"--image3=kind=elf,sm={arch},file={arch}.cubin")
        images.append(f"--image3=kind=ptx,sm={max(archs)},file={max(archs)}.ptx")
        _run(toolkit, folder, PACKER, "-64", "--create=kernels.fatbin", *images)
        made = folder / "kernels.fatbin"
        if lacking := fatbin.missing(fatbin.entries(made), archs):
            raise CudaError(f"{toolkit.path} {toolkit.version} made code that lacks {', '.join(lacking)}")
        return made.read_bytes()


def _run(toolkit: Program, folder: Path, name: str, *arguments: str) -> None:
    """Run a program of the toolkit inside ``folder``: no path of this machine gets into the device code."""
    done = subprocess.run(
        [str(_part(toolkit, name)), *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
        env=toolchain.environment(),
    )
    if done.returncode:
        raise CudaError(
            f"{name} of {toolkit.path} {toolkit.version} failed with exit code {done.returncode}:\n{_tail(done.stdout)}"
        )


def _part(toolkit: Program, name: str) -> Path:
    found = toolchain.part(toolkit, name)
    assert found, f"{toolkit.path} had {name} when TVM's CUDA side was loaded"
    return found


def _generated(code: str, archs: Sequence[int]) -> dict[int, list[int]]:
    """Return architecture to compile to PTX for -> what is made of that. What takes long, CUDA to PTX, is done once for
    a generation: the PTX of its members is the same, but for their conversions of floats of 8 bits and fewer.
    """
    highest, alike = max(archs), not re.search(r"cuda_fp[468]\.h", code)
    made: dict[int, list[int]] = {}
    for arch in sorted(archs):
        first = min(other for other in archs if other // 10 == arch // 10)
        made.setdefault(first if alike and arch != highest else arch, []).append(arch)
    return made


def _tail(log: str) -> str:
    return "\n".join(log.strip().splitlines()[-LOG_TAIL:])
