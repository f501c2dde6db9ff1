"""Tiny GGUF files, written by llama.cpp's own package from transformers' models, in its converter's order of rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

from tests.support import tokenizer_folders
from tests.support.family_models import LLAMA3, SIZES

HEADS, KV_HEADS = 6, 2
# Sizes of which all block types are: 256 values a row.
WIDE = {**SIZES, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "vocab_size": 1216}
GROUPED = {**WIDE, "num_key_value_heads": 2}
# Architecture -> transformers' prefix and config.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {**GROUPED, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
    "llama 3.1": ("Llama", {**GROUPED, "rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {**GROUPED, "sliding_window": 16, "head_dim": 64}),
    "qwen2": ("Qwen2", {**GROUPED, "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 32,
    }}),
    "qwen3": ("Qwen3", {**GROUPED, "head_dim": 32, "tie_word_embeddings": True}),
    "gemma3": ("Gemma3", {**GROUPED, "head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 16,
        "num_hidden_layers": 7, "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }}),
    "gptneox": ("GPTNeoX", {**WIDE, "rotary_pct": 0.25, "use_parallel_residual": False}),
}  # fmt: skip
CONFIGS = {"gemma3": "Gemma3TextConfig"}
NAMES = {"llama 3.1": "llama", "mistral": "llama"}


def model(case: str) -> Any:
    """transformers' model of random weights, in float32."""
    import torch
    import transformers

    prefix, config = CASES[case]
    torch.manual_seed(0)
    made = getattr(transformers, f"{prefix}ForCausalLM")(
        getattr(transformers, CONFIGS.get(case, f"{prefix}Config"))(**config)
    ).eval()
    for name, parameter in made.named_parameters():
        if name.endswith("bias") or "norm" in name:  # which are zeros and ones
            parameter.data += 0.1 * torch.randn_like(parameter)
    return made


def paired(rows: np.ndarray, heads: int) -> np.ndarray:
    """As LlamaModel.permute of convert_hf_to_gguf.py."""
    split = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return split.swapaxes(1, 2).reshape(rows.shape)


def joined(rows: np.ndarray, heads: int) -> np.ndarray:
    """As GPTNeoXModel.modify_tensors of convert_hf_to_gguf.py."""
    split = rows.reshape(heads, 3, -1, *rows.shape[1:])
    return np.concatenate([split[:, part].reshape(-1, *rows.shape[1:]) for part in range(3)])


def write(path: Path, case: str, kind: str = "F32", *, split_max_tensors: int = 0, **changes: Any) -> Any:
    """Write a model of the case with matrices of the type ``kind``; return transformers' model.

    ``changes`` replace or (None) leave out keys. With ``split_max_tensors`` several files are written of so many each.
    """
    made = model(case)
    config, architecture = made.config, NAMES.get(case, case)
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=split_max_tensors)
    values = metadata(config, architecture) | tokenizer() | changes
    for key, value in values.items():
        if value is not None:
            put(writer, key, value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], config.num_hidden_layers)
    for name, tensor in made.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        rows = tensor.numpy()
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            rows = paired(rows, config.num_key_value_heads if "k_proj" in name else config.num_attention_heads)
        if architecture == "gemma3" and "norm" in name:
            rows = rows + 1
        if "query_key_value" in name:
            rows = joined(rows, config.num_attention_heads)
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert stored, name
        outer = kind if kind == "F32" else "Q8_0"  # of the embedding and the head, which real files keep better
        put_tensor(writer, stored, rows, "F32" if rows.ndim == 1 else kind if "blk." in stored else outer)
    if case == "llama 3.1":
        writer.add_tensor("rope_freqs.weight", llama3_factors(config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return made


def put(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    kinds = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    kinds.get(type(value), writer.add_array)(key, value)


def put_tensor(writer: gguf.GGUFWriter, name: str, rows: np.ndarray, kind: str) -> None:
    """Add a tensor in a type; those that the package cannot quantize to are blocks of random bytes."""
    number = gguf.GGMLQuantizationType[kind]
    if kind in ("F32", "F16"):
        writer.add_tensor(name, rows.astype(np.float32 if kind == "F32" else np.float16))
        return
    try:
        data = gguf.quants.quantize(np.ascontiguousarray(rows, np.float32), number)
    except NotImplementedError:
        data = blocks(number, rows.shape)
    writer.add_tensor(name, data, raw_dtype=number)


def blocks(number: gguf.GGMLQuantizationType, shape: tuple[int, ...]) -> np.ndarray:
    """Blocks of random bytes below 64, so that what is read as float16 is a small number."""
    values, width = gguf.GGML_QUANT_SIZES[number]
    random = np.random.default_rng(int(number)).integers(0, 36, (*shape[:-1], shape[-1] // values * width))
    return random.astype(np.uint8)


def metadata(config: Any, architecture: str) -> dict[str, Any]:
    """The architecture's keys, as convert_hf_to_gguf.py writes them."""
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    found: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "rope.freq_base": float(rope["rope_theta"]),
    }
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if architecture == "gptneox":
        found["rope.dimension_count"] = int(head * rope["partial_rotary_factor"])
        found["use_parallel_residual"] = config.use_parallel_residual
        found["attention.layer_norm_epsilon"] = config.layer_norm_eps
    else:
        found["attention.head_count_kv"] = config.num_key_value_heads
        found["attention.layer_norm_rms_epsilon"] = config.rms_norm_eps
        found["attention.key_length"] = found["attention.value_length"] = head
    if rope["rope_type"] == "yarn":
        found["rope.scaling.type"], found["rope.scaling.factor"] = "yarn", rope["factor"]
        found["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    if rope["rope_type"] == "linear":
        found["rope.scaling.type"], found["rope.scaling.factor"] = "linear", rope["factor"]
    if config.model_type in ("mistral", "gemma3_text"):
        found["attention.sliding_window"] = config.sliding_window
    return {f"{architecture}.{key}": value for key, value in found.items()}


def llama3_factors(config: Any) -> np.ndarray:
    """As Llama's generate_extra_tensors of convert_hf_to_gguf.py."""
    rope, head = config.rope_parameters, config.hidden_size // config.num_attention_heads
    low, high, old = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    factors = []
    for frequency in 1.0 / rope["rope_theta"] ** (np.arange(0, head, 2) / head):
        length = 2 * np.pi / frequency
        smooth = (old / length - low) / (high - low)
        between = 1 / ((1 - smooth) / rope["factor"] + smooth)
        factors.append(1.0 if length < old / high else rope["factor"] if length > old / low else between)
    return np.array(factors, np.float32)


def tokenizer(pre: str = "llama-bpe") -> dict[str, Any]:
    """A byte-level vocabulary with two special tokens, and rows without a token to the end of the embedding."""
    vocab = [*tokenizer_folders.vocab()]
    tokens = [*vocab, "<|begin|>", "<|end|>"]
    unused = [f"[PAD{index}]" for index in range(len(tokens), WIDE["vocab_size"])]
    prefix = "tokenizer.ggml."
    return {
        f"{prefix}model": "gpt2",
        f"{prefix}pre": pre,
        f"{prefix}tokens": [*tokens, *unused],
        f"{prefix}token_type": [*[1] * len(vocab), 3, 3, *[5] * len(unused)],
        f"{prefix}merges": [" ".join(pair) for pair in tokenizer_folders.merges()],
        f"{prefix}bos_token_id": len(vocab),
        f"{prefix}eos_token_id": len(vocab) + 1,
        "tokenizer.chat_template": "{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}",
    }
