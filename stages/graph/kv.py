"""create_tir_paged_kv_cache: the paged KV cache with its kernels (append, attention, rotary embedding, paging)."""

from __future__ import annotations

import numpy as np
import tvm
from tvm import relax as rx
from tvm import tirx
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn.llm.kv_cache import PagedKVCache, RopeMode, TIRPagedKVCache

from stages.graph.export import Build, export_plain
from stages.ir.compat import load_json
from stages.ir.content import WRITTEN, written
from stages.ir.text import SCHEDULED, without_places
from stages.kernels.cpu import attention as cpu_attention
from stages.kernels.cpu import kv_cache, kv_cache_int8, sliding_window
from stages.kernels.gpu import rotary

SIZES = ("max_batch_size", "max_total_seq_len", "prefill_chunk_size", "page_size", "support_sliding_window")


class Cache(nn.Module):
    """The exported function; see docs/abi.md for its convention."""

    def __init__(self, build: Build) -> None:
        self.build = build

    def create_tir_paged_kv_cache(
        self,
        max_batch_size: tirx.Var,
        max_total_seq_len: tirx.Var,
        prefill_chunk_size: tirx.Var,
        page_size: tirx.Var,
        support_sliding_window: tirx.Var,
    ) -> PagedKVCache:
        """Return an empty cache for so many sequences and tokens in all."""
        attention, kinds = self.build.config.attention, self.build.cache_kinds
        queries, keys, width = self.build.heads.stored
        return TIRPagedKVCache(
            attn_kind=kinds,
            layer_sliding_window_size=sliding_window.NONE,
            max_batch_size=max_batch_size,
            max_total_seq_len=max_total_seq_len,
            prefill_chunk_size=prefill_chunk_size,
            page_size=page_size,
            support_sliding_window=support_sliding_window,
            layer_partition=rx.ShapeExpr([0, len(kinds)]),
            num_hidden_layers=len(kinds),
            num_attention_heads=queries,
            num_key_value_heads=keys,
            qk_head_dim=width,
            v_head_dim=width,
            mla_original_qk_head_dim=0,
            mla_original_v_head_dim=0,
            # Rotated once when appended, both halves of a head against each other; the inline mode of the kernels is
            # wrong for a partial rotary dimension.
            rope_mode=RopeMode.NORMAL,
            # What TVM's kernels would make frequencies of: ours are handed to our kernel, by the argument for factors.
            rope_scale=1,
            rope_theta=1,
            rope_scaling={},
            # One that nothing reads where nothing is turned: there is no tensor of none.
            rope_ext_factors=rx.const(np.array(attention.frequencies or [0], np.float32)),
            rotary_dim=min(attention.rotary_dim or width, width),  # of the kernel that ours takes the place of
            enable_disaggregation=False,
            dtype=self.build.compute_dtype,
            target=self.build.target,
        )


def export(build: Build) -> tvm.IRModule:
    """Return the module of ``create_tir_paged_kv_cache`` and the kernels it hands to the runtime."""
    module = export_plain(build, Cache(build), {"create_tir_paged_kv_cache": dict.fromkeys(SIZES, int)})
    for name, kernel in _replacements(build).items():
        variable = module.get_global_var(name)
        module[variable] = kernel.with_attr("global_symbol", module[variable].attrs["global_symbol"])
    for variable, kernel in module.functions_items():
        if isinstance(kernel, tirx.PrimFunc) and WRITTEN not in kernel.attrs:
            module[variable] = _finished(kernel, on_cpu=build.row.device == "cpu")
    return module


def _finished(kernel: tirx.PrimFunc, *, on_cpu: bool) -> tirx.PrimFunc:
    """Return a kernel of TVM's with what spares lowering to look for a schedule, and to save it for its content."""
    if on_cpu:  # written loop by loop, but only some are marked so
        kernel = kernel.with_attr(SCHEDULED, True)
    return written(load_json(without_places(tvm.ir.save_json(kernel)))) if SCHEDULED in kernel.attrs else kernel


def _replacements(build: Build) -> dict[str, tirx.PrimFunc]:
    """Return our kernels by the names under which TVM's cache adds its own."""
    attention = build.config.attention
    numbers = attention.num_heads, attention.num_kv_heads, attention.head_dim
    turning = build.context_window, attention.rotary_dim, attention.attention_factor, attention.log_n
    if not build.row.cpu_kernels:
        return {rotary.ROTARY: rotary.rotary_kernel(*numbers, build.compute_dtype, *turning)}
    heads, width = build.heads, min(64, attention.head_dim)
    made = {rotary.ROTARY: kv_cache.rope(heads, *turning)}
    seen = attention.sliding_window if build.sliding else 0
    if not build.own_attention:
        kernels = (
            {sliding_window.PREFILL: sliding_window.prefill, sliding_window.DECODE: sliding_window.decode}
            if seen
            else {}
        )
        return made | {name: kernel(*numbers, seen) for name, kernel in kernels.items()}
    layers, own = (
        len(build.cache_kinds),
        cpu_attention.Options(attention.softcap, attention.sinks, attention.chunk, attention.chosen, attention.words),
    )
    made |= {
        "tir_kv_cache_transpose_append": kv_cache.append(heads),
        "copy_single_page_cpu": kv_cache.copy_page(heads),
        "tir_kv_cache_debug_get_kv": kv_cache.read_back(heads, layers),
        "compact_kv_copy_cpu": kv_cache.move_tokens(heads),
        sliding_window.DECODE: cpu_attention.decode(heads, width, seen, options=own),
        sliding_window.PREFILL: cpu_attention.prefill(heads, width, seen, options=own),
        "batch_prefill_ragged_kv": cpu_attention.prefill_ragged(heads, width, own),
    }
    if isinstance(heads, kv_cache_int8.Int8Heads):
        made["merge_state_inplace_cpu"] = kv_cache_int8.merge(heads)
    if sliding_window.FULL in build.cache_kinds:
        made[sliding_window.DECODE + sliding_window.OTHERS] = cpu_attention.decode(heads, width, numbers=3, options=own)
        made[sliding_window.PREFILL + sliding_window.OTHERS] = cpu_attention.prefill(
            heads, width, numbers=3, options=own
        )
    return made
