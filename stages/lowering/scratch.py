"""Measures the scratch memory of kernels: intermediate buffers that no schedule has fused away."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import tvm
from tvm import relax as rx
from tvm import s_tir, tirx

# What moves every buffer of a kernel to the innermost loop around all its uses, and cuts it down to what is used there.
_PLACED = tvm.transform.Sequential(
    [
        s_tir.transform.LowerInitBlock(),
        s_tir.transform.PlanAndUpdateBufferAllocationLocation(),
        s_tir.transform.ConvertBlocksToOpaque(),
        s_tir.transform.CompactBufferAllocation(),
    ]
)


def scratch_of(module: tvm.IRModule) -> Callable[[rx.Call, Callable[[Any], int]], int]:
    """Return what tells the bytes that a called kernel of ``module``, which is scheduled, allocates outside its loops.

    It takes the call and what evaluates a dimension there. What is allocated inside a loop is a tile for each thread.
    """

    @functools.cache
    def buffers(var: tvm.ir.GlobalVar) -> list[tirx.Buffer]:
        kernel = module[var]
        return _buffers(kernel) if isinstance(kernel, tirx.PrimFunc) else []

    def scratch(call: rx.Call, size: Callable[[Any], int]) -> int:
        found = buffers(call.op)
        dims = _dims(module[call.op], call, size) if found else {}
        return sum(_bytes_of(buffer, dims) for buffer in found)

    return scratch


def _buffers(kernel: tirx.PrimFunc) -> list[tirx.Buffer]:
    if not _outermost(kernel):
        return []  # buffers move inwards only
    placed = _PLACED(tvm.IRModule({"kernel": kernel}))["kernel"]
    return _outermost(placed)


def _outermost(kernel: tirx.PrimFunc) -> list[tirx.Buffer]:
    """Return the buffers allocated outside of all loops, but for registers and the shared memory of a block."""
    body = kernel.body
    allocated = body.block.alloc_buffers if isinstance(body, s_tir.SBlockRealize) else []
    return [buffer for buffer in allocated if buffer.scope() == "global"]


def _dims(kernel: tirx.PrimFunc, call: rx.Call, size: Callable[[Any], int]) -> Mapping[tirx.Var, int]:
    """Return what the symbolic dimensions of ``kernel`` are where it is called; those that are only multiples of
    others in its tensors are arguments themselves.
    """
    dims: dict[tirx.Var, int] = {}
    for param, argument in zip(kernel.params, call.args, strict=False):
        if isinstance(argument.ty, rx.TensorType):
            pairs = zip(param.shape, argument.ty.shape.values, strict=True)
            dims |= {dim: size(given) for dim, given in pairs if isinstance(dim, tirx.Var)}
        elif isinstance(param, tirx.Var):
            dims[param] = size(argument)
    return dims


def _bytes_of(buffer: tirx.Buffer, dims: Mapping[tirx.Var, int]) -> int:
    itemsize: int = tvm.DataType(buffer.dtype).itemsize
    return itemsize * math.prod(size_of(dim, lambda var: dims.get(var, 0)) for dim in buffer.shape)


def size_of(dim: Any, known: Callable[[Any], int]) -> int:
    """Return what a dimension comes to, where ``known`` tells the variables that it is made of."""
    if isinstance(dim, int | tirx.IntImm):
        return int(dim)
    if isinstance(dim, tirx.Var):
        return known(dim)
    analyzer = tvm.sym.Analyzer()
    for var in tirx.analysis.undefined_vars(dim):
        analyzer.bind(var, tirx.const(known(var), str(var.ty.dtype)))
    return int(analyzer.simplify(dim))
