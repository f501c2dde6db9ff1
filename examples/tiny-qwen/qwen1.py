"""The example checkpoint's config, and its tensors' other names: first-generation Qwen is Qwen2 with fused q, k, v.

The mapping holds for contexts up to seq_length, where dynamic NTK scaling and log-n attention are the identity.
`mlp.w2` is the branch that goes through SiLU (`w1(x) * silu(w2(x))`), so w2 is Qwen2's gate_proj and w1 its up_proj.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

HERE = Path(__file__).resolve().parent
SHARDS = 2

CONFIG: dict[str, Any] = {
    "architectures": ["QWenLMHeadModel"],
    # As in published Qwen checkpoints; the code it names is not here and nothing needs it.
    "auto_map": {
        "AutoConfig": "configuration_qwen.QWenConfig",
        "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
    },
    "attn_dropout_prob": 0.0,
    "bf16": True,
    "emb_dropout_prob": 0.0,
    "hidden_size": 128,
    "initializer_range": 0.05,
    "intermediate_size": 704,  # twice the width of w1 and w2
    "kv_channels": 32,
    "layer_norm_epsilon": 1e-6,
    "max_position_embeddings": 512,
    "model_type": "qwen",
    "no_bias": True,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "seq_length": 512,
    "tie_word_embeddings": False,
    "tokenizer_class": "QWenTokenizer",
    "transformers_version": "4.32.0",
    "use_cache": True,
    "use_dynamic_ntk": True,
    "use_flash_attn": "auto",
    "use_logn_attn": True,
    "vocab_size": 1856,  # 1824 ids, the rest is padding
}

TOP = {"transformer.wte": "model.embed_tokens", "transformer.ln_f": "model.norm", "lm_head": "lm_head"}
LAYER = {
    "ln_1": "input_layernorm",
    "attn.c_proj": "self_attn.o_proj",
    "ln_2": "post_attention_layernorm",
    "mlp.w1": "mlp.up_proj",
    "mlp.w2": "mlp.gate_proj",
    "mlp.c_proj": "mlp.down_proj",
}


def new_qwen2() -> Qwen2ForCausalLM:
    """Return a freshly initialised float32 Qwen2 model of the example's shape."""
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=CONFIG["vocab_size"],
            hidden_size=CONFIG["hidden_size"],
            intermediate_size=CONFIG["intermediate_size"] // 2,
            num_hidden_layers=CONFIG["num_hidden_layers"],
            num_attention_heads=CONFIG["num_attention_heads"],
            num_key_value_heads=CONFIG["num_attention_heads"],
            max_position_embeddings=CONFIG["max_position_embeddings"],
            rope_parameters={"rope_type": "default", "rope_theta": CONFIG["rotary_emb_base"]},
            rms_norm_eps=CONFIG["layer_norm_epsilon"],
            initializer_range=CONFIG["initializer_range"],
            tie_word_embeddings=CONFIG["tie_word_embeddings"],
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def layer_names(index: int) -> dict[str, str]:
    """Return Qwen-1 weight name -> Qwen2 weight name of one layer, without the fused attention input."""
    theirs, ours = f"transformer.h.{index}", f"model.layers.{index}"
    return {f"{theirs}.{a}.weight": f"{ours}.{b}.weight" for a, b in LAYER.items()}


def from_qwen2(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a Qwen2 state dict under Qwen-1's names, in Qwen-1's order of modules."""
    fused = {"transformer.wte.weight": state["model.embed_tokens.weight"]}
    for i in range(CONFIG["num_hidden_layers"]):
        for kind in ("weight", "bias"):
            parts = [state[f"model.layers.{i}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            fused[f"transformer.h.{i}.attn.c_attn.{kind}"] = torch.cat(parts)
        fused |= {name: state[other] for name, other in layer_names(i).items()}
    return fused | {"transformer.ln_f.weight": state["model.norm.weight"], "lm_head.weight": state["lm_head.weight"]}


def to_qwen2(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return Qwen-1 tensors as a complete Qwen2 state dict in float32."""
    state = {f"{other}.weight": tensors[f"{name}.weight"] for name, other in TOP.items()}
    for i in range(CONFIG["num_hidden_layers"]):
        for kind in ("weight", "bias"):
            parts = tensors[f"transformer.h.{i}.attn.c_attn.{kind}"].split(CONFIG["hidden_size"])
            state |= {f"model.layers.{i}.self_attn.{p}_proj.{kind}": t for p, t in zip("qkv", parts, strict=True)}
        state |= {other: tensors[name] for name, other in layer_names(i).items()}
    return {name: tensor.float() for name, tensor in state.items()}


def save_tensors(tensors: dict[str, torch.Tensor]) -> None:
    """Write the tensors as bfloat16 shards of about equal size with their index."""
    tensors = {name: tensor.detach().bfloat16().contiguous() for name, tensor in tensors.items()}
    total = sum(tensor.nbytes for tensor in tensors.values())
    shards: list[dict[str, torch.Tensor]] = [{} for _ in range(SHARDS)]
    written = 0
    for name, tensor in tensors.items():
        shards[written * SHARDS // total][name] = tensor
        written += tensor.nbytes
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{SHARDS:05d}.safetensors"
        save_file(shard, HERE / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (HERE / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def load_tensors() -> dict[str, torch.Tensor]:
    """Return all tensors of the checkpoint as stored, by Qwen-1 name."""
    index = json.loads((HERE / "model.safetensors.index.json").read_text())
    return {k: v for file in sorted(set(index["weight_map"].values())) for k, v in load_file(HERE / file).items()}


def load_qwen2(tensors: dict[str, torch.Tensor]) -> Qwen2ForCausalLM:
    """Return a Qwen2 model in evaluation mode that computes in float32 with these Qwen-1 tensors."""
    model = new_qwen2()
    model.load_state_dict(to_qwen2(tensors), strict=True)
    return model.eval()
