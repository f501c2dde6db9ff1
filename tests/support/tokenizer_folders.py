"""Small checkpoints' tokenizer folders of every family, made from one trained vocabulary."""

from __future__ import annotations

import base64
import functools
import json
from pathlib import Path
from typing import Any

from stages.tokenizer_bundle import TokenizerBundle
from stages.tokenizers import EMBEDDINGS
from stages.tokenizers.formats.byte_level import spell
from stages.tokenizers.formats.patterns import LLAMA3, QWEN, TEKKEN
from tests.support import sentencepiece_models
from tests.support.local_context import LocalContext, run_stage
from tests.support.tiny_tokenizers import tiktoken_text, tiny_ranks

GPT2_PRE = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
PLAIN = {**GPT2_PRE, "use_regex": False}
DIGITS_PRE = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, GPT2_PRE]}


def split(pattern: str) -> dict[str, Any]:
    part = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [part, PLAIN]}


@functools.cache
def _tables() -> tuple[tuple[tuple[str, int], ...], tuple[tuple[str, str], ...]]:
    """The trained ranks as vocabulary and merges; the parents of a token are found as the trainer found them."""
    from stages.tokenizers.formats.ranks import derive_merges

    ranks = {token: rank for rank, token in enumerate(tiny_ranks())}
    merges = derive_merges(ranks, Path("tiny"))
    return tuple((spell(t), r) for t, r in ranks.items()), tuple((spell(a), spell(b)) for a, b in merges)


def vocab() -> dict[str, int]:
    return dict(_tables()[0])


def merges() -> list[list[str]]:
    return [list(pair) for pair in _tables()[1]]


SIZE = len(tiny_ranks())


def added(*contents: str, start: int = SIZE, **flags: Any) -> list[dict[str, Any]]:
    plain = {"special": True, "normalized": False, "single_word": False, "lstrip": False, "rstrip": False}
    return [{"id": start + i, "content": text, **plain, **flags} for i, text in enumerate(contents)]


def tables(**changes: Any) -> dict[str, Any]:
    """tokenizer.json as GPT-NeoX has it: two special tokens, then runs of spaces that are added but not special."""
    runs = added(*(" " * n for n in range(9, 1, -1)), start=SIZE + 2, special=False, normalized=True)
    model = {"type": "BPE", "dropout": None, "unk_token": None, "vocab": vocab(), "merges": merges()}
    value = {
        "version": "1.0",
        "added_tokens": [*added("<|endoftext|>", "<|padding|>"), *runs],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": GPT2_PRE,
        "post_processor": GPT2_PRE,
        "decoder": GPT2_PRE,
        "model": {**model, **changes.pop("model", {})},
    }
    return {**value, **changes}


def llama3_tables() -> dict[str, Any]:
    tokens = added("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>")
    template = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|begin_of_text|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [],
        "special_tokens": {
            "<|begin_of_text|>": {"id": "<|begin_of_text|>", "ids": [SIZE], "tokens": ["<|begin_of_text|>"]}
        },
    }
    return tables(
        added_tokens=tokens,
        normalizer=None,
        pre_tokenizer=split(LLAMA3),
        post_processor={"type": "Sequence", "processors": [PLAIN, template]},
        model={"ignore_merges": True},
    )


def world_text(tokens: tuple[bytes, ...] | None = None) -> bytes:
    """A file of RWKV World's form: strings where the bytes are UTF-8, bytes where they are not."""
    lines = []
    for index, token in enumerate(tokens or tiny_ranks(), 1):
        try:
            literal: str | bytes = token.decode()
        except UnicodeDecodeError:
            literal = token
        lines.append(f"{index} {literal!r} {len(token)}\n")
    return "".join(lines).encode()


def qwen2_folder() -> dict[str, Any]:
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    decoder = {str(SIZE + i): {"content": name, "special": True, "normalized": False} for i, name in enumerate(names)}
    return {
        "vocab.json": vocab(),
        "merges.txt": ("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges())).encode(),
        "tokenizer_config.json": {
            "tokenizer_class": "Qwen2Tokenizer",
            "added_tokens_decoder": decoder,
            "eos_token": "<|im_end|>",
            "chat_template": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        },
    }


def llama3_folder() -> dict[str, Any]:
    names = ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>")
    decoder = {str(SIZE + i): {"content": name, "special": True, "normalized": False} for i, name in enumerate(names)}
    return {
        "tokenizer.model": tiktoken_text(tiny_ranks()),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "added_tokens_decoder": decoder,
            "bos_token": "<|begin_of_text|>",
        },
    }


