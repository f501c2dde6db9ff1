"""Names every kernel by its content, so that equal kernels of different models are compiled once, under one symbol."""

from __future__ import annotations

import re
from typing import Any

import tvm
from blake3 import blake3
from tvm import tirx

from stages.lowering.merge import merge

CONTENT = "content"  # attribute of a named kernel: the digest of all that makes its code, but for the target
SUFFIX = 8  # hexadecimal digits of the digest in the name


@tvm.transform.module_pass(opt_level=0, name="NameKernels")
def name_kernels(module: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
    """Rename ``matmul3`` to ``matmul_1a2b3c4d``: the numbers count what else is in the module, the digest does not."""
    return merge([module], _named)


def _named(hint: str, kernel: tirx.PrimFunc) -> tuple[str, tirx.PrimFunc]:
    digest = blake3(tvm.ir.save_json(kernel).encode()).hexdigest()
    plain = re.sub(r"\d+", "", hint)
    return f"{plain}_{digest[:SUFFIX]}", kernel.with_attr(CONTENT, digest)


def content(kernel: Any) -> str:
    """Return the digest of a kernel that has been named."""
    return str(kernel.attrs[CONTENT])
