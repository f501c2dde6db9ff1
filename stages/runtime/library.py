"""tokenizer.json through the tokenizers library, with what the runtime asks of a vocabulary."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

FILE = "tokenizer.json"


def _bytes_of_characters() -> dict[str, int]:
    """Return the byte-level alphabet: which byte each character of a token stands for."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return {chr(byte if byte in printable else next(others)): byte for byte in range(256)}


_BYTES = _bytes_of_characters()


class LibraryVocabulary:
    """Ids and text of one tokenizer.json.

    ``normalized`` says that text arrives in the form that the file's normalizer would give it, which costs time.
    ``specials`` are the special tokens: text -> (id, takes the white space before it, and after it).
    """

    def __init__(self, path: Path, *, normalized: bool = False) -> None:
        self._tokenizer: Tokenizer = Tokenizer.from_file(str(path))
        if normalized:
            self._tokenizer.normalizer = None
        self._tokenizer.encode_special_tokens = True  # text that spells a special token stays text
        added = self._tokenizer.get_added_tokens_decoder()
        self._added = {index: token.content.encode() for index, token in added.items()}
        self.specials = {t.content: (index, t.lstrip, t.rstrip) for index, t in added.items() if t.special}

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``, special tokens' spellings included as ordinary text."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def piece(self, index: int) -> bytes | None:
        """Return the bytes of an id; of a token outside the byte-level alphabet, its spelling in UTF-8."""
        token = self._tokenizer.id_to_token(index)
        if index in self._added or token is None:
            return self._added.get(index)
        if all(character in _BYTES for character in token):
            return bytes(_BYTES[character] for character in token)
        return token.encode()

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids`` without special tokens; bytes that are not UTF-8 become U+FFFD."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def stream(self) -> TextStream:
        """Return a decoder of ids that arrive one at a time."""
        return TextStream(self._tokenizer)


class TextStream:
    """Text of ids that arrive one at a time; a character whose bytes are still coming is held back."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._emitted = ""

    def step(self, token: int) -> str:
        """Return the text that ``token`` completes, which may be none."""
        self._ids.append(token)
        text = self._stream.step(self._tokenizer, token) or ""
        self._emitted += text
        return text

    def finish(self) -> str:
        """Return what was held back at the end: bytes that never became a character, as U+FFFD."""
        whole = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        return whole.removeprefix(self._emitted) if whole.startswith(self._emitted) else ""
