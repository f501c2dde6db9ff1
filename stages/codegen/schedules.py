"""Schedules of kernels, each kept by what it was made of: only what is new to the memo is scheduled."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tvm
from blake3 import blake3
from tvm import tirx

from stages.keeper import Finished, Keeper
from stages.lowering import schedule
from stages.lowering.compat import load_json
from stages.lowering.plain_names import SCHEDULED

KIND = "schedule"  # of what is kept


def scheduled(
    module: tvm.IRModule, rules: Sequence[str], how: Mapping[str, Any], keeper: Keeper, folder: Path
) -> tvm.IRModule:
    """Return ``module`` with its kernels scheduled by ``rules`` for the current target; ``how`` tells that target and
    the versions of tools as plain data. The rules are imported, which may take seconds, only for a new kernel.
    """
    found = {
        var.name_hint: kernel
        for var, kernel in module.functions_items()
        if isinstance(kernel, tirx.PrimFunc) and SCHEDULED not in (kernel.attrs or {})
    }
    how = {"rules": list(rules), **how}
    documents = {name: {"content": _digest(_saved(kernel)), **how} for name, kernel in found.items()}
    parts = {name: keeper.recall(KIND, document) for name, document in documents.items()}
    new = [name for name, part in parts.items() if part is None]
    saved = {name: part.path.read_bytes() for name, part in parts.items() if part}
    if new:
        made = schedule.schedule_kernels(rules)(tvm.IRModule({name: found[name] for name in new}))
        saved |= {name: _saved(made[name]) for name in new}
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            finished: list[Finished] = []
            for name in new:
                Path(scratch, name).write_bytes(saved[name])
                finished.append((documents[name], Path(scratch, name), _digest(saved[name]), {}))
            keeper.remember_all(KIND, finished)
    replaced = module.clone()
    for name, data in saved.items():
        replaced[name] = load_json(data.decode())
    return replaced


def _saved(kernel: tirx.PrimFunc) -> bytes:
    return bytes(tvm.ir.save_json(kernel).encode())


def _digest(data: bytes) -> str:
    return blake3(data).hexdigest()
