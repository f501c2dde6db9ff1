"""Names every kernel by its content, so that equal kernels of different models are compiled once, under one symbol."""

from __future__ import annotations

import re
from typing import Any

import tvm
import tvm_ffi
from blake3 import blake3
from tvm import tirx

from stages.lowering.merge import anonymous, with_kernels

CONTENT = "content"  # attribute of a named kernel: the digest of all that makes its code, but for the target
WRITTEN = "written"  # attribute of a kernel of ours: the digest of what was written, and the hash of its structure
SUFFIX = 8  # hexadecimal digits of the digest in the name


@tvm.transform.module_pass(opt_level=0, name="NameKernels")
def name_kernels(module: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
    """Rename ``matmul3`` to ``matmul_1a2b3c4d``: the numbers count what else is in the module, the digest does not."""
    kernels: dict[str, tuple[str, tirx.PrimFunc]] = {}
    taken: dict[str, str] = {}
    for var, function in module.functions_items():
        if isinstance(function, tirx.PrimFunc):
            kernel = anonymous(function)
            digest = _content(kernel)
            plain = re.sub(r"\d+", "", var.name_hint)
            short = f"{plain}_{digest[:SUFFIX]}"
            name = short if taken.setdefault(short, digest) == digest else f"{plain}_{digest}"
            kernels[var.name_hint] = name, kernel.with_attr(CONTENT, digest)
    return with_kernels(module, kernels)


def written(kernel: tirx.PrimFunc) -> tirx.PrimFunc:
    """Return ``kernel`` with the digest of itself, so that as long as it stays as it is nobody has to save it again,
    which takes twenty times as long as to see that it stayed.
    """
    return kernel.with_attr(WRITTEN, f"{_digest(tvm.ir.save_json(kernel))} {_structure(kernel)}")


def content(kernel: Any) -> str:
    """Return the digest of a kernel that has been named."""
    return str(kernel.attrs[CONTENT])


def _content(kernel: tirx.PrimFunc) -> str:
    if WRITTEN not in (kernel.attrs or {}):
        return _digest(tvm.ir.save_json(kernel))
    digest, structure = kernel.attrs[WRITTEN].split()
    bare = kernel.without_attr(WRITTEN)
    # Attributes are what passes add to a kernel that they leave alone.
    return _digest(digest, tvm.ir.save_json(bare.attrs if structure == _structure(kernel) else bare))


def _structure(kernel: tirx.PrimFunc) -> str:
    """Return the hash of all but attributes, the same in every process; equal kernels have equal ones."""
    return f"{tvm_ffi.structural_hash([kernel.params, kernel.ret_type, kernel.body], map_free_vars=True) % 2**64:016x}"


def _digest(*texts: str) -> str:
    return blake3("\n".join(texts).encode()).hexdigest()
