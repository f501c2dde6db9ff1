"""Kernels of layers whose state is as large for a long text as for a short one: short convolutions, state spaces, the
gated delta rule.

Conventions are those of :mod:`stages.kernels.wkv`: rows are the tokens of b sequences laid end to end, of which each
ends at one of ``ends`` int32 [b]; a unit of work is a sequence and some neighbouring channels. All is float32. What a
sequence left behind comes in as ``before`` and goes out as ``after``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

from tvm import tirx
from tvm.script import tirx as T  # noqa: N812 - the name TVMScript is written with

from stages.kernels.wkv import LANES, on_gpu, scheduled


def _once(make: Callable[..., tirx.PrimFunc]) -> Callable[..., tirx.PrimFunc]:
    """Make each kernel once per kind of target: parsing one takes a tenth of a second."""

    @functools.cache
    def made(*sizes: int, gpu: bool) -> tirx.PrimFunc:
        return make(*sizes, 1 if gpu else math.gcd(sizes[-1], LANES))

    @functools.wraps(make)
    def kernel(*sizes: int) -> tirx.PrimFunc:
        return made(*sizes, gpu=on_gpu())

    return kernel


@_once
def causal_conv(taps: int, channels: int, lanes: int) -> tirx.PrimFunc:
    """(x [r, channels], weight [channels, taps], before [b, (taps - 1) * channels], ends) -> (y [r, channels], after).

    y is the sum of a row times the last tap, the row before it times the tap before, and so on; the state is the last
    taps - 1 rows of each sequence, the oldest first.
    """
    kept = taps - 1

    @T.prim_func(s_tir=True)
    def causal_conv(
        var_x: T.handle, var_weight: T.handle, var_before: T.handle, var_ends: T.handle, var_y: T.handle,
        var_after: T.handle,
    ) -> None:  # fmt: skip
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        rows, batch = T.int64(), T.int64()
        x = T.match_buffer(var_x, (rows, channels), "float32")
        weight = T.match_buffer(var_weight, (channels, taps), "float32")
        before = T.match_buffer(var_before, (batch, kept * channels), "float32")
        ends = T.match_buffer(var_ends, (batch,), "int32")
        y = T.match_buffer(var_y, (rows, channels), "float32")
        after = T.match_buffer(var_after, (batch, kept * channels), "float32")
        for b, group in T.grid(batch, channels // lanes):
            with T.sblock("causal_conv"):
                vb, vg = T.axis.remap("SS", [b, group])
                first: T.let[T.int64] = T.max(T.if_then_else(vb == 0, 0, T.Cast("int64", ends[vb - 1]) + 1), 0)
                last: T.let[T.int64] = T.min(T.Cast("int64", ends[vb]), rows - 1)
                total = T.sblock_alloc_buffer((lanes,), "float32", scope="local")
                for i in T.serial(last + 1 - first):
                    for lane in T.serial(lanes):
                        c: T.let[T.int64] = T.Cast("int64", vg * lanes + lane)
                        total[lane] = x[first + i, c] * weight[c, kept]
                    for tap in T.serial(kept):
                        for lane in T.serial(lanes):
                            c: T.let[T.int64] = T.Cast("int64", vg * lanes + lane)
                            at: T.let[T.int64] = i - kept + tap
                            value: T.let[T.float32] = T.if_then_else(
                                at < 0, before[vb, (at + kept) * channels + c], x[first + at, c]
                            )
                            total[lane] = total[lane] + value * weight[c, tap]
                    for lane in T.serial(lanes):
                        y[first + i, vg * lanes + lane] = total[lane]
                for tap in T.serial(kept):
                    for lane in T.serial(lanes):
                        c: T.let[T.int64] = T.Cast("int64", vg * lanes + lane)
                        at: T.let[T.int64] = last + 1 - first - kept + tap
                        after[vb, tap * channels + c] = T.if_then_else(
                            at < 0, before[vb, (at + kept) * channels + c], x[first + at, c]
                        )

    return scheduled(causal_conv)


@_once
def ssm_scan(heads: int, groups: int, size: int, width: int, lanes: int) -> tirx.PrimFunc:
    """(x [r, heads * width], dt [r, heads], a [heads], b, c [r, groups * size], before [b, heads * size * width], ends)
    -> (y [r, heads * width], after).

    Mamba 2: the state [size, width] of a head fades by exp(dt * a) and gains b times dt * x; y is c times the state.
    Heads share b and c by groups.
    """
    share, whole, inner = heads // groups, heads * size * width, heads * width

    @T.prim_func(s_tir=True)
    def ssm_scan(
        var_x: T.handle, var_dt: T.handle, var_a: T.handle, var_b: T.handle, var_c: T.handle, var_before: T.handle,
        var_ends: T.handle, var_y: T.handle, var_after: T.handle,
    ) -> None:  # fmt: skip
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        rows, batch = T.int64(), T.int64()
        x = T.match_buffer(var_x, (rows, inner), "float32")
        dt = T.match_buffer(var_dt, (rows, heads), "float32")
        a = T.match_buffer(var_a, (heads,), "float32")
        b = T.match_buffer(var_b, (rows, groups * size), "float32")
        c = T.match_buffer(var_c, (rows, groups * size), "float32")
        before = T.match_buffer(var_before, (batch, whole), "float32")
        ends = T.match_buffer(var_ends, (batch,), "int32")
        y = T.match_buffer(var_y, (rows, inner), "float32")
        after = T.match_buffer(var_after, (batch, whole), "float32")
        for s, head, part in T.grid(batch, heads, width // lanes):
            with T.sblock("ssm_scan"):
                vs, vh, vp = T.axis.remap("SSS", [s, head, part])
                first: T.let[T.int64] = T.max(T.if_then_else(vs == 0, 0, T.Cast("int64", ends[vs - 1]) + 1), 0)
                last: T.let[T.int64] = T.min(T.Cast("int64", ends[vs]), rows - 1)
                state = T.sblock_alloc_buffer((size, lanes), "float32", scope="local")
                total = T.sblock_alloc_buffer((lanes,), "float32", scope="local")
                for n in T.serial(size):
                    for lane in T.serial(lanes):
                        state[n, lane] = before[vs, (vh * size + n) * width + vp * lanes + lane]
                for i in T.serial(last + 1 - first):
                    fade: T.let[T.float32] = T.exp(dt[first + i, vh] * a[vh])
                    for lane in T.serial(lanes):
                        total[lane] = T.float32(0)
                    for n in T.serial(size):
                        for lane in T.serial(lanes):
                            gain: T.let[T.float32] = dt[first + i, vh] * x[first + i, vh * width + vp * lanes + lane]
                            state[n, lane] = state[n, lane] * fade + gain * b[first + i, vh // share * size + n]
                            total[lane] = total[lane] + state[n, lane] * c[first + i, vh // share * size + n]
                    for lane in T.serial(lanes):
                        y[first + i, vh * width + vp * lanes + lane] = total[lane]
                for n in T.serial(size):
                    for lane in T.serial(lanes):
                        after[vs, (vh * size + n) * width + vp * lanes + lane] = state[n, lane]

    return scheduled(ssm_scan)


@_once
def selective_scan(size: int, channels: int, lanes: int) -> tirx.PrimFunc:
    """(x, dt [r, channels], a [channels, size], b, c [r, size], before [b, size * channels], ends)
    -> (y [r, channels], after).

    Mamba: each of the ``size`` numbers of a channel's state fades by exp(dt * its own a) and gains its own b times
    dt * x; y is c times the state.
    """
    whole = size * channels

    @T.prim_func(s_tir=True)
    def selective_scan(
        var_x: T.handle, var_dt: T.handle, var_a: T.handle, var_b: T.handle, var_c: T.handle, var_before: T.handle,
        var_ends: T.handle, var_y: T.handle, var_after: T.handle,
    ) -> None:  # fmt: skip
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        rows, batch = T.int64(), T.int64()
        x = T.match_buffer(var_x, (rows, channels), "float32")
        dt = T.match_buffer(var_dt, (rows, channels), "float32")
        a = T.match_buffer(var_a, (channels, size), "float32")
        b = T.match_buffer(var_b, (rows, size), "float32")
        c = T.match_buffer(var_c, (rows, size), "float32")
        before = T.match_buffer(var_before, (batch, whole), "float32")
        ends = T.match_buffer(var_ends, (batch,), "int32")
        y = T.match_buffer(var_y, (rows, channels), "float32")
        after = T.match_buffer(var_after, (batch, whole), "float32")
        for s, part in T.grid(batch, channels // lanes):
            with T.sblock("selective_scan"):
                vs, vp = T.axis.remap("SS", [s, part])
                first: T.let[T.int64] = T.max(T.if_then_else(vs == 0, 0, T.Cast("int64", ends[vs - 1]) + 1), 0)
                last: T.let[T.int64] = T.min(T.Cast("int64", ends[vs]), rows - 1)
                state = T.sblock_alloc_buffer((size, lanes), "float32", scope="local")
                rates = T.sblock_alloc_buffer((size, lanes), "float32", scope="local")
                total = T.sblock_alloc_buffer((lanes,), "float32", scope="local")
                for n in T.serial(size):
                    for lane in T.serial(lanes):
                        state[n, lane] = before[vs, n * channels + vp * lanes + lane]
                        rates[n, lane] = a[vp * lanes + lane, n]
                for i in T.serial(last + 1 - first):
                    for lane in T.serial(lanes):
                        total[lane] = T.float32(0)
                    for n in T.serial(size):
                        for lane in T.serial(lanes):
                            step: T.let[T.float32] = dt[first + i, vp * lanes + lane]
                            gain: T.let[T.float32] = step * b[first + i, n] * x[first + i, vp * lanes + lane]
                            state[n, lane] = state[n, lane] * T.exp(step * rates[n, lane]) + gain
                            total[lane] = total[lane] + state[n, lane] * c[first + i, n]
                    for lane in T.serial(lanes):
                        y[first + i, vp * lanes + lane] = total[lane]
                for n in T.serial(size):
                    for lane in T.serial(lanes):
                        after[vs, n * channels + vp * lanes + lane] = state[n, lane]

    return scheduled(selective_scan)


@_once
def linear_scan(channels: int, lanes: int) -> tirx.PrimFunc:
    """(x, fade [r, channels], before [b, channels], ends) -> (y [r, channels], after): y is x and, times fade, the y
    of the row before, which is the state.
    """

    @T.prim_func(s_tir=True)
    def linear_scan(
        var_x: T.handle, var_fade: T.handle, var_before: T.handle, var_ends: T.handle, var_y: T.handle,
        var_after: T.handle,
    ) -> None:  # fmt: skip
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        rows, batch = T.int64(), T.int64()
        x = T.match_buffer(var_x, (rows, channels), "float32")
        fade = T.match_buffer(var_fade, (rows, channels), "float32")
        before = T.match_buffer(var_before, (batch, channels), "float32")
        ends = T.match_buffer(var_ends, (batch,), "int32")
        y = T.match_buffer(var_y, (rows, channels), "float32")
        after = T.match_buffer(var_after, (batch, channels), "float32")
        for s, part in T.grid(batch, channels // lanes):
            with T.sblock("linear_scan"):
                vs, vp = T.axis.remap("SS", [s, part])
                first: T.let[T.int64] = T.max(T.if_then_else(vs == 0, 0, T.Cast("int64", ends[vs - 1]) + 1), 0)
                last: T.let[T.int64] = T.min(T.Cast("int64", ends[vs]), rows - 1)
                state = T.sblock_alloc_buffer((lanes,), "float32", scope="local")
                for lane in T.serial(lanes):
                    state[lane] = before[vs, vp * lanes + lane]
                for i in T.serial(last + 1 - first):
                    for lane in T.serial(lanes):
                        c: T.let[T.int64] = T.Cast("int64", vp * lanes + lane)
                        state[lane] = state[lane] * fade[first + i, c] + x[first + i, c]
                        y[first + i, c] = state[lane]
                for lane in T.serial(lanes):
                    after[vs, vp * lanes + lane] = state[lane]

    return scheduled(linear_scan)


@_once
def delta_rule(heads: int, key_heads: int, size: int, rates: int, width: int, lanes: int) -> tirx.PrimFunc:
    """(q, k [r, key_heads * size], v [r, heads * width], decay [r, heads * rates], beta [r, heads],
    before [b, heads * size * width], ends) -> (y [r, heads * width], after): the gated delta rule.

    The state [size, width] of a head fades by exp(decay), of one rate or of ``size``, one for each row; what it holds
    for k is moved towards v by beta, and y is what it holds for q. Heads share q and k, each as many.
    """
    share, whole, inner, keys = heads // key_heads, heads * size * width, heads * width, key_heads * size

    @T.prim_func(s_tir=True)
    def delta_rule(  # noqa: PLR0912 - loops
        var_q: T.handle, var_k: T.handle, var_v: T.handle, var_decay: T.handle, var_beta: T.handle,
        var_before: T.handle, var_ends: T.handle, var_y: T.handle, var_after: T.handle,
    ) -> None:  # fmt: skip
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        rows, batch = T.int64(), T.int64()
        q = T.match_buffer(var_q, (rows, keys), "float32")
        k = T.match_buffer(var_k, (rows, keys), "float32")
        v = T.match_buffer(var_v, (rows, inner), "float32")
        decay = T.match_buffer(var_decay, (rows, heads * rates), "float32")
        beta = T.match_buffer(var_beta, (rows, heads), "float32")
        before = T.match_buffer(var_before, (batch, whole), "float32")
        ends = T.match_buffer(var_ends, (batch,), "int32")
        y = T.match_buffer(var_y, (rows, inner), "float32")
        after = T.match_buffer(var_after, (batch, whole), "float32")
        for s, head, part in T.grid(batch, heads, width // lanes):
            with T.sblock("delta_rule"):
                vs, vh, vp = T.axis.remap("SSS", [s, head, part])
                first: T.let[T.int64] = T.max(T.if_then_else(vs == 0, 0, T.Cast("int64", ends[vs - 1]) + 1), 0)
                last: T.let[T.int64] = T.min(T.Cast("int64", ends[vs]), rows - 1)
                state = T.sblock_alloc_buffer((size, lanes), "float32", scope="local")
                fade = T.sblock_alloc_buffer((rates,), "float32", scope="local")
                recalled = T.sblock_alloc_buffer((lanes,), "float32", scope="local")
                total = T.sblock_alloc_buffer((lanes,), "float32", scope="local")
                for n in T.serial(size):
                    for lane in T.serial(lanes):
                        state[n, lane] = before[vs, (vh * size + n) * width + vp * lanes + lane]
                for i in T.serial(last + 1 - first):
                    for rate in T.serial(rates):
                        fade[rate] = T.exp(decay[first + i, vh * rates + rate])
                    for lane in T.serial(lanes):
                        recalled[lane] = T.float32(0)
                        total[lane] = T.float32(0)
                    for n in T.serial(size):
                        for lane in T.serial(lanes):
                            state[n, lane] = state[n, lane] * fade[n % rates]
                            recalled[lane] = recalled[lane] + state[n, lane] * k[first + i, vh // share * size + n]
                    for lane in T.serial(lanes):
                        value: T.let[T.float32] = v[first + i, vh * width + vp * lanes + lane]
                        recalled[lane] = (value - recalled[lane]) * beta[first + i, vh]
                    for n in T.serial(size):
                        for lane in T.serial(lanes):
                            state[n, lane] = state[n, lane] + recalled[lane] * k[first + i, vh // share * size + n]
                            total[lane] = total[lane] + state[n, lane] * q[first + i, vh // share * size + n]
                    for lane in T.serial(lanes):
                        y[first + i, vh * width + vp * lanes + lane] = total[lane]
                for n, lane in T.grid(size, lanes):
                    after[vs, (vh * size + n) * width + vp * lanes + lane] = state[n, lane]

    return scheduled(delta_rule)
