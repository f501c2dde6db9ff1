"""Kernels of a recurrent model that no operator expresses: they walk the tokens of every sequence in order.

Rows [r] of a call are the tokens of b sequences laid end to end; ``ends`` int32 [b] is the row of each one's last.
Every kernel has one unit of work per sequence and channel (a few neighbouring channels on a CPU): a thread on a GPU,
part of a parallel loop on a CPU. Ends outside the rows are clipped, for the loops would run wild.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import tvm
from tvm import s_tir, tirx
from tvm.script import tirx as T  # noqa: N812 - the name TVMScript is written with

THREADS = 128  # per block on a GPU
LANES = 16  # neighbouring channels of one unit on a CPU: a cache line of float32


def on_gpu() -> bool:
    """Say whether kernels are made for a GPU."""
    target = tvm.target.Target.current(allow_none=False)
    return "gpu" in target.keys


def _once(make: Callable[[int, str], tirx.PrimFunc]) -> Callable[[int, str], tirx.PrimFunc]:
    """Make each kernel once per kind of target: every layer asks for it, and parsing takes a tenth of a second."""

    @functools.cache
    def made(width: int, dtype: str, _on_gpu: bool) -> tirx.PrimFunc:
        return make(width, dtype)

    @functools.wraps(make)
    def kernel(width: int, dtype: str) -> tirx.PrimFunc:
        return made(width, dtype, on_gpu())

    return kernel


@_once
def token_shift(width: int, dtype: str) -> tirx.PrimFunc:
    """(x [r, width], before [b, width], ends) -> [r, width]: the row before each one of its sequence.

    ``before`` stands before the first row of each sequence.
    """
    lanes = _lanes(width)

    @T.prim_func(s_tir=True)
    def token_shift(var_x: T.handle, var_before: T.handle, var_ends: T.handle, var_out: T.handle) -> None:
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        rows, batch = T.int64(), T.int64()
        x = T.match_buffer(var_x, (rows, width), dtype)
        before = T.match_buffer(var_before, (batch, width), dtype)
        ends = T.match_buffer(var_ends, (batch,), "int32")
        out = T.match_buffer(var_out, (rows, width), dtype)
        for b, group in T.grid(batch, width // lanes):
            with T.sblock("token_shift"):
                vb, vg = T.axis.remap("SS", [b, group])
                first: T.let[T.int64] = T.max(T.if_then_else(vb == 0, 0, T.Cast("int64", ends[vb - 1]) + 1), 0)
                last: T.let[T.int64] = T.min(T.Cast("int64", ends[vb]), rows - 1)
                for i in T.serial(last + 1 - first):
                    for lane in T.serial(lanes):
                        out[first + i, vg * lanes + lane] = T.if_then_else(
                            i == 0, before[vb, vg * lanes + lane], x[first + i - 1, vg * lanes + lane]
                        )

    return scheduled(token_shift)


@_once
def wkv(width: int, dtype: str) -> tirx.PrimFunc:
    """(k, v [r, width], decay, bonus [width], sum, norm, peak [b, width], ends) -> (y [r, width], sum, norm, peak).

    The average of the values so far, weighted by exp(key) that fades by exp(-exp(decay)) a token; the newest counts
    exp(bonus) times. ``sum`` and ``norm`` are numerator and denominator, both divided by exp(peak) lest they overflow.
    k, v and y are ``dtype``; all the rest and the arithmetic is float32.
    """
    return scheduled(_wkv(width, dtype, _lanes(width)))


def _wkv(width: int, dtype: str, lanes: int) -> tirx.PrimFunc:
    # fmt: off
    @T.prim_func(s_tir=True)
    def wkv(
        var_k: T.handle, var_v: T.handle, var_decay: T.handle, var_bonus: T.handle,
        var_sum: T.handle, var_norm: T.handle, var_peak: T.handle, var_ends: T.handle,
        var_y: T.handle, var_sum_out: T.handle, var_norm_out: T.handle, var_peak_out: T.handle,
    ) -> None:
        # fmt: on
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        rows, batch = T.int64(), T.int64()
        k = T.match_buffer(var_k, (rows, width), dtype)
        v = T.match_buffer(var_v, (rows, width), dtype)
        decay = T.match_buffer(var_decay, (width,), "float32")
        bonus = T.match_buffer(var_bonus, (width,), "float32")
        sum_in = T.match_buffer(var_sum, (batch, width), "float32")
        norm_in = T.match_buffer(var_norm, (batch, width), "float32")
        peak_in = T.match_buffer(var_peak, (batch, width), "float32")
        ends = T.match_buffer(var_ends, (batch,), "int32")
        y = T.match_buffer(var_y, (rows, width), dtype)
        sum_out = T.match_buffer(var_sum_out, (batch, width), "float32")
        norm_out = T.match_buffer(var_norm_out, (batch, width), "float32")
        peak_out = T.match_buffer(var_peak_out, (batch, width), "float32")
        for b, group in T.grid(batch, width // lanes):
            with T.sblock("wkv"):
                vb, vg = T.axis.remap("SS", [b, group])
                first: T.let[T.int64] = T.max(T.if_then_else(vb == 0, 0, T.Cast("int64", ends[vb - 1]) + 1), 0)
                last: T.let[T.int64] = T.min(T.Cast("int64", ends[vb]), rows - 1)
                total = T.sblock_alloc_buffer((lanes,), "float32", scope="local")
                norm = T.sblock_alloc_buffer((lanes,), "float32", scope="local")
                peak = T.sblock_alloc_buffer((lanes,), "float32", scope="local")
                for lane in T.serial(lanes):
                    total[lane] = sum_in[vb, vg * lanes + lane]
                    norm[lane] = norm_in[vb, vg * lanes + lane]
                    peak[lane] = peak_in[vb, vg * lanes + lane]
                for i in T.serial(last + 1 - first):
                    for lane in T.serial(lanes):
                        c: T.let[T.int32] = vg * lanes + lane
                        key: T.let[T.float32] = T.Cast("float32", k[first + i, c])
                        value: T.let[T.float32] = T.Cast("float32", v[first + i, c])
                        now: T.let[T.float32] = T.max(peak[lane], key + bonus[c])
                        past: T.let[T.float32] = T.exp(peak[lane] - now)
                        fresh: T.let[T.float32] = T.exp(key + bonus[c] - now)
                        y[first + i, c] = T.Cast(
                            dtype, (past * total[lane] + fresh * value) / (past * norm[lane] + fresh)
                        )
                        faded: T.let[T.float32] = peak[lane] - T.exp(decay[c])
                        after: T.let[T.float32] = T.max(faded, key)
                        keep: T.let[T.float32] = T.exp(faded - after)
                        add: T.let[T.float32] = T.exp(key - after)
                        total[lane] = keep * total[lane] + add * value
                        norm[lane] = keep * norm[lane] + add
                        peak[lane] = after
                for lane in T.serial(lanes):
                    sum_out[vb, vg * lanes + lane] = total[lane]
                    norm_out[vb, vg * lanes + lane] = norm[lane]
                    peak_out[vb, vg * lanes + lane] = peak[lane]

    return wkv


@_once
def state_get(width: int, dtype: str) -> tirx.PrimFunc:
    """(storage [sequences, history, width], slots, steps int32 [b]) -> [b, width], as the runtime's state calls it."""
    lanes = _lanes(width)

    @T.prim_func(s_tir=True)
    def state_get(var_storage: T.handle, var_slots: T.handle, var_steps: T.handle, var_out: T.handle) -> None:
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        sequences, history, batch = T.int64(), T.int64(), T.int64()
        storage = T.match_buffer(var_storage, (sequences, history, width), dtype)
        slots = T.match_buffer(var_slots, (batch,), "int32")
        steps = T.match_buffer(var_steps, (batch,), "int32")
        out = T.match_buffer(var_out, (batch, width), dtype)
        for b, group in T.grid(batch, width // lanes):
            with T.sblock("state_get"):
                vb, vg = T.axis.remap("SS", [b, group])
                for lane in T.serial(lanes):
                    out[vb, vg * lanes + lane] = storage[slots[vb], steps[vb], vg * lanes + lane]

    return scheduled(state_get)


@_once
def state_set(width: int, dtype: str) -> tirx.PrimFunc:
    """(storage [sequences, history, width], slots, steps int32 [b], data [b, width]): write the step after each."""
    lanes = _lanes(width)

    @T.prim_func(s_tir=True)
    def state_set(var_storage: T.handle, var_slots: T.handle, var_steps: T.handle, var_data: T.handle) -> None:
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        sequences, history, batch = T.int64(), T.int64(), T.int64()
        storage = T.match_buffer(var_storage, (sequences, history, width), dtype)
        slots = T.match_buffer(var_slots, (batch,), "int32")
        steps = T.match_buffer(var_steps, (batch,), "int32")
        data = T.match_buffer(var_data, (batch, width), dtype)
        for b, group in T.grid(batch, width // lanes):
            with T.sblock("state_set"):
                vb, vg = T.axis.remap("SS", [b, group])
                for lane in T.serial(lanes):
                    storage[slots[vb], (steps[vb] + 1) % T.Cast("int32", history), vg * lanes + lane] = data[
                        vb, vg * lanes + lane
                    ]

    return scheduled(state_set)


def _lanes(width: int) -> int:
    # On a GPU the neighbours are other threads.
    return 1 if on_gpu() else math.gcd(width, LANES)


def scheduled(kernel: tirx.PrimFunc) -> tirx.PrimFunc:
    """Spread the units of the kernel's one block over threads."""
    schedule = s_tir.Schedule(kernel)
    (block,) = schedule.get_child_blocks(schedule.get_sblock("root"))
    units = schedule.fuse(*schedule.get_loops(block))
    if on_gpu():
        outer, inner = schedule.split(units, [None, THREADS])
        schedule.bind(outer, "blockIdx.x")
        schedule.bind(inner, "threadIdx.x")
    else:
        schedule.parallel(units)
    # A module holds one kernel per width, and names them itself.
    return schedule.mod["main"].without_attr("global_symbol")
