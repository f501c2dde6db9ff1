"""The tokenizer of a GGUF file as the files in Hugging Face format that it was made of, read from its metadata.

``gpt2`` becomes a tokenizer.json: how text is split is known by the name in ``tokenizer.ggml.pre`` alone, and means
what llama.cpp makes of it (llama-vocab.cpp). ``llama`` becomes a tokenizer.model, of which the file has the pieces,
their scores and types.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stages.checkpoint.gguf import container
from stages.checkpoint.strict_json import shown
from stages.tokenizers.errors import TokenizerError
from stages.tokenizers.formats.json_tables import first_twice
from stages.tokenizers.formats.metaspace import SPACE
from stages.tokenizers.formats.patterns import GPT2, LLAMA3, QWEN, TEKKEN
from stages.tokenizers.formats.sentencepiece_model import BPE, BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from stages.documents.files import JsonObject

KIND = "tokenizer.ggml.model"
# tokenizer.ggml.model -> the family of the files that it becomes.
FAMILIES = {"gpt2": "tokenizer-json", "llama": "sentencepiece"}
DIGIT = r"\p{N}"
DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", DIGIT)


@dataclass(frozen=True)
class Pre:
    """How text is split: by each of the patterns in turn. ``whole`` takes a token of the vocabulary as it is, whatever
    its merges; ``begins`` puts bos before a text where the file does not say.
    """

    patterns: Sequence[str]
    nfc: bool = False
    whole: bool = False
    begins: bool = False


_LLAMA3 = Pre((LLAMA3,), whole=True, begins=True)
# tokenizer.ggml.pre -> what it means. NFC is the model's own where its only published tokenizer has it; llama.cpp
# leaves it out.
PRE: dict[str, Pre] = {
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "lfm2"), _LLAMA3),
    **dict.fromkeys(("smaug-bpe", "dbrx"), Pre((LLAMA3,))),
    **dict.fromkeys(("gpt-2", "phi-2", "jais", "trillion", "granite-docling"), Pre((GPT2,))),
    **dict.fromkeys(("olmo", "mpt"), Pre((GPT2,), nfc=True)),  # GPT-NeoX's
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), Pre((DIGIT, GPT2))),
    "qwen2": Pre((QWEN,), nfc=True),
    **dict.fromkeys(("deepseek-r1-qwen", "megrez", "stablelm2"), Pre((QWEN,))),
    "deepseek-coder": Pre(DEEPSEEK_CODER),
    "tekken": Pre((TEKKEN,), whole=True, begins=True),
}


def family(path: Path) -> str:
    """Return the family of the files that the file at ``path`` becomes, told from its first keys; empty if of none."""
    try:
        named = container.peek(path, (KIND,)).get(KIND)
    except (OSError, ValueError):
        return ""
    return FAMILIES.get(named, "") if isinstance(named, str) else ""


def write(path: Path, folder: Path) -> dict[str, Path]:
    """Write the tokenizer's files to ``folder``; return where they are by name.

    :class:`TokenizerError` for a file that is damaged or has a tokenizer that is not read.
    """
    try:
        read = _Metadata(container.read(path, path.name).metadata)
        kind = read.metadata.get(KIND)
        if kind not in FAMILIES:
            raise ValueError(f"{KIND} = {shown(kind)}; of GGUF files, the tokenizers {', '.join(FAMILIES)} are read")
        files: dict[str, bytes] = {}
        if kind == "gpt2":
            files["tokenizer.json"] = _json(_byte_level(read))
        else:
            files["tokenizer.model"] = _sentencepiece(read)
        files["tokenizer_config.json"] = _json(_config(read))
    except ValueError as error:
        raise TokenizerError(f"{path}: {str(error).removeprefix(f'{path.name}: ')}") from None
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return {name: folder / name for name in files}


def _json(document: Any) -> bytes:
    return json.dumps(document, ensure_ascii=False).encode("utf-8")


class _Metadata:
    """The keys of a tokenizer, each of the type that it must have."""

    def __init__(self, metadata: JsonObject) -> None:
        self.metadata = metadata
        tokens = self.list("tokens", str)
        if not tokens:
            raise ValueError("tokenizer.ggml.tokens is missing: the file has no vocabulary")
        types = self.list("token_type", int) or [NORMAL] * len(tokens)
        if len(types) != len(tokens):
            raise ValueError(f"tokenizer.ggml.token_type has {len(types):,} values for {len(tokens):,} tokens")
        wrong = sorted({kind for kind in types if not NORMAL <= kind <= BYTE})
        if wrong:
            raise ValueError(f"tokenizer.ggml.token_type has {wrong[0]}; expected {NORMAL} to {BYTE}")
        while types and types[-1] == UNUSED:  # rows of the embedding that no token has
            types.pop()
        self.tokens, self.types = tokens[: len(types)], types

    def list(self, key: str, kind: type) -> list[Any]:
        value = self.metadata.get(f"tokenizer.ggml.{key}", [])
        if not isinstance(value, list) or not all(type(each) is kind for each in value):
            raise ValueError(f"tokenizer.ggml.{key} = {shown(value)}; expected a list of {kind.__name__}")
        return [*value]

    def flag(self, key: str, default: bool) -> bool:
        return bool(self.metadata.get(f"tokenizer.ggml.{key}", default))

    def id(self, role: str) -> int | None:
        """Return the id of a role; none of one that is no token."""
        value = self.metadata.get(f"tokenizer.ggml.{role}_token_id")
        return value if type(value) is int and 0 <= value < len(self.tokens) else None

    def pre(self) -> Pre:
        """Return how text is split."""
        named = self.metadata.get("tokenizer.ggml.pre")
        if not isinstance(named, str) or named not in PRE:
            problem = (
                "is missing: an old converter wrote the file" if named is None else f"= {shown(named)} is not known"
            )
            raise ValueError(
                f"tokenizer.ggml.pre {problem}, and nothing else says how text is split; known: {', '.join(PRE)}"
            )
        return PRE[named]

    def begins(self) -> bool:
        """Say whether bos goes before every text."""
        return self.flag("add_bos_token", self.pre().begins if self.metadata[KIND] == "gpt2" else True)


def _config(read: _Metadata) -> JsonObject:
    """Return tokenizer_config.json: roles, what goes around a text, and the chat templates."""
    roles = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "sep": "seperator", "mask": "mask"}
    found: dict[str, Any] = {
        f"{role}_token": read.tokens[index] for role, key in roles.items() if (index := read.id(key)) is not None
    }
    byte_level = read.metadata[KIND] == "gpt2"
    found["tokenizer_class"] = "PreTrainedTokenizerFast" if byte_level else "LlamaTokenizer"
    found["clean_up_tokenization_spaces"] = False
    found["add_bos_token"], found["add_eos_token"] = read.begins(), read.flag("add_eos_token", False)
    if not byte_level:
        # llama.cpp puts a space after each special token, too.
        found |= {"legacy": True, "add_prefix_space": read.flag("add_space_prefix", True)}
    template = read.metadata.get("tokenizer.chat_template")
    begins = "tokenizer.chat_template."
    others = [{"name": k.removeprefix(begins), "template": v} for k, v in read.metadata.items() if k.startswith(begins)]
    if template is not None and others:
        found["chat_template"] = [{"name": "default", "template": template}, *others]
    elif template is not None:
        found["chat_template"] = template
    return found


def _byte_level(read: _Metadata) -> JsonObject:
    """Return tokenizer.json."""
    pre = read.pre()
    added = [
        {
            "id": index,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind != USER_DEFINED,
        }
        for index, (token, kind) in enumerate(zip(read.tokens, read.types, strict=True))
        if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    if len(set(read.tokens)) != len(read.tokens):
        raise ValueError(
            f"T05: the token {shown(first_twice(read.tokens))} is there more than once in tokenizer.ggml.tokens"
        )
    pairs = [merge.split(" ") for merge in read.list("merges", str)]
    wrong = next((pair for pair in pairs if len(pair) != 2), None)
    if wrong:
        raise ValueError(f"tokenizer.ggml.merges has {shown(' '.join(wrong))}; expected two parts with a space between")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if pre.nfc else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": _splits(pre)},
        "post_processor": _around(read),
        "decoder": _BYTES,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre.whole,
            "vocab": {token: index for index, token in enumerate(read.tokens)},
            "merges": pairs,
        },
    }


_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def _splits(pre: Pre) -> list[JsonObject]:
    parts: list[JsonObject] = []
    for pattern in pre.patterns:
        if pattern == DIGIT:
            parts.append({"type": "Digits", "individual_digits": True})
        else:
            by = {"pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
            parts.append({"type": "Split", **by})
    return [*parts, _BYTES]


def _around(read: _Metadata) -> JsonObject:
    """Return what puts bos before a text, and eos after it, if the file says so."""
    ids = {role: read.id(role) for role in ("bos", "eos")}
    wanted = {"bos": read.begins(), "eos": read.flag("add_eos_token", False)}
    tokens = {role: read.tokens[index] for role, index in ids.items() if index is not None and wanted[role]}
    if not tokens:
        return {**_BYTES, "trim_offsets": False}
    before, after = ([{"SpecialToken": {"id": tokens[r], "type_id": 0}}] if r in tokens else [] for r in ("bos", "eos"))
    sequence = {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [*before, sequence, *after],
        "pair": [*before, sequence, {"Sequence": {"id": "B", "type_id": 0}}, *after],
        "special_tokens": {text: {"id": text, "ids": [ids[role]], "tokens": [text]} for role, text in tokens.items()},
    }


def _sentencepiece(read: _Metadata) -> bytes:
    """Return tokenizer.model: the messages and fields of sentencepiece_model.proto that decide ids."""
    scores = read.list("scores", float)[: len(read.tokens)]
    if len(scores) != len(read.tokens):
        raise ValueError(f"tokenizer.ggml.scores has {len(scores):,} values for {len(read.tokens):,} tokens")
    types, unknown = [*read.types], read.id("unknown")
    if UNKNOWN not in types and unknown is not None:
        types[unknown] = UNKNOWN  # where tokenizer.json says of all its special tokens that they are such
    data = bytearray()
    for token, score, kind in zip(read.tokens, scores, types, strict=True):
        # The converter writes the symbols that users have added with the spaces that they stand for.
        text = token.replace(" ", SPACE) if kind == USER_DEFINED else token
        piece = _field(1, text.encode("utf-8")) + b"\x15" + struct.pack("<f", score) + _field(3, kind)
        data += _field(1, piece)
    roles = {40: types.index(UNKNOWN) if UNKNOWN in types else -1}
    roles |= {
        number: -1 if (index := read.id(role)) is None else index
        for number, role in ((41, "bos"), (42, "eos"), (43, "padding"))
    }
    trainer = _field(3, BPE) + _field(35, int(BYTE in read.types))
    trainer += b"".join(_field(number, index) for number, index in roles.items())
    normalizer = _field(1, b"identity") + _field(3, int(read.flag("add_space_prefix", True)))
    normalizer += _field(4, int(read.flag("remove_extra_whitespaces", False))) + _field(5, 1)
    return bytes(data + _field(2, trainer) + _field(3, normalizer))


def _field(number: int, value: int | bytes) -> bytes:
    """Return a field of the wire format: a varint, or bytes with their length."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value % 2**64)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    data = bytearray()
    while value >= 0x80:
        data.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*data, value])
