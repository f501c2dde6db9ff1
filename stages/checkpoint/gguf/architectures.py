"""Maps tensor names of GGUF files to those of checkpoints, by architecture, and undoes the converter's reordering.

llama.cpp's converter (convert_hf_to_gguf.py) renames tensors, turns the rows of a Llama's q and k from halves to pairs,
and those of GPT-NeoX's fused q, k and v from head by head to all q, all k, all v.
To the weights of Gemma's norms it adds the one that the model adds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_BLOCK = re.compile(r"blk\.(\d{1,6})\.([a-z_]+)\.(weight|bias)")
_TOP = re.compile(r"([a-z_]+)\.(weight|bias)")
ROPE_FACTORS = "rope_freqs.weight"  # the frequencies' divisors, which config.json has as rope_parameters


@dataclass(frozen=True)
class Architecture:
    """``model_type`` is transformers' name of it; names of modules, those of a layer behind the prefix ``layers``.

    Of modules in ``halves`` the rows of each head were moved from halves to pairs, of those in ``fused`` from head by
    head to all q, all k, all v. The file's norms are greater by ``norms_plus``.
    """

    model_type: str
    top: Mapping[str, str]
    layers: str
    layer: Mapping[str, str]
    halves: Sequence[str] = ()
    fused: Sequence[str] = ()
    norms_plus: float = 0.0

    def name(self, stored: str) -> str:
        """Return the checkpoint's name of the tensor ``stored`` of the file, empty if it has none."""
        if found := _BLOCK.fullmatch(stored):
            module, end = self.layer.get(found[2], ""), found[3]
            return f"{self.layers}.{int(found[1])}.{module}.{end}" if module else ""
        found = _TOP.fullmatch(stored)
        module = self.top.get(found[1], "") if found else ""
        return f"{module}.{found[2]}" if found and module else ""

    def moved(self, stored: str, rows: int, heads: int, kv_heads: int) -> list[int]:
        """Return [outer, a, b, inner]: the file has the ``rows`` as outer x a x b x inner where the checkpoint has
        outer x b x a x inner; empty if the order is the same.
        """
        found = _BLOCK.fullmatch(stored)
        module = found[2] if found else ""
        if module in self.halves:
            count = kv_heads if module == "attn_k" else heads
            return [count, rows // count // 2, 2, 1]
        return [1, 3, heads, rows // heads // 3] if module in self.fused else []

    def added(self, stored: str) -> float:
        """Return by how much the file's values are greater than the checkpoint's."""
        return self.norms_plus if stored.endswith("norm.weight") else 0.0


_DECODER_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_DECODER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA = _DECODER | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_LLAMA = Architecture("llama", _DECODER_TOP, "model.layers", _DECODER, halves=("attn_q", "attn_k"))
# general.architecture -> what it is; Mistral's models are llama there too.
ARCHITECTURES: dict[str, Architecture] = {
    "llama": _LLAMA,
    "qwen2": Architecture("qwen2", _DECODER_TOP, "model.layers", _DECODER),
    "qwen3": Architecture("qwen3", _DECODER_TOP, "model.layers", _DECODER),
    "gemma3": Architecture("gemma3_text", _DECODER_TOP, "model.layers", _GEMMA, norms_plus=1.0),
    "gptneox": Architecture(
        "gpt_neox",
        {"token_embd": "gpt_neox.embed_in", "output_norm": "gpt_neox.final_layer_norm", "output": "embed_out"},
        "gpt_neox.layers",
        {
            "attn_norm": "input_layernorm",
            "attn_qkv": "attention.query_key_value",
            "attn_output": "attention.dense",
            "ffn_norm": "post_attention_layernorm",
            "ffn_up": "mlp.dense_h_to_4h",
            "ffn_down": "mlp.dense_4h_to_h",
        },
        fused=("attn_qkv",),
    ),
}
