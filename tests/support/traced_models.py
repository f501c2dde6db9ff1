"""Tiny random checkpoints of models that have no family here, with the head structure of the real ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.support import family_models

STEPS = 64  # of decode, after one of the prefills

SIZES = {
    "vocab_size": 131, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 160, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GPT = {"vocab_size": 131, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 160, "bos_token_id": 1,
       "eos_token_id": 2}  # fmt: skip

# model_type, or one with a variant behind it -> what its config says beside the sizes
FAMILIES: dict[str, dict[str, Any]] = {
    "olmo2": {},
    "granite": {"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "attention_multiplier": 0.2,
                "logits_scaling": 2.0},
    "gemma": {"head_dim": 32},
    "gemma2": {"head_dim": 32, "attn_logit_softcapping": 8.0, "final_logit_softcapping": 6.0, "sliding_window": 20,
               "query_pre_attn_scalar": 24},
    "gemma3_text": {"head_dim": 32, "sliding_window": 20, "num_hidden_layers": 3, "query_pre_attn_scalar": 24,
                    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "phi": {"num_key_value_heads": 4, "partial_rotary_factor": 0.5},
    "phi3": {"sliding_window": 20, "num_attention_heads": 2, "num_key_value_heads": 1},
    "phi3-longrope": {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 160,
                      "original_max_position_embeddings": 40, "rope_parameters": {
                          "rope_type": "longrope", "rope_theta": 1000.0, "original_max_position_embeddings": 40,
                          "short_factor": [1.0 + 0.01 * i for i in range(16)],
                          "long_factor": [1.0 + 0.2 * i for i in range(16)]}},
    "olmo": {"clip_qkv": 2.0},
    "olmo3": {"sliding_window": 20, "layer_types": ["sliding_attention", "full_attention"]},
    "starcoder2": {"use_bias": True},
    "gpt2": {"n_embd": 64},
    "gptj": {"n_embd": 64, "rotary_dim": 8},
    "gpt_bigcode": {"n_embd": 64, "multi_query": True},
    "ctrl": {"n_embd": 64, "dff": 96},
    "cohere": {"use_qk_norm": True, "logit_scale": 0.5},
    "cohere2": {"sliding_window": 20, "layer_types": ["sliding_attention", "full_attention"]},
    "glm": {"head_dim": 16, "partial_rotary_factor": 0.5},
    "glm4": {"head_dim": 16, "partial_rotary_factor": 0.5},
    "smollm3": {},
    "ministral3": {"head_dim": 32},
    "exaone4": {"sliding_window": 20, "layer_types": ["sliding_attention", "full_attention"]},
    "nemotron": {"partial_rotary_factor": 0.5},
    "ernie4_5": {"head_dim": 16},
    "hunyuan_v1_dense": {"head_dim": 16},
    "helium": {"head_dim": 16},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64, "hidden_size": 64},
    "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4, "n_embd": 64},
    "mpt": {"d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 160, "expansion_ratio": 2, "n_embd": 64},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    # Slopes of 16 heads are no powers of two: transformers rounds them, and what they are multiplied by, to bfloat16.
    "falcon-alibi": {"alibi": True, "multi_query": False, "new_decoder_architecture": False,
                     "num_attention_heads": 16},
    "falcon-alibi-shared": {"alibi": True, "multi_query": True, "new_decoder_architecture": False,
                            "num_attention_heads": 16},
    "doge": {},
    "hrm_text": {"num_hidden_layers": 12, "num_layers_per_stack": 2, "H_cycles": 2, "L_cycles": 2, "head_dim": 16},
    "gpt_neo": {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]],
                "window_size": 20},
    "gpt_neox_japanese": {"intermediate_multiple_size": 2},
    "xglm": {"d_model": 64, "ffn_dim": 96, "num_layers": 2, "attention_heads": 4},
    "openai-gpt": {"n_embd": 64},
    "gemma3n_text": {"head_dim": 16, "sliding_window": 20, "num_hidden_layers": 4, "num_kv_shared_layers": 2,
                     "layer_types": ["sliding_attention", "full_attention"] * 2, "laurel_rank": 8,
                     "activation_sparsity_pattern": [0.9, 0.9, 0.0, 0.0], "hidden_size_per_layer_input": 16,
                     "vocab_size_per_layer_input": 131},
    "gemma4_text": {"head_dim": 16, "sliding_window": 20, "num_hidden_layers": 4, "num_kv_shared_layers": 2,
                    "layer_types": ["sliding_attention", "full_attention"] * 2, "hidden_size_per_layer_input": 16,
                    "vocab_size_per_layer_input": 131,
                    "per_layer_config": {at: {"head_dim": 32, "num_key_value_heads": 1} for at in (1, 3)}},
    "llama": {"head_dim": 32},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"head_dim": 32},
    "mistral": {"head_dim": 32, "sliding_window": 20},
    "gpt_neox": {},
    "stablelm": {"partial_rotary_factor": 0.25, "use_qkv_bias": True, "qk_layernorm": False},
}  # fmt: skip


# Mixtures of experts, each with eight of which two are chosen.
ROUTED = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
LATENT = {**ROUTED, "n_routed_experts": 8, "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32,
          "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 32, "first_k_dense_replace": 1}  # fmt: skip
INDEXED = {"index_head_dim": 32, "index_n_heads": 16}
MIXTURES: dict[str, dict[str, Any]] = {
    "qwen2_moe": {**ROUTED, "num_experts": 8, "shared_expert_intermediate_size": 64},
    "qwen3_moe": {**ROUTED, "num_experts": 8, "head_dim": 16, "norm_topk_prob": True},
    "mixtral": {"num_local_experts": 8, "sliding_window": None},
    "phimoe": {"num_local_experts": 8, "sliding_window": None, "lm_head_bias": True},
    "glm4_moe": {**ROUTED, "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
                 "head_dim": 16, "partial_rotary_factor": 0.5, "use_qk_norm": True, "routed_scaling_factor": 1.5},
    "ernie4_5_moe": {"moe_intermediate_size": 32, "moe_num_experts": 8, "moe_k": 2, "moe_num_shared_experts": 1},
    "deepseek_v2": {**LATENT, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    "deepseek_v3": {**LATENT, "n_group": 4, "topk_group": 2},
    # All heads of the indexer score zero for few tokens: equal scores say nothing of which are chosen.
    "deepseek_v32": {**LATENT, **INDEXED, "n_group": 4, "topk_group": 2, "index_topk": 40},
    "deepseek_v32-whole": {**LATENT, **INDEXED, "n_group": 4, "topk_group": 2, "index_topk": 160},
    "glm_moe_dsa": {**LATENT, **INDEXED, "n_group": 4, "topk_group": 2, "index_topk": 40,
                    "indexer_types": ["full", "shared"]},
    "gpt_oss": {"num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 32, "sliding_window": 20,
                "layer_types": ["sliding_attention", "full_attention"]},
    "llama4_text": {"num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 16, "intermediate_size_mlp": 96,
                    "moe_layers": [1], "attention_chunk_size": 20, "floor_scale": 32, "no_rope_layers": [1, 0]},
    "sarvam_moe": {**ROUTED, "n_routed_experts": 8, "head_dim": 16},
    "jetmoe": {"num_local_experts": 8, "num_experts_per_tok": 2, "kv_channels": 16, "num_attention_heads": 4},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 2},
    "granitemoe": {"num_local_experts": 8, "num_experts_per_tok": 2, "attention_multiplier": 0.2,
                   "logits_scaling": 2.0},
}  # fmt: skip

# Layers that keep states of several kinds.
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 2, "mamba_expand": 2}
DELTA = {"layer_types": ["linear_attention", "full_attention"], "head_dim": 16, "linear_num_key_heads": 2,
         "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16}  # fmt: skip
HYBRIDS: dict[str, dict[str, Any]] = {
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "qwen3_next": {**DELTA, **ROUTED, "num_experts": 8, "shared_expert_intermediate_size": 32},
    "qwen3_5_text": DELTA,
    "granitemoehybrid": {**MAMBA, "layer_types": ["linear_attention", "full_attention"], "num_local_experts": 8,
                         "num_experts_per_tok": 2, "shared_intermediate_size": 32},
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "mamba": {"intermediate_size": 128, "time_step_rank": 4},
    "minimax": {"layer_types": ["linear_attention", "full_attention"], "head_dim": 16, "num_local_experts": 8,
                "num_experts_per_tok": 2, "block_size": 32},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "head_dim": 16, "lru_width": 64,
                        "attention_window_size": 20, "intermediate_size": 192},
    "zaya": {"layer_types": ["hybrid", "hybrid_sliding"], "head_dim": 16, "num_experts": 8, "moe_intermediate_size": 32,
             "router_hidden_size": 32, "sliding_window": 20},
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 2},
}  # fmt: skip


def write(folder: Path, model_type: str, *, seed: int = 0, **more: Any) -> Path:
    """Write a random checkpoint with outliers whose logits spread over a few units."""
    import torch
    import transformers

    own = {**FAMILIES, **MIXTURES, **HYBRIDS}[model_type]
    sizes = {**(GPT if "n_embd" in own else SIZES), **own, **more}
    kind = model_type if model_type in transformers.CONFIG_MAPPING else model_type.partition("-")[0]
    config = transformers.AutoConfig.for_model(kind, **sizes)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    scramble(model)
    model.save_pretrained(folder)
    return folder


def scramble(model: Any) -> None:
    """Draw weights so that every one matters: some rows and channels are several times larger than the others."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 1.2 / parameter.shape[-1] ** 0.5)
                parameter.view(-1, parameter.shape[-1])[::17] *= 2.5
            else:
                near = 0.0 if name.endswith("bias") or "gemma" in type(model).__name__.lower() else 1.0
                parameter.normal_(near, 0.25)
            if "recurrent_gate" in name:  # one minus the square of what is nearly one has few digits in float32
                parameter.mul_(0.1)


