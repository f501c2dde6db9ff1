"""Prepares a worker for stages of the compiler profile, so that tvm is imported in the right way."""

from __future__ import annotations

import importlib
import os
import sys


def compiler() -> None:
    """Import TVM's compiler, without torch, and take the cost out of its slowest import."""
    # tvm_ffi imports torch wherever it is installed, to convert tensors that we never have: 2 of 2.5 seconds, 150 MB,
    # and on the first time the build of an extension.
    os.environ["TVM_FFI_DISABLE_TORCH_C_DLPACK"] = "1"
    os.environ.pop("TVM_USE_RUNTIME_LIB", None)  # would leave the compiler out
    absent = "torch" not in sys.modules
    if absent:
        sys.modules["torch"] = None  # type: ignore[assignment]  # what makes `import torch` raise ImportError
    try:
        importlib.import_module("tvm")
    finally:
        if absent:
            del sys.modules["torch"]

    from stages.ir import compat

    compat.cache_module_lookups()
