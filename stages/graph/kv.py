"""create_tir_paged_kv_cache: the paged KV cache with its kernels (append, attention, rotary embedding, paging)."""

from __future__ import annotations

import tvm
from tvm import relax as rx
from tvm import tirx
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn.llm.kv_cache import PagedKVCache, RopeMode, TIRPagedKVCache

from stages.graph.export import Build, export_plain

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
        config = self.build.config
        num_kv_heads = getattr(config, "num_kv_heads", config.num_heads)
        return TIRPagedKVCache(
            attn_kind="mha",
            max_batch_size=max_batch_size,
            max_total_seq_len=max_total_seq_len,
            prefill_chunk_size=prefill_chunk_size,
            page_size=page_size,
            support_sliding_window=support_sliding_window,
            layer_partition=rx.ShapeExpr([0, config.num_layers]),
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=num_kv_heads,
            qk_head_dim=config.head_dim,
            v_head_dim=config.head_dim,
            mla_original_qk_head_dim=0,
            mla_original_v_head_dim=0,
            # Rotated once when appended, both halves of a head against each other; the inline mode of the kernels is
            # wrong for a partial rotary dimension.
            rope_mode=RopeMode.NORMAL,
            rope_scale=1,
            rope_theta=config.rope_theta,
            rope_scaling={},
            rope_ext_factors=rx.prim_value(0),
            rotary_dim=config.head_dim,
            enable_disaggregation=False,
            dtype=self.build.kv_dtype,
            target=self.build.target,
        )


def export(build: Build) -> tvm.IRModule:
    """Return the module of ``create_tir_paged_kv_cache`` and the kernels it hands to the runtime."""
    return export_plain(build, Cache(build), {"create_tir_paged_kv_cache": dict.fromkeys(SIZES, int)})
