"""Names every kernel by its content, so that equal kernels of different models are compiled once, under one symbol."""

from __future__ import annotations

import re

import tvm
from tvm import tirx

from stages.ir.content import CONTENT, anonymous, content_digest
from stages.lowering.merge import with_kernels

SUFFIX = 8  # hexadecimal digits of the digest in the name
LONGEST = 80  # characters of the rest: fusion joins the names of all that it fuses


@tvm.transform.module_pass(opt_level=0, name="NameKernels")
def name_kernels(module: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
    """Rename ``matmul3`` to ``matmul_1a2b3c4d``: the numbers count what else is in the module, the digest does not."""
    kernels: dict[str, tuple[str, tirx.PrimFunc]] = {}
    taken: dict[str, str] = {}
    for var, function in module.functions_items():
        if isinstance(function, tirx.PrimFunc):
            kernel = anonymous(function)
            digest = content_digest(kernel)
            plain = re.sub(r"\d+", "", var.name_hint)[:LONGEST]
            short = f"{plain}_{digest[:SUFFIX]}"
            name = short if taken.setdefault(short, digest) == digest else f"{plain}_{digest}"
            kernels[var.name_hint] = name, kernel.with_attr(CONTENT, digest)
    return with_kernels(module, kernels)
