"""llama.cpp's files of random weights for other benchmarks, and its quantizer.

Usage: python benchmarks/quantize_llama.py write MODEL.gguf HIDDEN LAYERS HEADS KV_HEADS FF VOCAB
                                             [KIND [HEAD [EXPERTS CHOSEN]]]
       python benchmarks/quantize_llama.py quantize MODEL.gguf OUT.gguf THREADS   (to Q4_0; prints what it took)

The first needs gguf alone (and libggml-python for a KIND of _K), the second llama-cpp-python.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from pathlib import Path

import ggml_types
import gguf
import numpy as np
from host_memory import settle


def write(
    path: str,
    hidden: int,
    layers: int,
    heads: int,
    kv_heads: int,
    ff: int,
    vocab: int,
    kind: str = "F16",
    head: str = "",
    experts: int = 0,
    chosen: int = 0,
) -> None:
    """Write a Llama of random weights, its matrices as ggml's type ``kind``, the last of all as ``head``; with so many
    ``experts``, of which each token has some ``chosen``, a Mixtral.
    """
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(2048)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(ff)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(hidden // heads)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(chosen)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"t{i}" for i in range(vocab)])
    writer.add_token_scores([0.0] * vocab)
    writer.add_token_types([1] * vocab)
    random = np.random.default_rng(0).standard_normal(1 << 22, np.float32) * np.float32(0.02)

    def matrix(name: str, n: int, k: int, kind: str = kind, outer: tuple[int, ...] = ()) -> None:
        weight, stored = np.resize(random, (*outer, n, k)), gguf.GGMLQuantizationType[kind]
        data = ggml_types.made(weight, kind) if kind.endswith("_K") else gguf.quants.quantize(weight, stored)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=stored)

    matrix("token_embd", vocab, hidden)
    for i in range(layers):
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{name}.weight", np.ones(hidden, np.float32))
        matrix(f"blk.{i}.attn_q", hidden, hidden)
        matrix(f"blk.{i}.attn_k", hidden * kv_heads // heads, hidden)
        matrix(f"blk.{i}.attn_v", hidden * kv_heads // heads, hidden)
        matrix(f"blk.{i}.attn_output", hidden, hidden)
        end, outer = ("_exps", (experts,)) if experts else ("", ())
        matrix(f"blk.{i}.ffn_gate{end}", ff, hidden, outer=outer)
        matrix(f"blk.{i}.ffn_up{end}", ff, hidden, outer=outer)
        matrix(f"blk.{i}.ffn_down{end}", hidden, ff, outer=outer)
        if experts:
            matrix(f"blk.{i}.ffn_gate_inp", experts, hidden, "F32")
    writer.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    matrix("output", vocab, hidden, head or kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize(source: str, out: str, threads: int) -> dict[str, float]:
    """Quantize all matrices to Q4_0; return the seconds it took, by the clock and of the processor."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread, params.ftype, params.pure = threads, llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, True
    silent = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    settle([Path(source)], Path(out).parent)
    began, cpu = time.perf_counter(), time.process_time()
    status = llama_cpp.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(params))
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    assert status == 0, f"llama.cpp could not quantize {source}"
    return {"seconds": seconds, "cpu": cpu}


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write(sys.argv[2], *map(int, sys.argv[3:9]), *sys.argv[9:11], *map(int, sys.argv[11:]))
    else:
        print(json.dumps(quantize(sys.argv[2], sys.argv[3], int(sys.argv[4]))))
