"""Memoises the schedules of kernels by kernel and rules, so that only new kernels are scheduled."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import tvm
from blake3 import blake3
from tvm import tirx

from stages.ir.compat import load_json
from stages.ir.text import SCHEDULED
from stages.lowering.schedules import rules
from stages.memo import Memo, NewPart

if TYPE_CHECKING:
    from stages.documents.files import JsonObject


KIND = "schedule"  # of what is kept


def scheduled(module: tvm.IRModule, names: Sequence[str], how: JsonObject, memo: Memo, folder: Path) -> tvm.IRModule:
    """Return ``module`` with its kernels scheduled by the rules ``names`` for the current target.

    ``how`` tells that target and the versions of tools as plain data. The rules are imported, which may take seconds,
    only for a new kernel.
    """
    found = {
        var.name_hint: kernel
        for var, kernel in module.functions_items()
        if isinstance(kernel, tirx.PrimFunc) and SCHEDULED not in (kernel.attrs or {})
    }
    how = {"rules": list(names), **how}
    documents = {name: {"content": _digest(_saved(kernel)), **how} for name, kernel in found.items()}
    parts = {name: memo.recall(KIND, document) for name, document in documents.items()}
    new = [name for name, part in parts.items() if part is None]
    saved = {name: part.path.read_bytes() for name, part in parts.items() if part}
    if new:
        made = rules.schedule_kernels(names)(tvm.IRModule({name: found[name] for name in new}))
        saved |= {name: _saved(made[name]) for name in new}
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            finished: list[NewPart] = []
            for number, name in enumerate(new):
                file = Path(scratch, str(number))  # names of fused kernels may be longer than those of files
                file.write_bytes(saved[name])
                finished.append((documents[name], file, _digest(saved[name]), {}))
            memo.remember_all(KIND, finished)
    replaced = module.clone()
    for name, data in saved.items():
        replaced[name] = load_json(data.decode())
    return replaced


def _saved(kernel: tirx.PrimFunc) -> bytes:
    return bytes(tvm.ir.save_json(kernel).encode())


def _digest(data: bytes) -> str:
    return blake3(data).hexdigest()
