"""Small sentencepiece models, trained here by sentencepiece, and a writer of its file for others."""

from __future__ import annotations

import functools
import io
import json
import struct
from typing import Any

from stages.tokenizers.proof.equality import sample_corpus

# What Llama 2 was trained with, but for the size.
LLAMA: dict[str, Any] = {
    "model_type": "bpe",
    "vocab_size": 700,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "byte_fallback": True,
    "split_digits": True,
    "allow_whitespace_only_pieces": True,
    "character_coverage": 0.99,
}
SYMBOLS = ["<sep>", "[REF]", "[REF][REF]", "=>"]
# Name -> what is unlike LLAMA.
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "no space before": {"add_dummy_prefix": False},
    "no bytes": {"byte_fallback": False, "vocab_size": 400, "character_coverage": 0.98},
    "spaces collapsed": {"remove_extra_whitespaces": True},
    "symbols": {"add_dummy_prefix": False, "user_defined_symbols": SYMBOLS},
    "runs of spaces": {
        "add_dummy_prefix": False,
        "user_defined_symbols": ["\n\n", "\u2581\u2581", "\u2581" * 4],
    },  # Gemma's
    "symbols after a space": {"user_defined_symbols": SYMBOLS[:2]},
    "digits": {"user_defined_symbols": [*"0123456789", "\t", "\n"]},
    "control tokens": {"control_symbols": ["[INST]", "[/INST]"], "pad_id": 3},
    "split by nothing": {"split_by_whitespace": False, "split_by_unicode_script": False, "split_digits": False},
    "unigram": {"model_type": "unigram"},
    "nmt_nfkc": {"normalization_rule_name": "nmt_nfkc"},
    "suffix": {"treat_whitespace_as_suffix": True},
    "word": {"model_type": "word"},
    # as T5, XLM-R and the Japanese GPT-NeoX have it, and as Gemma has its bytes
    "unigram nfkc": {
        "model_type": "unigram",
        "normalization_rule_name": "nmt_nfkc",
        "remove_extra_whitespaces": True,
        "byte_fallback": False,
        "user_defined_symbols": ["<sep>", "[REF]"],
    },
    "unigram bytes nfkc": {"model_type": "unigram", "normalization_rule_name": "nmt_nfkc"},
}


@functools.cache
def trained(name: str) -> bytes:
    """Train the model of that name on the sample corpus; about half a second."""
    import sentencepiece

    written = io.BytesIO()
    lines = (
        line for _, text in sample_corpus() for line in text[:2000].split("\n") if max(line, default="") < "\u0180"
    )
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_writer=written,
        minloglevel=2,
        num_threads=1,
        hard_vocab_limit=False,
        **{**LLAMA, **MODELS[name]},
    )
    return written.getvalue()


def field(number: int, value: float | bytes | str) -> bytes:
    """Write one field of a protocol buffer: an int as varint, a float as four bytes, anything else with its length."""
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data


def varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    written = bytearray()
    while value >= 0x80:
        written.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*written, value])


def model(pieces: list[tuple[str, float, int]], *, byte_fallback: bool = False, **normalizer: int) -> bytes:
    """Write a BPE model of (text, score, type); ``normalizer`` may say dummy_prefix, remove_extra, escape."""
    numbers = {"dummy_prefix": 3, "remove_extra": 4, "escape": 5}
    settings = {"dummy_prefix": 1, "remove_extra": 0, **normalizer}
    trainer = field(3, 2) + field(35, int(byte_fallback)) + field(43, -1)
    return b"".join(
        [
            *(field(1, field(1, text) + field(2, float(score)) + field(3, kind)) for text, score, kind in pieces),
            field(2, trainer),
            field(3, field(1, "identity") + b"".join(field(numbers[k], v) for k, v in settings.items())),
        ]
    )


META = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
BYTES = [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]


def runs_of_one_score() -> bytes:
    """A model as Mistral's: runs of spaces, up to sixteen, that all have the worst score there is."""
    words = ["▁a", "an", "▁an", "nd", "▁and", "aa", "aaa", "aba", "ab", "ba", "abab"]
    merged = [(word, -float(i), 1) for i, word in enumerate(words)]
    runs = [("▁" * n, -1e9, 1) for n in (2, 4, 8, 5, 16, 6, 12, 13, 10, 14, 3, 9, 7, 11)]
    characters = [(c, -1000.0 - i, 1) for i, c in enumerate("▁abnd")]
    return model([*META, *BYTES, *merged, *runs, *characters], byte_fallback=True)


@functools.cache
def tables() -> dict[str, Any]:
    """tokenizer.json of the trained "llama" as Llama 2's checkpoints have it, made by plain rules and not by us."""
    import sentencepiece

    loaded = sentencepiece.SentencePieceProcessor(model_proto=trained("llama"))
    texts = [loaded.id_to_piece(i) for i in range(loaded.vocab_size())]
    normal = {t: i for i, t in enumerate(texts) if i > 258}
    ranked = sorted((t for t in normal if len(t) > 1), key=lambda t: -loaded.get_score(normal[t]))
    cuts = [(t[:k], t[k:]) for t in ranked for k in range(1, len(t)) if t[:k] in normal and t[k:] in normal]
    flags = {"special": True, "normalized": False, "single_word": False, "lstrip": False, "rstrip": False}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    sequence = {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": texts[i], **flags} for i in range(3)],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, sequence],
            "pair": [],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, strip],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {t: i for i, t in enumerate(texts)},
            "merges": [f"{left} {right}" for left, right in cuts],
        },
    }


def metaspace_first() -> dict[str, Any]:
    """The same as newer conversions have it: Metaspace, which puts no space before a text that begins with one."""
    value = json.loads(json.dumps(tables()))
    value["normalizer"] = None
    value["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    return value
