"""Compiles a lowered module to a shared library, kernel by kernel; those that were compiled before are only linked."""

from __future__ import annotations

import functools
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import tvm
from tvm import relax as rx
from tvm import tirx
from tvm.relax.vm_build import VMExecutable

from stages.codegen import forked, objects
from stages.codegen.objects import Code
from stages.ir.compat import load_json
from stages.ir.content import content
from stages.lowering.rewriter import bound_values
from stages.memo import Memo, Part
from stages.problems import ProblemsError
from stages.targets.backends import DeviceCompiler

if TYPE_CHECKING:
    from stages.documents.files import JsonObject


KIND = "kernel"  # of what is kept
TOGETHER = 8  # kernels that another machine is asked for at a time


class KernelText(NamedTuple):
    """A kernel as another machine gets it: the functions that call it, the document it is kept under, TVM's JSON."""

    name: str
    callers: Sequence[str]
    document: JsonObject
    text: str


# Has each list compiled somewhere, and returns something once all are kept; nothing where that cannot be.
Spread: TypeAlias = "Callable[[Sequence[Sequence[KernelText]]], object]"


class CodegenError(ProblemsError):
    """A library could not be made: the kernels that failed, or the end of the linker's log."""


@dataclass(frozen=True)
class Compilers:
    """The compilers: LLVM for ``target``, and ``device`` for kernels of another device.

    ``document`` tells all of that as plain data. ``cxx`` links, and sees no other variables than ``environment``.
    """

    target: tvm.target.Target
    device: DeviceCompiler | None
    document: JsonObject
    cxx: str
    environment: Mapping[str, str]


@dataclass(frozen=True)
class Built:
    """A kernel in a library: which functions call it, its code, how long that took to compile and if it was now."""

    name: str
    callers: Sequence[str]
    code: Code
    seconds: float
    reused: bool


def build_library(
    lowered: tvm.IRModule, compilers: Compilers, memo: Memo, library: Path, spread: Spread | None = None
) -> list[Built]:
    """Write ``library``; return its kernels by name. :class:`CodegenError` names every kernel that failed.

    ``spread`` has lists of kernels compiled by other machines, each by :func:`compile_texts`.
    """
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        built = list(_kernels(lowered, compilers, memo, Path(scratch), spread))
        _link(lowered, built, compilers, Path(scratch), library)
    return built


