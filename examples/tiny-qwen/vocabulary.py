"""The example's vocabulary as the model sees it: text to ids and back, with the tiktoken library.

First-generation Qwen keeps its special tokens in code: they follow the ranks of the file, in this order.
"""

from __future__ import annotations

import base64
import lzma
import unicodedata
from functools import cache
from pathlib import Path

import tiktoken

HERE = Path(__file__).resolve().parent
TEXT = HERE / "text"
VOCABULARY = HERE / "qwen.tiktoken"

END_OF_TEXT = "<|endoftext|>"
SPECIALS = (END_OF_TEXT, "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@cache
def encoding() -> tiktoken.Encoding:
    """Return the encoding of qwen.tiktoken with the special tokens behind its ranks."""
    lines = VOCABULARY.read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}
    specials = {token: len(ranks) + i for i, token in enumerate(SPECIALS)}
    return tiktoken.Encoding("tiny-qwen", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=specials)


def encode(text: str) -> list[int]:
    """Return the ids of a text as QWenTokenizer gives them: NFC first, special tokens recognised."""
    return encoding().encode(unicodedata.normalize("NFC", text), allowed_special="all")


def decode(ids: list[int]) -> str:
    """Return the text of the ids; incomplete characters become U+FFFD."""
    return encoding().decode(ids)


def read_text(name: str) -> str:
    """Return a text of the split; the training text is stored compressed."""
    path = TEXT / name
    data = path.read_bytes()
    return (lzma.decompress(data) if path.suffix == ".xz" else data).decode("utf-8")


def read_documents(name: str) -> list[list[int]]:
    """Return the token ids of every document of a text, each ended by <|endoftext|>."""
    end = encoding().encode_single_token(END_OF_TEXT)
    documents = read_text(name).split(f"{END_OF_TEXT}\n")
    return [[*encode(document.removesuffix("\n")), end] for document in documents]
