"""From a lowered module to a shared library on disk."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import tvm


class CodegenError(ValueError):
    """The library could not be linked; the message ends with the last lines of the linker's log."""


def build_library(
    module: tvm.IRModule, target: tvm.target.Target, library: Path, cxx: str, environment: Mapping[str, str]
) -> None:
    """Generate code for ``target`` and link it into ``library`` with the C++ compiler at ``cxx``, which sees no other
    variables than ``environment``.
    """

    def link(output: str, objects: Sequence[str]) -> None:
        command = [cxx, "-shared", "-fPIC", "-o", output, *objects]
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
            env=environment,
        )
        if done.returncode:
            log = done.stdout.strip().splitlines()
            raise CodegenError(f"{cxx} could not link the library:\n" + "\n".join(log[-30:]))

    # The device compiler asks for the current target, although the call names one.
    with target:
        executable = tvm.compile(module, target=target, relax_pipeline=None)
    with tempfile.TemporaryDirectory() as folder:
        executable.export_library(str(library), fcompile=link, workspace_dir=folder)
