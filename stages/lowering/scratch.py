"""What kernels allocate for themselves while they run: intermediate results that no schedule has fused away."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import tvm
from tvm import relax as rx
from tvm import s_tir, tirx

from stages.lowering.rewriter import bound_values

# What moves every buffer of a kernel to the innermost loop around all its uses, and cuts it down to what is used there.
_PLACED = tvm.transform.Sequential(
    [
        s_tir.transform.LowerInitBlock(),
        s_tir.transform.PlanAndUpdateBufferAllocationLocation(),
        s_tir.transform.ConvertBlocksToOpaque(),
        s_tir.transform.CompactBufferAllocation(),
    ]
)


def largest_scratch(module: tvm.IRModule, function: rx.Function, size: Callable[[Any], int]) -> int:
    """Return the most bytes that a kernel called by ``function`` of a scheduled module allocates outside its loops.

    ``size`` evaluates a dimension of the function. What is allocated inside a loop is a tile for each thread.
    """
    buffers = functools.cache(lambda name: _buffers(module[name]))
    largest = 0
    for value in bound_values(function):
        if isinstance(value, rx.Call) and isinstance(value.op, tvm.ir.GlobalVar):
            kernel = module[value.op]
            if isinstance(kernel, tirx.PrimFunc) and buffers(value.op):
                dims = _dims(kernel, value, size)
                largest = max(largest, sum(_bytes_of(buffer, dims) for buffer in buffers(value.op)))
    return largest


def _buffers(kernel: tirx.PrimFunc) -> list[tirx.Buffer]:
    if not _outermost(kernel):
        return []  # buffers move inwards only
    placed = _PLACED(tvm.IRModule({"kernel": kernel}))["kernel"]
    return _outermost(placed)


def _outermost(kernel: tirx.PrimFunc) -> list[tirx.Buffer]:
    """Return the buffers allocated outside of all loops."""
    body = kernel.body
    return list(body.block.alloc_buffers) if isinstance(body, s_tir.SBlockRealize) else []


def _dims(kernel: tirx.PrimFunc, call: rx.Call, size: Callable[[Any], int]) -> Mapping[tirx.Var, int]:
    """Return what the symbolic dimensions of ``kernel`` are where it is called."""
    return {
        dim: size(given)
        for param, argument in zip(kernel.params, call.args, strict=False)
        if isinstance(argument.ty, rx.TensorType)
        for dim, given in zip(param.shape, argument.ty.shape.values, strict=True)
        if isinstance(dim, tirx.Var)
    }


def _bytes_of(buffer: tirx.Buffer, dims: Mapping[tirx.Var, int]) -> int:
    shape = [dims.get(dim, 0) if isinstance(dim, tirx.Var) else int(dim) for dim in buffer.shape]
    return tvm.DataType(buffer.dtype).itemsize * math.prod(shape)
