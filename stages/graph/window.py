"""The attention of a prefill chunk to what the cache holds within a sliding window, on a CPU.

TVM's own kernel reads a running maximum that it has not set where the first token of the cache is outside the window,
and gives NaN where the stack happens to hold one. This one visits the tokens inside the window alone.
"""

from __future__ import annotations

import math

from tvm import tirx
from tvm.script import tirx as T  # noqa: N812

# The names under which TVM's cache adds its own kernels.
PREFILL, DECODE = "batch_prefill_paged_kv_cpu_sliding_window", "batch_decode_paged_kv_cpu_sliding_window"
PAGE = 16  # tokens; the size that TVM's other kernels are made for
LOWEST = -5e4  # the log of nothing seen yet, as TVM's kernels have it: it merges with a weight of zero


def prefill_kernel(num_heads: int, num_kv_heads: int, head_dim: int, dtype: str, window: int) -> tirx.PrimFunc:
    """Return the kernel, with the signature of TVM's; q is rotated already, so its rotary arguments go unused.

    A token i of a chunk sees itself and the i before it elsewhere; of the cache it sees the last window - 1 - i tokens.
    """
    group, log2e = num_heads // num_kv_heads, math.log2(math.e)

    @T.prim_func(s_tir=True)
    def kernel(
        q_: T.handle, q_starts_: T.handle, pages_: T.handle, page_starts_: T.handle, page_numbers_: T.handle,
        lengths_: T.handle, _k_positions: T.handle, _q_positions: T.handle, output_: T.handle, lse_: T.handle,
        causal: T.int32, _rotary_mode: T.int32, _rope_scale: T.float32, _rope_theta: T.float32, sm_scale: T.float32,
    ):  # fmt: skip
        T.func_attr({"tirx.is_scheduled": True})
        b, n, used, all_pages = T.int32(), T.int32(), T.int32(), T.int32()
        at0, at1, at2, at3 = T.int32(), T.int32(), T.int32(), T.int32()
        q = T.match_buffer(q_, (n, num_heads, head_dim), dtype)
        q_starts = T.match_buffer(q_starts_, (b + 1,), "int32", elem_offset=at0)
        pages = T.match_buffer(pages_, (all_pages, 2, num_kv_heads, PAGE, head_dim), dtype)
        page_starts = T.match_buffer(page_starts_, (b + 1,), "int32", elem_offset=at1)
        page_numbers = T.match_buffer(page_numbers_, (used,), "int32", elem_offset=at2)
        lengths = T.match_buffer(lengths_, (3, b), "int32", elem_offset=at3)  # of the last page, offset, sinks
        output = T.match_buffer(output_, (n, num_heads, head_dim), dtype)
        lse = T.match_buffer(lse_, (n, num_heads), "float32")
        for h, s in T.grid(num_heads, b):
            with T.sblock("attention"):
                held = T.sblock_alloc_buffer((2,), "int32")  # tokens in the cache; the first one seen
                state = T.sblock_alloc_buffer((5,), "float32")  # maximum, sum, score, new maximum, rescaling
                total = T.sblock_alloc_buffer((head_dim,), "float32")
                held[0] = (page_starts[s + 1] - page_starts[s] - 1) * PAGE + lengths[0, s]
                held[0] = T.if_then_else(
                    page_starts[s + 1] > page_starts[s], held[0] - lengths[1, s] + lengths[2, s], 0
                )
                for i in T.serial(q_starts[s + 1] - q_starts[s]):
                    held[1] = T.if_then_else(causal > 0, T.max(held[0] - T.max(window - 1 - i, 0), 0), 0)
                    state[0] = LOWEST
                    state[1] = 1.0
                    for d in T.serial(head_dim):
                        total[d] = 0.0
                    for r in T.serial(held[0] - held[1]):
                        t: T.let[T.int32] = held[1] + r
                        at: T.let[T.int32] = T.if_then_else(t < lengths[2, s], t, t - lengths[2, s] + lengths[1, s])
                        page: T.let[T.int32] = page_numbers[page_starts[s] + at // PAGE]
                        state[2] = 0.0
                        for d in T.serial(head_dim):
                            state[2] += q[q_starts[s] + i, h, d] * pages[page, 0, h // group, at % PAGE, d]
                        state[2] *= sm_scale * log2e
                        state[3] = T.max(state[0], state[2])
                        state[4] = T.exp2(state[0] - state[3])
                        state[2] = T.exp2(state[2] - state[3])
                        state[1] = state[1] * state[4] + state[2]
                        state[0] = state[3]
                        for d in T.serial(head_dim):
                            total[d] = total[d] * state[4] + state[2] * pages[page, 1, h // group, at % PAGE, d]
                    for d in T.serial(head_dim):
                        output[q_starts[s] + i, h, d] = total[d] / state[1]
                    lse[q_starts[s] + i, h] = state[0] + T.log2(state[1])

    return kernel
