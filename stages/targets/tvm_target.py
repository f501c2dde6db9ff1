"""TVM's target objects from our rows. The only module of this room that imports tvm."""

from __future__ import annotations

import difflib
import platform
from collections.abc import Mapping, Sequence

import tvm
from tvm.target.codegen import llvm_get_cpu_archlist

from stages.targets.table import Target


def host_triple(machine: str = "") -> str:
    """Return the LLVM triple of Linux on ``machine`` (this machine's processor type where empty)."""
    return f"{machine or platform.machine()}-unknown-linux-gnu"


def export_target(row: Target) -> tvm.target.Target:
    """Return the target that graphs are exported for: it decides which kernels, and knows of no particular machine."""
    if row.device == "cpu":
        return tvm.target.Target(row.kind)
    return tvm.target.Target({"kind": row.kind, **row.export_attributes, **row.limits, "host": "llvm"})


def build_target(
    row: Target, mcpu: str, features: Sequence[str], *, opt: int, attributes: Mapping[str, str] | None = None
) -> tvm.target.Target:
    """Return the target that code is generated for.

    ``mcpu`` plus ``features`` (LLVM's names) are the processor that runs the host code, ``opt`` LLVM's level (0 to 3),
    ``attributes`` what a device's backend says of it. :class:`ValueError` for a processor that LLVM does not know: it
    would warn and take the plainest.
    """
    known = [str(name) for name in llvm_get_cpu_archlist(tvm.target.Target({"kind": "llvm", "mtriple": host_triple()}))]
    if mcpu not in known:
        close = ", ".join(difflib.get_close_matches(mcpu, known, cutoff=0.4)) or ", ".join(known)
        raise ValueError(f"mcpu: LLVM knows no processor {mcpu!r} on {host_triple()}; near: {close}")
    added = [f"+{feature}" for feature in features]
    host = {"kind": "llvm", "mtriple": host_triple(), "mcpu": mcpu, "mattr": added, "opt-level": opt}
    if row.device == "cpu":
        return tvm.target.Target(host)
    return tvm.target.Target({"kind": row.kind, **(attributes or {}), **row.limits, "host": host})
