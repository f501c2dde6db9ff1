"""Matrix products of float16 and bfloat16 on the tensor cores of NVIDIA GPUs, summed in float32.

One block of eight warps computes 64 rows by 128 columns, 32 columns of the inner dimension at a time, through shared
memory; what rebuilds a weight is computed on the way there, what follows the product on the way out. It takes 32 of the
48 KiB of shared memory that every architecture grants a block. dlight's rule for float16, which this one follows, takes
72 KiB, and knows no bfloat16.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import tvm
from tvm import s_tir, tirx
from tvm.s_tir import TensorIntrin
from tvm.s_tir.dlight.analysis import get_root_block
from tvm.s_tir.dlight.gpu import matmul
from tvm.s_tir.dlight.gpu.base import GPUScheduleRule

from stages.lowering.schedules.tensor_tiles import TILE, clear, load, multiply, store

FIRST_ARCH = {"float16": 70, "bfloat16": 80}  # with tensor cores for it
WARP, VECTOR = 32, 4
WARPS = (2, 4)  # of a block, along rows and columns
TILES = (2, 2)  # of a warp
STEP = 2  # tiles along the inner dimension
SHARED = "shared.dyn"


class TensorMatmul(GPUScheduleRule):
    """Takes every kernel with one product of two matrices of the same half precision that has more than one row."""

    def apply(self, func: tirx.PrimFunc, target: tvm.target.Target, _tunable: bool) -> s_tir.Schedule | None:
        """Return the kernel scheduled, None if it is none of ours."""
        if not isinstance(func, tirx.PrimFunc) or target.kind.name != "cuda":
            return None
        schedule = s_tir.Schedule(func)
        blocks = matmul.get_reduction_blocks(schedule, schedule.get_child_blocks(get_root_block(schedule)))
        if not blocks or matmul.get_index_map(schedule.get(blocks[0])) is None:
            return None
        block = schedule.get(blocks[0])
        dtype, *others = {str(read.source.dtype) for read in block.reads}
        first = FIRST_ARCH.get(dtype)
        if others or first is None or str(block.writes[0].source.dtype) != "float32":
            return None
        if matmul.check_sm_version(str(target.attrs["arch"])) < first:
            return None
        _schedule(schedule, blocks[0], dtype)
        return schedule


def _schedule(schedule: s_tir.Schedule, main: Any, dtype: str) -> None:
    _normalize(schedule, main)
    batch, i, j, k = schedule.get_loops(main)
    (i, in_i), (j, in_j), (k, in_k) = (schedule.split(loop, [None, TILE]) for loop in (i, j, k))
    schedule.reorder(i, j, k, in_i, in_j, in_k)
    tile, outer = main, schedule.blockize(in_i)

    i0, i1, i2, i3 = schedule.split(i, [None, 1, WARPS[0], TILES[0]])
    j0, j1, j2, j3 = schedule.split(j, [1, None, WARPS[1], TILES[1]])
    k0, k1 = schedule.split(k, [None, STEP])
    # Software pipelining: the operands of a step are loaded while the step before it multiplies.
    schedule.annotate(k0, "software_pipeline_order", [0, 3, 1, 4, 5, 2, 6])
    schedule.annotate(k0, "software_pipeline_stage", [0, 0, 0, 0, 0, 1, 1])
    schedule.annotate(k1, "software_pipeline_order", [0, 1, 2])
    schedule.annotate(k1, "software_pipeline_stage", [0, 0, 1])
    schedule.reorder(i0, j0, i1, j1, j2, i2, k0, k1, i3, j3)
    warp = schedule.fuse(j2, i2)
    schedule.bind(batch, "blockIdx.z")
    schedule.bind(schedule.fuse(i0, j0), "blockIdx.x")
    schedule.bind(schedule.fuse(i1, j1), "blockIdx.y")
    schedule.bind(warp, "threadIdx.y")

    fragments = []
    for operand, scope in enumerate(("wmma.matrix_a", "wmma.matrix_b")):
        _fetch(schedule, outer, operand, k0)
        fragments.append(schedule.cache_read(outer, operand, scope))
    for fragment in fragments:
        schedule.compute_at(fragment, k1)
    result = schedule.cache_write(outer, 0, SHARED)
    sums = schedule.cache_write(outer, 0, "wmma.accumulator")
    schedule.reverse_compute_at(sums, warp)
    schedule.reverse_compute_at(result, warp)
    zero = schedule.get_child_blocks(schedule.decompose_reduction(outer, k0))[0]

    names = _intrinsics(dtype)
    for fragment, name in zip(fragments, names[:2], strict=True):
        schedule.tensorize(_tiles(schedule, fragment, unroll=True), name)
    stored, cleared, multiplied = names[2:]
    schedule.tensorize(_tiles(schedule, sums, unroll=False), stored)
    schedule.tensorize(schedule.get_loops(zero)[-2], cleared)
    schedule.tensorize(schedule.get_loops(tile)[-3], multiplied)

    matmul.auto_inline_consumer_chain(schedule, result)
    _, lane, vector = schedule.split(schedule.fuse(*schedule.get_loops(result)[-2:]), [None, WARP, VECTOR])
    schedule.bind(lane, "threadIdx.x")
    schedule.vectorize(vector)


def _normalize(schedule: s_tir.Schedule, main: Any) -> None:
    """Make it C[s, i, j] += A[s, i, k] * B[s, j, k] with sizes of whole blocks: outside of them is zero."""
    operands = [schedule.reindex(main, ("read", 0)), schedule.reindex(main, ("read", 1))]
    result = schedule.reindex(main, ("write", 0))
    whole, a, b, c = matmul.get_index_map(schedule.get(main))
    for operand, index_map in zip(operands, (a, b), strict=True):
        schedule.transform_layout(operand, ("write", 0), index_map)
    schedule.transform_layout(result, ("read", 0), c)
    schedule.transform_block_layout(main, whole)
    rows, columns = (TILE * warps * tiles for warps, tiles in zip(WARPS, TILES, strict=True))
    schedule.pad_einsum(main, [1, rows, columns, TILE * STEP])


def _fetch(schedule: s_tir.Schedule, outer: Any, operand: int, step: Any) -> None:
    """Let all threads of a block bring an operand of a step to shared memory, computing what it is made of."""
    block = schedule.cache_read(outer, operand, SHARED)
    schedule.compute_at(block, step)
    elements = schedule.fuse(*schedule.get_loops(block)[-2:])
    _, warp, lane, vector = schedule.split(elements, [None, math.prod(WARPS), WARP, VECTOR])
    schedule.bind(lane, "threadIdx.x")
    schedule.bind(warp, "threadIdx.y")
    schedule.vectorize(vector)
    schedule.storage_align(block, 0, axis=-2, factor=TILE, offset=8)  # rows begin in different banks
    schedule.annotate(block, "tirx.manifest_shared_memory_local_stage", 1)
    schedule.annotate(block, "double_buffer_scope", 0)
    matmul.auto_inline_producers(schedule, block)


def _tiles(schedule: s_tir.Schedule, block: Any, *, unroll: bool) -> Any:
    """Split the loops of a copy into tiles; return the outer loop of one."""
    (i, in_i), (j, in_j) = (schedule.split(loop, [None, TILE]) for loop in schedule.get_loops(block)[-2:])
    schedule.reorder(i, j, in_i, in_j)
    if unroll:
        schedule.unroll(i)
        schedule.unroll(j)
    return in_i


@functools.cache
def _intrinsics(dtype: str) -> tuple[str, ...]:
    """Register what the tensor cores do with tiles of ``dtype``; return its names: load a row-major tile, load one
    transposed, store sums, clear them, multiply.
    """
    made = {
        "load": load(dtype, SHARED, "a", "row_major"),
        "load_transposed": load(dtype, SHARED, "b", "col_major"),
        "store": store(SHARED),
        "clear": clear(),
        "multiply": multiply(dtype),
    }
    for name, pair in made.items():
        TensorIntrin.register(f"stagegraph.{dtype}.{name}", *pair, override=True)
    return tuple(f"stagegraph.{dtype}.{name}" for name in made)
