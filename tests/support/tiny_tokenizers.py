"""Small tokenizer checkpoints for tests: a vocabulary trained here, and the artifacts that config-parse would write."""

from __future__ import annotations

import base64
import functools
import json
from pathlib import Path
from typing import Any

from stages.tokenizers.formats.byte_level import unspell
from stages.tokenizers.proof.equality import sample_corpus
from stages.tokenizers.resolution import Resolution, resolve

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
SPECIALS = 208
EMBEDDING = "transformer.wte.weight"
QWEN_CONFIG = {
    "model_max_length": 8192,
    "tokenizer_class": "QWenTokenizer",
    "auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]},
}


@functools.cache
def tiny_ranks() -> tuple[bytes, ...]:
    """Train about 1,200 tokens on the sample corpus: the 256 bytes, then the merges in the order they were found."""
    from tokenizers import Regex, Tokenizer, pre_tokenizers
    from tokenizers.models import BPE
    from tokenizers.trainers import BpeTrainer

    from stages.tokenizers.families.tiktoken_qwen import PATTERN

    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        (text for _, text in sample_corpus()),
        BpeTrainer(vocab_size=1200, initial_alphabet=alphabet, show_progress=False),
    )
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    tokens = [bytes([byte]) for byte in range(256)] + [unspell(left) + unspell(right) for left, right in merges]
    return tuple(dict.fromkeys(tokens))


def tiktoken_text(tokens: tuple[bytes, ...] | list[bytes]) -> bytes:
    """Write tokens as a tiktoken file, rank by position."""
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens))


def write_checkpoint(directory: Path, vocabulary: bytes | Path | None = None, **files: dict[str, Any]) -> Path:
    """Write a Qwen tokenizer folder; ``files`` replaces or adds JSON files by stem."""
    directory.mkdir(parents=True)
    if isinstance(vocabulary, Path):
        (directory / "qwen.tiktoken").symlink_to(vocabulary)
    else:
        (directory / "qwen.tiktoken").write_bytes(tiktoken_text(tiny_ranks()) if vocabulary is None else vocabulary)
    for stem, value in {"tokenizer_config": QWEN_CONFIG, **files}.items():
        (directory / f"{stem}.json").write_text(json.dumps(value), encoding="utf-8")
    return directory


def resolved(path: Path) -> Resolution:
    """Resolve a folder that holds one vocabulary file, named as it must be."""
    return resolve(path.parent, {path.name: path})


def write_inputs(directory: Path, ranks: int, rows: int | None = None, **generation: Any) -> dict[str, Path]:
    """Write model.json, generation.json and tensors.json of a Qwen model whose vocabulary has ``ranks`` ranks."""
    rows = ranks + SPECIALS + 16 if rows is None else rows
    values = {
        "config": {"schema": 1, "family": "qwen", "vocab_size": rows, "context_window": 512, "config": {}},
        "generation": {
            "schema": 1,
            "bos": None,
            "eos": [ranks],
            "pad": ranks,
            "stop": [ranks],
            "chat_format": "chatml",
            **generation,
        },
        "tensors": {
            "schema": 1,
            "tensors": {EMBEDDING: {"dtype": "BF16", "shape": [rows, 64], "file": "m.safetensors"}},
            "names": {},
        },
    }
    directory.mkdir(parents=True, exist_ok=True)
    for port, value in values.items():
        (directory / f"{port}.json").write_text(json.dumps(value), encoding="utf-8")
    return {port: directory / f"{port}.json" for port in values}
