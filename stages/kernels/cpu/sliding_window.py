"""Attention within a sliding window: which of TVM's kinds a layer is, and kernels for heads that have no other of ours.

TVM has a kind of layers with a window and tells their kernels of the last tokens of each block of pages. A sequence is
one block until it is forked: then its beginning is a block that it shares, and how far behind a query a block lies is
told to the other kind alone, as the position of its first token. So layers within a window are TVM's full ones with
kernels of ours, by positions; full layers beside them are TVM's with a window, of a length that nothing reaches.
"""

from __future__ import annotations

import math
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T  # noqa: N812

from stages.kernels.cpu.attention import LOWEST, first_seen, positions_of
from stages.kernels.cpu.vectors import kernel, put, vector
from stages.sizes import PAGE_SIZE as PAGE

WITHIN, FULL = "mha", "mha_sliding"  # TVM's names of the kinds
NONE = 1 << 30  # tokens of the window of full layers
# The names under which TVM's cache adds its own kernels; with OTHERS, those of full layers beside others.
PREFILL, DECODE, OTHERS = "batch_prefill_paged_kv_cpu", "batch_decode_paged_kv_cpu", "_sliding_window"


def prefill(heads: int, kv_heads: int, head_dim: int, window: int) -> tirx.PrimFunc:
    """Return the kernel of the queries of several sequences against the tokens that the cache holds of each.

    Its signature is that of TVM's; q is rotated already, so rotary arguments go unused. Those of a chunk see each
    other elsewhere.
    """
    with kernel() as made:
        n, batch = T.int32(), T.int32()
        q = made.argument("q", (n, heads, head_dim), "float32")
        starts = made.argument("q_starts", (batch + 1,), "int32", inside=True)
        attention = _Attention(made, q, batch, (heads, kv_heads, head_dim), window)
        made.number("causal", "int32")
        attention.scale(made)
        with T.serial(0, batch) as s, T.serial(starts[s], starts[s + 1]) as query, T.serial(0, heads) as h:
            attention.emit(s, query, h)
    return made.function


def decode(heads: int, kv_heads: int, head_dim: int, window: int) -> tirx.PrimFunc:
    """Return the kernel of one query of each sequence; otherwise as :func:`prefill`."""
    with kernel() as made:
        batch = T.int32()
        q = made.argument("q", (batch, heads, head_dim), "float32")
        attention = _Attention(made, q, batch, (heads, kv_heads, head_dim), window)
        attention.scale(made)
        with T.serial(0, batch) as s, T.serial(0, heads) as h:
            attention.emit(s, s, h)
    return made.function


class _Attention:
    """What both kernels declare, and the attention of one head of one query."""

    def __init__(self, made: Any, q: Any, batch: Any, sizes: tuple[int, int, int], window: int) -> None:
        self.q, self.window = q, window
        (heads, kv_heads, self.head_dim), n = sizes, q.shape[0]
        self.group = heads // kv_heads
        self.pages = made.argument("pages", (T.int32(), 2, kv_heads, PAGE, self.head_dim), "float32", inside=True)
        self.starts = made.argument("page_starts", (batch + 1,), "int32", inside=True)
        self.numbers = made.argument("page_numbers", (T.int32(),), "int32", inside=True)
        self.last = made.argument("lengths", (batch,), "int32", inside=True)  # tokens of the last page
        self.k_positions, self.q_positions = positions_of(made, batch, n)
        self.output = made.argument("output", (n, heads, self.head_dim), "float32")
        self.lse = made.argument("lse", (n, heads), "float32")
        self.sm_scale: Any = None

    def scale(self, made: Any) -> None:
        """Declare the arguments that come last."""
        for name, dtype in (("rotary_mode", "int32"), ("rope_scale", "float32"), ("rope_theta", "float32")):
            made.number(name, dtype)
        self.sm_scale = made.number("sm_scale", "float32")

    def emit(self, s: Any, query: Any, h: Any) -> None:
        """Emit the head ``h`` of a ``query`` of sequence ``s``, in units of log 2; nothing seen is LOWEST."""
        used = self.starts[s + 1] - self.starts[s]
        end = T.bind(T.if_then_else(used > 0, (used - 1) * PAGE + self.last[s], 0))
        low = T.bind(first_seen(self.window, self.q_positions[query], self.k_positions[s], end))
        peak, total, score, values = vector(1), vector(1), vector(1), vector(self.head_dim)
        put(peak, T.float32(LOWEST), 0)
        put(total, T.float32(1), 0)
        with T.serial(0, self.head_dim) as d:
            put(values, T.float32(0), d)
        with T.serial(low, end) as token:
            at = (self.numbers[self.starts[s] + token // PAGE], h // self.group, token % PAGE)
            put(score, T.float32(0), 0)
            with T.serial(0, self.head_dim) as d:
                product = self.q[query, h, d] * self.pages[at[0], 0, at[1], at[2], d]
                put(score, score[0] + product, 0)
            put(score, score[0] * self.sm_scale * T.float32(math.log2(math.e)), 0)
            highest = T.bind(T.max(peak[0], score[0]))
            shrunk = T.bind(T.exp2(peak[0] - highest))
            weight = T.bind(T.exp2(score[0] - highest))
            put(total, total[0] * shrunk + weight, 0)
            put(peak, highest, 0)
            with T.serial(0, self.head_dim) as d:
                put(values, values[d] * shrunk + weight * self.pages[at[0], 1, at[1], at[2], d], d)
        with T.serial(0, self.head_dim) as d:
            put(self.output, values[d] / total[0], query, h, d)
        put(self.lse, peak[0] + T.log2(total[0]), query, h)