def differences(
    made: family_models.Built, length: int = 160, reference: Callable[[list[int]], np.ndarray] | None = None
) -> list[float]:
    """Hold prefills around a chunk's length, decode steps and a batch against transformers, in texts of ``length``
    tokens; return each difference over the largest |logit|. ``reference`` gives other logits than ``made.reference``.
    """
    ones, others = (np.random.default_rng(seed).integers(3, SIZES["vocab_size"], length).tolist() for seed in (5, 6))
    first, second = (reference or made.reference)(ones), (reference or made.reference)(others)
    session = made.session(2)
    found, wanted = [], []
    for size in (1, 17, family_models.CHUNK - 1, family_models.CHUNK, family_models.CHUNK + 1):
        sequence = session.add()
        found += [session.prefill(sequence, ones[:size])]
        steps = range(size, size + (STEPS if size == 17 else 1))
        found += [session.decode(sequence, ones[at]) for at in steps]
        wanted += list(first[size - 1 : steps[-1] + 1])
        session.remove(sequence)
    a, b = session.add(), session.add()
    found += list(session.batch_prefill({a: ones[:7], b: others[:5]}))
    wanted += [first[6], second[4]]
    for step in range(8):
        found += list(session.batch_decode({a: ones[7 + step], b: others[5 + step]}))
        wanted += [first[7 + step], second[5 + step]]
    found.append(session.prefill(b, others[13:]))
    wanted.append(second[-1])
    return [family_models.error(have, want) for have, want in zip(found, wanted, strict=True)]


def beside_float64(made: family_models.Built, length: int = 160) -> tuple[list[float], list[float]]:
    """Return :func:`differences` from transformers' logits in float64, and those of its float32 in the same texts."""
    moved: list[float] = []

    def exact(ids: list[int]) -> np.ndarray:
        wanted = made.reference(ids, double=True)
        moved.extend(map(family_models.error, made.reference(ids), wanted))
        return wanted

    return differences(made, length, exact), moved
