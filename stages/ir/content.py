"""Digests of kernels by their content, which name them and their compiled code."""

from __future__ import annotations

from typing import Any

import tvm
import tvm_ffi
from blake3 import blake3
from tvm import tirx

CONTENT = "content"  # attribute of a named kernel: the digest of all that makes its code, but for the target
WRITTEN = "written"  # attribute of a kernel of ours: the digest of what was written, and the hash of its structure


def anonymous(kernel: tirx.PrimFunc) -> tirx.PrimFunc:
    """Return ``kernel`` without the name it has in a module."""
    return kernel.without_attr("global_symbol") if kernel.attrs and "global_symbol" in kernel.attrs else kernel


def written(kernel: tirx.PrimFunc) -> tirx.PrimFunc:
    """Return ``kernel`` with its content digest cached in an attribute.

    Serialising a kernel to digest it takes twenty times as long as checking that its structure has not changed.
    """
    return kernel.with_attr(WRITTEN, f"{_digest(tvm.ir.save_json(kernel))} {_structure(kernel)}")


def content(kernel: Any) -> str:
    """Return the digest of a kernel that has been named."""
    return str(kernel.attrs[CONTENT])


def content_digest(kernel: tirx.PrimFunc) -> str:
    """Return the digest of all that makes the code of a kernel without a name, but for the target."""
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
