"""Finds the compilers of a build, g++ and a CUDA toolkit's, and their versions, without running them while planning.

A version is asked of the program once and remembered under the user's cache directory for as long as the file is the
same by size and time; everything here works, slower, where that directory cannot be written.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

CXX_NAMES = ("g++", "clang++", "c++")
# All that a compiler may see of our environment: its own variables (NVCC_APPEND_FLAGS, CPATH, LIBRARY_PATH, ...) change
# what it makes without a trace in any version.
PASSED_ON = ("HOME", "LD_LIBRARY_PATH", "PATH", "TEMP", "TMP", "TMPDIR")
# The packages of the packaged toolkit: headers, assembler, runtime, compiler. Each has a version of its own.
CUDA_PACKAGES = ("nvidia-cuda-crt", "nvidia-cuda-nvcc", "nvidia-cuda-nvrtc", "nvidia-cuda-runtime")
FOLDERS = ("bin", "lib64", "lib", "targets/x86_64-linux/lib", "include", "targets/x86_64-linux/include")  # of a toolkit
UNKNOWN = "unknown"
SYSTEM_NVCC = "/usr/local/cuda/bin/nvcc"  # where the toolkit installs itself, often not on PATH
INSTALL_CXX = "no C++ compiler found to link the library: install g++ (apt-get install g++) or set CXX"
INSTALL_CUDA = "no CUDA toolkit found: pip install -e '.[cuda]', or install a CUDA 13 toolkit and put its nvcc on PATH"


class ToolchainError(ValueError):
    """A compiler that was asked for cannot be used; the message says what to set instead."""


class Program(NamedTuple):
    """A compiler or a toolkit's folder; ``kind`` says where it comes from: ``system``, or ``pypi`` for a package."""

    kind: str
    path: str
    version: str


def environment() -> dict[str, str]:
    """Return the environment to run a compiler in: the same command makes the same code whoever's shell it is."""
    return {"LC_ALL": "C", **{name: os.environ[name] for name in PASSED_ON if name in os.environ}}


@functools.cache
def cxx() -> Program | None:
    """Return the C++ compiler: CXX if set, else the first of the usual names on PATH; None if there is none.

    :class:`ToolchainError` if CXX is set to anything but a compiler.
    """
    chosen = os.environ.get("CXX", "")
    for name in [chosen] if chosen else CXX_NAMES:
        if found := _which(name):
            version = _remembered(found, ["-dumpfullversion", "-dumpversion"])
            if chosen and not version[:1].isdigit():
                raise ToolchainError(f"CXX is set to {chosen!r}, which does not tell the version of a C++ compiler")
            return Program("system", found, f"{Path(found).name} {version}")
    if chosen:
        raise ToolchainError(
            f"CXX is set to {chosen!r}, which is no executable file, here or on PATH: set it to the name or path of a "
            "C++ compiler, without options, or unset it"
        )
    return None


@functools.cache
def toolkit(kind: str = "auto") -> Program | None:
    """Return the CUDA toolkit of ``kind`` ``pypi`` or ``system``, for ``auto`` the package's before the system's; else
    None. Its version is that of its nvcc.
    """
    finders = {"pypi": _packaged_toolkit, "system": _system_toolkit}
    for name, find in finders.items():
        if kind in {name, "auto"} and (found := find()):
            return found
    return None


def part(of: Program, name: str) -> Path | None:
    """Return the program, library or header ``name`` of a toolkit, or None."""
    found = (Path(of.path) / folder / name for folder in FOLDERS)
    return next((file for file in found if file.is_file()), None)


def _packaged_toolkit() -> Program | None:
    for entry in sys.path:
        root = Path(entry) / "nvidia" / "cu13"
        if entry and (root / "bin" / "nvcc").is_file():
            infos = sorted(Path(entry).glob("nvidia_cuda_nvcc-*.dist-info"))
            named = infos[0].name.removesuffix(".dist-info").partition("-")[2] if infos else ""
            return Program("pypi", str(root), named or _nvcc_version(str(root / "bin" / "nvcc")))
    return None


def _system_toolkit() -> Program | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [str(Path(home) / "bin" / "nvcc")] if home else []
    found = [path for path in map(_which, (*candidates, "nvcc", SYSTEM_NVCC)) if path]
    roots = [(path, Path(path).resolve().parent.parent) for path in found]
    # What is on PATH may be a script beside no toolkit, which calls the nvcc of one.
    for path, root in [pair for pair in roots if (pair[1] / "bin" / "ptxas").is_file()] or roots:
        return Program("system", str(root), _nvcc_version(path))
    return None


def _nvcc_version(path: str) -> str:
    text = _remembered(path, ["--version"])
    found = re.search(r"V(\d+(?:\.\d+)+)", text)
    return found.group(1) if found else text


def _remembered(path: str, arguments: list[str]) -> str:
    """Return what the program prints for ``arguments``, from memory if its file is the one asked before."""
    stat = Path(path).stat()
    key = f"{Path(path).resolve()} {stat.st_size} {stat.st_mtime_ns} {' '.join(arguments)}"
    memory = _memory_file()
    known: dict[str, str] = {}
    with contextlib.suppress(OSError, ValueError, RecursionError):
        remembered = json.loads(memory.read_text("utf-8"))
        known = remembered if isinstance(remembered, dict) else {}
    if not isinstance(known.get(key), str):
        known[key] = _ask(path, arguments)
        if known[key].startswith(UNKNOWN):
            return known[key]  # it may answer next time
        with contextlib.suppress(OSError):
            memory.parent.mkdir(parents=True, exist_ok=True)
            temporary = memory.with_suffix(f".{os.getpid()}")
            temporary.write_text(json.dumps(known), "utf-8")
            temporary.replace(memory)
    return known[key]


def _which(name: str) -> str:
    """Return the path of an executable, or "". shutil.which would cost a planner more to import than all this."""
    folders = [""] if "/" in name else os.get_exec_path()
    for folder in folders if name else []:
        path = os.path.join(folder, name)  # noqa: PTH118 - nor is pathlib free, for tens of folders
        if os.access(path, os.X_OK) and not os.path.isdir(path):  # noqa: PTH112
            return path
    return ""


def _ask(path: str, arguments: list[str]) -> str:
    import subprocess

    try:
        done = subprocess.run([path, *arguments], capture_output=True, text=True, check=False, env=environment())
    except OSError as error:
        return f"{UNKNOWN} ({error.strerror})"
    return done.stdout.strip()


def _memory_file() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "stagegraph" / "compilers.json"
