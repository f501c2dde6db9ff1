"""Rotary positions for GPUs: heads of any size, of any float dtype.

TVM's own kernel computes frequencies inside, from a few rope types, in float32 rounded otherwise than transformers
does; for yarn it takes those of the wrong channels and leaves out the attention factor.
"""

from __future__ import annotations

from tvm import tirx
from tvm.script import tirx as T  # noqa: N812

from stages.kernels.cpu.kv_cache import query_scale

ROTARY = "fused_rope"  # the name under which TVM's cache adds its own kernel
NAN = 0x7FC00000


def rotary_kernel(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: str,
    context: int,
    rotary_dim: int,
    factor: float,
    log_n: int = 0,
) -> tirx.PrimFunc:
    """Return the kernel of (qkv, positions, q, k, v, frequencies): heads taken apart, those of q and k turned by their
    position times each frequency, halves against each other, and stretched by ``factor``; angles are float32.
    ``log_n`` stretches queries, of which all channels are turned then, besides. A position outside the ``context``
    makes queries NaN, and so the logits: code of a GPU has no other way to refuse.
    """
    keys, values, half = num_heads, num_heads + num_kv_heads, rotary_dim // 2

    def turned(x, positions, frequencies, s, h, d, stretch=1.0):
        if not half:
            return x[s, h, d]
        angle = tirx.Var("angle", "float32")
        other = tirx.if_then_else(d < half, -x[s, h, d + half], x[s, h, d - half]).astype("float32")
        scale = tirx.const(factor, "float32") * stretch
        value = x[s, h, d].astype("float32") * (tirx.cos(angle) * scale) + other * (tirx.sin(angle) * scale)
        meaning = positions[s].astype("float32") * frequencies[d % half]
        return tirx.if_then_else(d < rotary_dim, tirx.Let(angle, meaning, value).astype(dtype), x[s, h, d])

    @T.prim_func(private=True, s_tir=True)
    def kernel(
        qkv_: T.handle, positions_: T.handle, q_: T.handle, k_: T.handle, v_: T.handle, frequencies_: T.handle
    ):  # fmt: skip
        T.func_attr({"op_pattern": 8, "tirx.noalias": True})
        n, at = T.int32(), T.int32()
        qkv = T.match_buffer(qkv_, (n, values + num_kv_heads, head_dim), dtype)
        positions = T.match_buffer(positions_, (n,), "int32", elem_offset=at)
        q = T.match_buffer(q_, (n, num_heads, head_dim), dtype)
        k = T.match_buffer(k_, (n, num_kv_heads, head_dim), dtype)
        v = T.match_buffer(v_, (n, num_kv_heads, head_dim), dtype)
        frequencies = T.match_buffer(frequencies_, (tirx.max(half, 1),), "float32")
        for iters in T.grid(n, values + num_kv_heads, head_dim):
            with T.sblock("rotary"):
                s, h, d = T.axis.remap("SSS", iters)
                if h < keys:
                    q[s, h, d] = T.if_then_else(
                        positions[s] < context,
                        turned(qkv, positions, frequencies, s, h, d, query_scale(positions[s], log_n)),
                        T.reinterpret("float32", T.uint32(NAN)).astype(dtype),
                    )
                elif h < values:
                    k[s, h - keys, d] = turned(qkv, positions, frequencies, s, h, d)
                else:
                    v[s, h - values, d] = qkv[s, h, d]

    return kernel
