"""Workarounds for undocumented behaviour of the pinned TVM; no other module has any."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any


def cache_module_lookups() -> None:
    """Make ``inspect.getmodule`` remember its answer per source file.

    TVMScript asks for it at every parsed function, and the standard answer walks all of sys.modules: TVM's tensor-core
    intrinsics take two minutes to parse without this, four seconds with it. Idempotent.
    """
    original = inspect.getmodule
    if getattr(original, "remembers", False):
        return
    known: dict[str, ModuleType | None] = {}

    @functools.wraps(original)
    def getmodule(obj: Any, _filename: str | None = None) -> ModuleType | None:
        if not (inspect.isframe(obj) or inspect.istraceback(obj) or inspect.iscode(obj)):
            return original(obj, _filename)
        file = str(_filename or getattr(getattr(obj, "f_code", obj), "co_filename", ""))
        if file not in known:
            known[file] = original(obj, _filename)
        return known[file]

    getmodule.remembers = True  # type: ignore[attr-defined]
    inspect.getmodule = getmodule  # type: ignore[assignment]


def load_json(text: str) -> Any:
    """Load JSON that the same version of TVM has saved.

    TVM's own function first rewrites what older ones have saved, in Python: three quarters of the time it takes.
    """
    from tvm_ffi.serialization import from_json_graph_str

    return from_json_graph_str(text)


def global_var(name: str, function: Any) -> Any:
    """Return a variable that stands for ``function``, a kernel or not, in a module.

    A block builder gives the variable its type too, and hashes all functions of its module to find an equal one.
    """
    import tvm

    var = tvm.ir.GlobalVar(name)
    tvm.get_global_func("relax.UpdateType")(var, function.ty)
    return var


@contextmanager
def exporting() -> Iterator[None]:
    """Let TVM export a module without looking whether it is well-formed: it drops the answer, and takes a time that is
    quadratic in the number of packed parameters for it.
    """
    from tvm.relax import analysis

    check = analysis.well_formed
    analysis.well_formed = lambda _module: True
    try:
        yield
    finally:
        analysis.well_formed = check