def _kernels(
    lowered: tvm.IRModule, compilers: Compilers, memo: Memo, scratch: Path, spread: Spread | None
) -> Iterator[Built]:
    """Yield every kernel, by name, from what is kept or newly compiled and kept."""
    found = {var.name_hint: kernel for var, kernel in lowered.functions_items() if isinstance(kernel, tirx.PrimFunc)}
    callers = _callers(lowered)
    how = compilers.document
    documents = {name: {"name": name, "content": content(kernel), **how} for name, kernel in found.items()}
    parts = {name: memo.recall(KIND, document) for name, document in documents.items()}
    # The largest first, so that no long one is left over for the end.
    texts = {name: tvm.ir.save_json(found[name]) for name in found if parts[name] is None}
    missing = sorted(texts, key=lambda name: (-len(texts[name]), name))
    if spread and len(missing) > TOGETHER:
        count = -(-len(missing) // TOGETHER)  # lists, of which each has large kernels and small ones
        kernels = [KernelText(name, callers[name], documents[name], texts[name]) for name in missing]
        if spread([kernels[number::count] for number in range(count)]):
            parts |= {name: memo.recall(KIND, documents[name]) for name in missing}
    here = {name: (found[name], callers[name], documents[name]) for name in missing if parts[name] is None}
    parts |= _compile(here, compilers, memo, scratch)
    for name in sorted(found):
        part = parts[name]
        assert part is not None
        yield Built(name, callers[name], Code.read(part.path), part.facts["seconds"], name not in missing)


def compile_texts(kernels: Sequence[KernelText], compilers: Compilers, memo: Memo, folder: Path) -> None:
    """Compile kernels that are not kept, and keep them. :class:`CodegenError` names every one that failed."""
    missing = [kernel for kernel in kernels if memo.recall(KIND, kernel.document) is None]
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        found = {name: (load_json(text), callers, document) for name, callers, document, text in missing}
        _compile(found, compilers, memo, Path(scratch))


def _compile(
    kernels: Mapping[str, tuple[tirx.PrimFunc, Sequence[str], JsonObject]],
    compilers: Compilers,
    memo: Memo,
    scratch: Path,
) -> dict[str, Part]:
    """Compile kernels (name -> kernel, callers, document), in this order, side by side, and keep them."""
    names = list(kernels)
    jobs = [
        functools.partial(objects.compile_kernel, name, kernel, compilers.target, compilers.device, scratch / name)
        for name, (kernel, _, _) in kernels.items()
    ]
    parts, problems = dict[str, Part](), []
    for count, (number, seconds, problem) in enumerate(forked.run(jobs, scratch), start=1):
        name = names[number]
        _, callers, document = kernels[name]
        if problem:
            problems.append(f"kernel {name} of {', '.join(callers)}: {problem}")
        else:
            parts[name] = memo.remember(KIND, document, scratch / name, seconds=round(seconds, 3))
        memo.progress(count, len(names), "kernels", name)
    if problems:
        raise CodegenError(*sorted(problems))
    return parts


def _callers(lowered: tvm.IRModule) -> dict[str, list[str]]:
    """Return kernel -> the exported functions that call it or pass it on, sorted."""
    callers: dict[str, set[str]] = {}
    for var, function in lowered.functions_items():
        if isinstance(function, rx.Function):
            calls = [value for value in bound_values(function) if isinstance(value, rx.Call)]
            # A kernel takes tensors and numbers; what takes kernels is an operator or a function of the runtime.
            passed = [given for call in calls for given in ([call.op] if _is_kernel(call.op) else call.args[:])]
            for named in [
                *passed,
                *(field for whole in passed if isinstance(whole, rx.Tuple) for field in whole.fields),
            ]:
                if _is_kernel(named):
                    callers.setdefault(named.name_hint, set()).add(var.name_hint)
    return {name: sorted(found) for name, found in callers.items()}


def _is_kernel(value: Any) -> bool:
    return isinstance(value, tvm.ir.GlobalVar)


def _link(lowered: tvm.IRModule, built: Sequence[Built], compilers: Compilers, scratch: Path, library: Path) -> None:
    """Generate the bytecode of the functions, and link it with the kernels."""
    builder = rx.ExecBuilder()
    tvm.get_global_func("relax.VMCodeGen")(builder, lowered)
    host = compilers.target.host or compilers.target
    anchor = tvm.get_global_func("codegen.LLVMModuleCreate")(str(host), "kernels")
    files = []
    for kernel in built:
        files.append(str(scratch / f"{kernel.name}.o"))
        Path(files[-1]).write_bytes(kernel.code.object)
        if kernel.code.device:
            functions = load_json(kernel.code.launch.decode())
            assert compilers.device is not None
            create = tvm.get_global_func(compilers.device.loader)
            anchor.import_module(create(kernel.code.device, compilers.device.image_format, functions, {}))
    linked = tvm.get_global_func("relax.VMLink")(builder, compilers.target, anchor, [], {})

    def link(output: str, parts: Sequence[str]) -> None:
        command = [compilers.cxx, "-shared", "-fPIC", "-o", output, *parts]
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
            env=compilers.environment,
        )
        if done.returncode:
            log = done.stdout.strip().splitlines()
            raise CodegenError(f"{compilers.cxx} could not link the library:\n" + "\n".join(log[-30:]))

    VMExecutable(linked).export_library(str(library), addons=files, fcompile=link, workspace_dir=str(scratch))
