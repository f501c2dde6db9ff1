"""Tiny random checkpoints in Hugging Face format, written without the libraries that the stages are checked against."""

from __future__ import annotations

import base64
import json
import math
from collections import Counter
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

SPECIALS = 208  # <|endoftext|>, <|im_start|>, <|im_end|>, <|extra_0|> .. <|extra_204|>
DTYPES = {"bfloat16": ("BF16", ml_dtypes.bfloat16), "float16": ("F16", np.float16), "float32": ("F32", np.float32)}
MERGE_TEXT = """
The old lighthouse keeper walked slowly down the narrow path to the sea, carrying a lamp and three empty baskets.
Every morning she counted the boats that came home, wrote their names in a small blue book, and made strong tea.
When winter storms threw waves over the wall, nobody could sleep; people sang quietly until the wind grew tired.
"""


def write_qwen(
    folder: Path,
    *,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 2,
    ff: int = 96,
    ranks: int = 300,
    rows: int | None = None,
    dtype: str = "bfloat16",
    seed: int = 0,
    **config_overrides: Any,
) -> Path:
    """Write a first-generation Qwen checkpoint of random weights: two shards, index, configs, tiktoken vocabulary.

    ``ff`` is the width of one MLP branch (config.json says twice that), ``ranks`` the number of plain tokens; the
    208 special tokens follow and ``rows`` pads the embedding, by default to a multiple of 64. ``config_overrides``
    replace keys of config.json (a value of ``...`` removes one) without changing the tensors.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = rows or -(-(ranks + SPECIALS) // 64) * 64
    config = qwen_config(hidden=hidden, layers=layers, heads=heads, ff=ff, rows=rows, dtype=dtype)
    config = {key: value for key, value in {**config, **config_overrides}.items() if value is not ...}
    write_json(folder / "config.json", config)
    chat = {"chat_format": "chatml", "eos_token_id": ranks, "pad_token_id": ranks, "max_window_size": 6144}
    sampling = {"do_sample": True, "top_k": 0, "top_p": 0.8, "max_new_tokens": 512, "transformers_version": "4.31.0"}
    write_json(folder / "generation_config.json", {**chat, **sampling})
    auto_map = {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]}
    tokenizer = {"model_max_length": 512, "tokenizer_class": "QWenTokenizer", "auto_map": auto_map}
    write_json(folder / "tokenizer_config.json", tokenizer)
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(bpe_tokens(ranks))]
    (folder / "qwen.tiktoken").write_bytes(b"".join(lines))
    write_shards(folder, qwen_tensors(hidden, layers, ff, rows, seed), dtype)
    return folder


def qwen_config(*, hidden: int, layers: int, heads: int, ff: int, rows: int, dtype: str) -> dict[str, Any]:
    names = {"AutoConfig": "configuration_qwen.QWenConfig", "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel"}
    return {
        "architectures": ["QWenLMHeadModel"],
        "auto_map": names,
        "attn_dropout_prob": 0.0,
        "bf16": dtype == "bfloat16",
        "emb_dropout_prob": 0.0,
        "hidden_size": hidden,
        "intermediate_size": 2 * ff,
        "initializer_range": 0.02,
        "kv_channels": hidden // heads,
        "layer_norm_epsilon": 1e-6,
        "max_position_embeddings": 512,
        "model_type": "qwen",
        "no_bias": True,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "rotary_emb_base": 10000,
        "rotary_pct": 1.0,
        "scale_attn_weights": True,
        "seq_length": 512,
        "tie_word_embeddings": False,
        "tokenizer_class": "QWenTokenizer",
        "torch_dtype": dtype,
        "transformers_version": "4.32.0",
        "use_cache": True,
        "use_dynamic_ntk": True,
        "use_flash_attn": "auto",
        "use_logn_attn": True,
        "vocab_size": rows,
    }


def qwen_tensors(hidden: int, layers: int, ff: int, rows: int, seed: int) -> dict[str, np.ndarray]:
    """Return random float32 tensors by checkpoint name, scaled so that logits spread over a few units."""
    random = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return (random.standard_normal(shape) / math.sqrt(shape[-1])).astype(np.float32)

    def near_one(size: int) -> np.ndarray:
        return (1 + 0.1 * random.standard_normal(size)).astype(np.float32)

    tensors = {"transformer.wte.weight": normal(rows, hidden)}
    for i in range(layers):
        block = f"transformer.h.{i}"
        tensors[f"{block}.ln_1.weight"] = near_one(hidden)
        tensors[f"{block}.attn.c_attn.weight"] = normal(3 * hidden, hidden)
        tensors[f"{block}.attn.c_attn.bias"] = normal(3 * hidden)
        tensors[f"{block}.attn.c_proj.weight"] = normal(hidden, hidden)
        tensors[f"{block}.ln_2.weight"] = near_one(hidden)
        tensors[f"{block}.mlp.w1.weight"] = normal(ff, hidden)
        tensors[f"{block}.mlp.w2.weight"] = normal(ff, hidden)
        tensors[f"{block}.mlp.c_proj.weight"] = normal(hidden, ff)
    tensors["transformer.ln_f.weight"] = near_one(hidden)
    tensors["lm_head.weight"] = 3 * normal(rows, hidden)
    return tensors


def write_shards(folder: Path, tensors: Mapping[str, np.ndarray], dtype: str, shards: int = 2) -> None:
    """Write ``tensors`` as safetensors shards of about equal tensor counts, and their index."""
    names = list(tensors)
    size = -(-len(names) // shards)
    weight_map = {}
    for number, start in enumerate(range(0, len(names), size), start=1):
        file = f"model-{number:05d}-of-{shards:05d}.safetensors"
        write_safetensors(folder / file, {name: tensors[name] for name in names[start : start + size]}, dtype)
        weight_map.update(dict.fromkeys(names[start : start + size], file))
    total = sum(tensor.size for tensor in tensors.values()) * np.dtype(DTYPES[dtype][1]).itemsize
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray], dtype: str) -> None:
    code, numpy_dtype = DTYPES[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    payload, offset = [], 0
    for name, tensor in tensors.items():
        data = np.ascontiguousarray(tensor.astype(numpy_dtype)).tobytes()
        header[name] = {
            "dtype": code,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + len(data)],
        }
        payload.append(data)
        offset += len(data)
    write_raw_safetensors(path, json.dumps(header).encode(), b"".join(payload))


def write_raw_safetensors(path: Path, header: bytes, payload: bytes) -> None:
    path.write_bytes(len(header).to_bytes(8, "little") + header + payload)


def bpe_tokens(count: int) -> list[bytes]:
    """Return ``count`` tokens in rank order: every byte, then merges trained on a few sentences."""
    words = Counter(tuple(bytes([b]) for b in word.encode()) for word in MERGE_TEXT.replace(" ", "\n ").split("\n"))
    tokens = [bytes([b]) for b in range(256)]
    while len(tokens) < count:
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for word, times in words.items():
            pairs.update({pair: times * n for pair, n in Counter(pairwise(word)).items()})
        if not pairs:
            raise ValueError(f"the training sentences give only {len(tokens)} tokens, not {count}")
        left, right = max(pairs, key=lambda pair: (pairs[pair], pair))
        tokens.append(left + right)
        words = Counter({_merged(word, left, right): times for word, times in words.items()})
    return tokens


def _merged(word: tuple[bytes, ...], left: bytes, right: bytes) -> tuple[bytes, ...]:
    out: list[bytes] = []
    for part in word:
        if out and out[-1] == left and part == right:
            out[-1] = left + right
        else:
            out.append(part)
    return tuple(out)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_hollow(folder: Path, config: Mapping[str, Any]) -> Path:
    """Write a config and a file with a true header and a hole for weights: enough for all that only looks at shapes."""
    from stages.models import TRACED, load_family, native

    family = load_family(config["model_type"] if native(config["model_type"]) else TRACED)
    entries, end = {}, 0
    for parameter in family.params(family.parse(dict(config))):
        for name, shape in zip(parameter.sources, parameter.source_shapes, strict=True):
            begin, end = end, end + 2 * math.prod(shape)
            entries[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [begin, end]}
    folder.mkdir(parents=True)
    write_json(folder / "config.json", dict(config))
    header = json.dumps(entries).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)
    return folder
