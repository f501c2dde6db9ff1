"""WMMA intrinsics of NVIDIA tensor cores for tiles of 16 by 16.

Each is a pair of kernels: the description that a schedule matches loops against, and the implementation put there. They
are TVM's own, of tvm.s_tir.tensor_intrin, which parses hundreds for all processors in the first seconds of a process
that imports it.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T  # noqa: N812

TILE = 16
SUMS = "wmma.accumulator"  # where sums are, in float32


def load(dtype: str, shared: str, operand: str, layout: str) -> tuple[Any, Any]:
    """Copy a tile from ``shared`` memory to fragment ``operand``: ``a``, or ``b``, transposed if ``col_major``."""
    fragment = f"wmma.matrix_{operand}"

    @T.prim_func(s_tir=True)
    def implementation(a: T.handle, c: T.handle) -> None:
        s1, s0, d1, d0 = T.int32(), T.int32(), T.int32(), T.int32()
        source = T.match_buffer(a, (TILE, TILE), dtype, align=64, offset_factor=TILE, scope=shared, strides=[s1, s0])
        target = T.match_buffer(c, (TILE, TILE), dtype, align=64, offset_factor=TILE, scope=fragment, strides=[d1, d0])
        with T.sblock("root"):
            T.reads(source[0:TILE, 0:TILE])
            T.writes(target[0:TILE, 0:TILE])
            T.evaluate(
                T.tvm_load_matrix_sync(
                    target.data, TILE, TILE, TILE, _number(target, d1), source.access_ptr("r", ptr_type=dtype), s1,
                    layout, dtype="void",
                )
            )  # fmt: skip

    return _copied("load", dtype, shared, fragment), implementation


def store(shared: str) -> tuple[Any, Any]:
    """Copy a tile of sums to ``shared`` memory."""

    @T.prim_func(s_tir=True)
    def implementation(a: T.handle, c: T.handle) -> None:
        s1, s0, d1, d0 = T.int32(), T.int32(), T.int32(), T.int32()
        source = T.match_buffer(a, (TILE, TILE), "float32", align=64, offset_factor=TILE, scope=SUMS, strides=[d1, d0])
        target = T.match_buffer(
            c, (TILE, TILE), "float32", align=64, offset_factor=TILE, scope=shared, strides=[s1, s0]
        )
        with T.sblock("root"):
            T.reads(source[0:TILE, 0:TILE])
            T.writes(target[0:TILE, 0:TILE])
            T.evaluate(
                T.tvm_store_matrix_sync(
                    source.data, TILE, TILE, TILE, _number(source, d1), target.access_ptr("w", ptr_type="float32"), s1,
                    "row_major", dtype="void",
                )
            )  # fmt: skip

    return _copied("store", "float32", SUMS, shared), implementation


def clear() -> tuple[Any, Any]:
    """Make a tile of sums zero."""

    @T.prim_func(s_tir=True)
    def meaning(c: T.handle) -> None:
        target = T.match_buffer(c, (TILE, TILE), "float32", align=64, offset_factor=TILE, scope=SUMS)
        with T.sblock("root"):
            T.reads()
            T.writes(target[0:TILE, 0:TILE])
            for i, j in T.grid(TILE, TILE):
                with T.sblock("init"):
                    vi, vj = T.axis.remap("SS", [i, j])
                    target[vi, vj] = T.float32(0)

    @T.prim_func(s_tir=True)
    def implementation(c: T.handle) -> None:
        d1, d0 = T.int32(), T.int32()
        target = T.match_buffer(c, (TILE, TILE), "float32", align=64, offset_factor=TILE, scope=SUMS, strides=[d1, d0])
        with T.sblock("root"):
            T.reads()
            T.writes(target[0:TILE, 0:TILE])
            T.evaluate(
                T.tvm_fill_fragment(target.data, TILE, TILE, TILE, _number(target, d1), T.float32(0), dtype="void")
            )

    return meaning, implementation


def multiply(dtype: str) -> tuple[Any, Any]:
    """Add the product of a tile and a transposed one, both of ``dtype``, to a tile of sums."""

    @T.prim_func(s_tir=True)
    def meaning(a: T.handle, b: T.handle, c: T.handle) -> None:
        left = T.match_buffer(a, (TILE, TILE), dtype, align=64, offset_factor=TILE, scope="wmma.matrix_a")
        right = T.match_buffer(b, (TILE, TILE), dtype, align=64, offset_factor=TILE, scope="wmma.matrix_b")
        target = T.match_buffer(c, (TILE, TILE), "float32", align=64, offset_factor=TILE, scope=SUMS)
        with T.sblock("root"):
            T.reads(target[0:TILE, 0:TILE], left[0:TILE, 0:TILE], right[0:TILE, 0:TILE])
            T.writes(target[0:TILE, 0:TILE])
            for i, j, k in T.grid(TILE, TILE, TILE):
                with T.sblock(""):
                    vi, vj, vk = T.axis.remap("SSR", [i, j, k])
                    target[vi, vj] = target[vi, vj] + T.Cast("float32", left[vi, vk]) * T.Cast("float32", right[vj, vk])

    @T.prim_func(s_tir=True)
    def implementation(a: T.handle, b: T.handle, c: T.handle) -> None:
        a1, a0, b1, b0, c1, c0 = T.int32(), T.int32(), T.int32(), T.int32(), T.int32(), T.int32()
        left = T.match_buffer(
            a, (TILE, TILE), dtype, align=64, offset_factor=TILE, scope="wmma.matrix_a", strides=[a1, a0]
        )
        right = T.match_buffer(
            b, (TILE, TILE), dtype, align=64, offset_factor=TILE, scope="wmma.matrix_b", strides=[b1, b0]
        )
        target = T.match_buffer(c, (TILE, TILE), "float32", align=64, offset_factor=TILE, scope=SUMS, strides=[c1, c0])
        with T.sblock("root"):
            T.reads(target[0:TILE, 0:TILE], left[0:TILE, 0:TILE], right[0:TILE, 0:TILE])
            T.writes(target[0:TILE, 0:TILE])
            T.evaluate(
                T.tvm_mma_sync(
                    target.data, _number(target, c1), left.data, _number(left, a1), right.data, _number(right, b1),
                    target.data, _number(target, c1), dtype="void",
                )
            )  # fmt: skip

    return meaning, implementation


def _copied(name: str, dtype: str, source_scope: str, target_scope: str) -> Any:
    """Return what a copy of a tile means."""

    @T.prim_func(s_tir=True)
    def meaning(a: T.handle, c: T.handle) -> None:
        source = T.match_buffer(a, (TILE, TILE), dtype, align=64, offset_factor=TILE, scope=source_scope)
        target = T.match_buffer(c, (TILE, TILE), dtype, align=64, offset_factor=TILE, scope=target_scope)
        with T.sblock("root"):
            T.reads(source[0:TILE, 0:TILE])
            T.writes(target[0:TILE, 0:TILE])
            for i, j in T.grid(TILE, TILE):
                with T.sblock(name):
                    vi, vj = T.axis.remap("SS", [i, j])
                    target[vi, vj] = source[vi, vj]

    return meaning


def _number(tiles: Any, stride: Any) -> Any:
    """Return which of the tiles of a fragment ``tiles`` is, as far as its offset tells."""
    return tiles.elem_offset // stride // TILE * (stride // TILE) + tiles.elem_offset % stride // TILE
