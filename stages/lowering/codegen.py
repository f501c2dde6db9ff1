"""From a lowered module to a shared library on disk."""

from __future__ import annotations

import tempfile
from pathlib import Path

import tvm


class CodegenError(ValueError):
    """The library could not be linked; the message ends with the last lines of the linker's log."""


def build_library(module: tvm.IRModule, target: tvm.target.Target, library: Path, cxx: str) -> None:
    """Generate code for ``target`` and link it with the C++ compiler at ``cxx`` into ``library``."""
    # The device compiler asks for the current target, although the call names one.
    with target:
        executable = tvm.compile(module, target=target, relax_pipeline=None)
    with tempfile.TemporaryDirectory() as folder:
        try:
            executable.export_library(str(library), workspace_dir=folder, cc=cxx)
        except RuntimeError as error:
            if "Compilation error" not in str(error):
                raise
            log = str(error).partition("Compilation error:")[2].strip().splitlines()
            raise CodegenError(f"{cxx} could not link the library:\n" + "\n".join(log[-30:])) from None