def tekken(specials: int = 10, **changes: Any) -> dict[str, Any]:
    """tekken.json, with tokens after those in use, as the published files have them."""
    entries = [{"rank": r, "token_bytes": base64.b64encode(t).decode()} for r, t in enumerate(tiny_ranks())]
    config = {
        "pattern": TEKKEN,
        "num_vocab_tokens": SIZE,
        "default_vocab_size": SIZE - 50 + specials,
        "default_num_special_tokens": specials,
        "version": "v11",
    }
    names = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]")
    stated = [{"rank": i, "token_str": text, "is_control": True} for i, text in enumerate(names)]
    return {"config": {**config, **changes.pop("config", {})}, "vocab": entries, "special_tokens": stated, **changes}


def with_class(name: str, value: dict[str, Any]) -> dict[str, Any]:
    return {"tokenizer.json": value, "tokenizer_config.json": {"tokenizer_class": name}}


# Name -> (files, model family, eos id): folders that must build.
FOLDERS: dict[str, tuple[dict[str, Any], str, int]] = {
    "neox": (with_class("GPTNeoXTokenizer", tables()), "gpt_neox", SIZE),
    "digits": (
        with_class("PreTrainedTokenizerFast", tables(normalizer=None, pre_tokenizer=DIGITS_PRE)),
        "llama",
        SIZE,
    ),
    "qwen2 tables": ({"tokenizer.json": tables(pre_tokenizer=split(QWEN))}, "qwen2", SIZE),
    "qwen2 vocab": (qwen2_folder(), "qwen2", SIZE + 2),
    "llama3 tables": (with_class("PreTrainedTokenizerFast", llama3_tables()), "llama", SIZE + 1),
    "llama3 model": (llama3_folder(), "llama", SIZE + 1),
    "sentencepiece": ({"tokenizer.model": sentencepiece_models.trained("control tokens")}, "mistral", 2),
    "sentencepiece modern": (
        {
            "tokenizer.model": sentencepiece_models.trained("llama"),
            "tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer", "legacy": False},
        },
        "mistral",
        2,
    ),
    "metaspace": (with_class("LlamaTokenizer", sentencepiece_models.tables()), "llama", 2),
    "metaspace first": (with_class("LlamaTokenizerFast", sentencepiece_models.metaspace_first()), "mistral", 2),
    "tekken": ({"tekken.json": tekken()}, "mistral", 2),
    "rwkv world": ({"rwkv_vocab_v20230424.txt": world_text()}, "rwkv", 0),
}


# What goes before every text.
PREFIXES = {"llama3 tables": [SIZE], "llama3 model": [SIZE]} | {
    name: [1] for name in ("sentencepiece", "sentencepiece modern", "metaspace", "metaspace first", "tekken")
}


def write_folder(directory: Path, files: dict[str, Any]) -> Path:
    """Write files by name: bytes as they are, a path as a link, anything else as JSON."""
    directory.mkdir(parents=True)
    for name, value in files.items():
        if isinstance(value, Path):
            (directory / name).symlink_to(value)
        else:
            data = value if isinstance(value, bytes) else json.dumps(value, ensure_ascii=False).encode()
            (directory / name).write_bytes(data)
    return directory


def write_facts(
    directory: Path, family: str, eos: int | None, rows: int = SIZE + 32, **generation: Any
) -> dict[str, Path]:
    """Write what config-parse would have of a model of ``family``; no ``eos`` where the model names none."""
    ends = [] if eos is None else [eos]
    shape = {"dtype": "BF16", "shape": [rows, 64], "file": "m.safetensors"}
    values = {
        "config": {"schema": 1, "family": family, "vocab_size": rows, "context_window": 512, "config": {}},
        "generation": {"schema": 1, "eos": ends, "stop": ends, "chat_format": None, **generation},
        "tensors": {"schema": 1, "tensors": {EMBEDDINGS[family]: shape}, "names": {}},
    }
    directory.mkdir(parents=True, exist_ok=True)
    for port, value in values.items():
        (directory / f"{port}.json").write_text(json.dumps(value), encoding="utf-8")
    return {port: directory / f"{port}.json" for port in values}


def build(folder: Path, files: dict[str, Any], family: str, eos: int | None, **facts: Any) -> tuple[LocalContext, Path]:
    """Write a folder, run the stage over it; return its context and the emitted directory."""
    checkpoint = write_folder(folder / "checkpoint", files)
    inputs = write_facts(folder / "facts", family, eos, **facts)
    ctx = run_stage(TokenizerBundle(), folder / "out", {"checkpoint": str(checkpoint)}, inputs)
    return ctx, folder / "out" / "tokenizer"
