"""TVM in runtime-only mode: how it is imported, its CUDA side loaded, and its threads counted."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.runtime import host
from stages.runtime.errors import BundleError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stages.runtime.documents import Device

DEVICES = {  # target -> the kind of device that its kernels run on
    "llvm": "cpu",
    "cuda": "cuda",
}


@functools.cache
def tvm() -> Any:
    """Import TVM's runtime, without its compiler and without torch, and return the module.

    Where TVM is already imported it is used as it is. The number of threads is TVM_NUM_THREADS if that is set, else
    one per physical core: TVM's own default is half the hardware threads.
    """
    os.environ.setdefault("TVM_NUM_THREADS", str(host.physical_cores()))
    if "tvm" not in sys.modules:
        os.environ["TVM_USE_RUNTIME_LIB"] = "1"
        os.environ["TVM_FFI_DISABLE_TORCH_C_DLPACK"] = "1"  # or tvm_ffi builds an extension for torch
    with _absent("torch"):
        import tvm
        import tvm.runtime.vm
    return tvm


@contextmanager
def _absent(name: str) -> Iterator[None]:
    # tvm_ffi imports torch wherever it is installed: over a second, for conversions that nobody here asks for.
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]


def device(kind: str) -> Any:
    """Return TVM's device of ``kind`` ``"cpu"`` or ``"cuda"``; :class:`BundleError` if it cannot be used here."""
    if kind == "cpu":
        return tvm().cpu()
    _load_cuda_runtime()
    found = tvm().cuda(0)
    if not found.exist:
        raise BundleError("TVM finds no CUDA device: look at nvidia-smi, or use the llvm bundle")
    return found


def device_name(kind: str) -> Device:
    """Return what a result says of the device that it was found on."""
    if kind == "cpu":
        return {"kind": "cpu", "name": host.cpu_name()}
    return {"kind": "cuda", "name": str(device("cuda").device_name), "driver": host.nvidia_driver()}


def capability(found: Any) -> int:
    """Return the compute capability of a CUDA device: 90 for 9.0."""
    major, minor = str(found.compute_version).split(".")
    return 10 * int(major) + int(minor)


@functools.cache
def _load_cuda_runtime() -> None:
    """Load libtvm_runtime_cuda.so, which runtime-only mode leaves out; without it no CUDA library can be opened."""
    if tvm().get_global_func("ffi.Module.create.cuda", allow_missing=True):
        return
    try:
        ctypes.CDLL(_cudart(), ctypes.RTLD_GLOBAL)
        libraries = Path(tvm().base._LOADED_LIBS["tvm_runtime"]._name).parent  # noqa: SLF001 - it names no public path
        ctypes.CDLL(str(libraries / "libtvm_runtime_cuda.so"), ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise BundleError(
            f"TVM's CUDA runtime cannot be loaded ({error}): it needs the NVIDIA driver and libcudart.so.13; "
            "pip install 'nvidia-cuda-runtime==13.0.*'"
        ) from None


def _cudart() -> str:
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations or ()) if spec else ():
        for path in sorted(Path(root).glob("*/lib/libcudart.so.13")):
            return str(path)
    return "libcudart.so.13"


def array(items: list[Any]) -> Any:
    """Return TVM's array of ``items``: converted once, where a list would be at every call."""
    tvm()
    import tvm_ffi

    return tvm_ffi.Array(items)


def threads() -> int:
    """Return the number of threads that TVM's kernels run on."""
    return int(tvm().get_global_func("runtime.NumThreads")())
