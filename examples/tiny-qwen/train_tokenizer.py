"""Train the byte-pair vocabulary of the example model on its training text and write qwen.tiktoken.

The file is in tiktoken's form (base64 token, rank); all 256 bytes come first, and NFC and Qwen's pre-tokenizer pattern
(which keeps digits single) bound what may be merged.

    python examples/tiny-qwen/train_tokenizer.py
"""

from __future__ import annotations

import base64
import json

from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE
from vocabulary import END_OF_TEXT, PATTERN, VOCABULARY, encode, read_text

RANKS = 1616


def byte_of_character() -> dict[str, int]:
    """Return the byte behind each character of byte-level BPE (printable ones stand for themselves)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def train_ranks(text: str) -> dict[bytes, int]:
    """Return the learnt tokens with their ranks: bytes first, then merges in the order they were learnt."""
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=RANKS, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(text.split(f"{END_OF_TEXT}\n"), trainer)
    byte_of = byte_of_character()
    vocabulary = json.loads(tokenizer.to_str())["model"]["vocab"]
    return {bytes(byte_of[c] for c in token): rank for token, rank in vocabulary.items()}


def main() -> None:
    """Train, write, and check that the text survives encoding."""
    text = read_text("train.txt.xz")
    ranks = train_ranks(text)
    assert sorted(ranks.values()) == list(range(RANKS))
    assert all(bytes([byte]) in ranks for byte in range(256))
    ordered = sorted(ranks.items(), key=lambda item: item[1])
    VOCABULARY.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ordered))
    ids = encode(text)
    print(f"{RANKS} ranks; {len(ids)} tokens, {len(text.encode()) / len(ids):.2f} bytes per token")


if __name__ == "__main__":
    main()
