"""tokenizer.json through the tokenizers library, with what the runtime asks of a vocabulary."""

from __future__ import annotations

import re
import threading
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel
from tokenizers.pre_tokenizers import Metaspace

from stages.runtime.errors import RequestError
from stages.runtime.stream import TextStream

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

FILE = "tokenizer.json"
SPACE = "\u2581"  # how a vocabulary over characters writes the space
WINDOW = 8
_KIND = re.compile(rb'"type":"(\w+)"')
_CHARACTERS = {b"Sequence", b"Replace", b"Fuse"}
# The decoders that give each id its bytes, whatever stands beside it; but for one space that leads the text (Strip).
_BY_PIECES = [{b"ByteLevel"}, *(_CHARACTERS | more for more in ({b"ByteFallback"}, {b"ByteFallback", b"Strip"}))]
_BY_PIECES += [_CHARACTERS, _CHARACTERS | {b"Strip"}]
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


def _bytes_of_characters() -> dict[str, int]:
    """Return the byte-level alphabet: which byte each character of a token stands for."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return {chr(byte if byte in printable else next(others)): byte for byte in range(256)}


_BYTES = _bytes_of_characters()


def _state(part: Any) -> bytes:
    """Return what a part of the library's pipeline is, as the JSON that it has in the file."""
    return b"" if part is None else part.__getstate__()


def _without_lead(pre_tokenizer: Any) -> Any:
    """Return a pre-tokenizer that puts no space before a text."""
    other = Metaspace()
    other.__setstate__(_state(pre_tokenizer).replace(b'"prepend_scheme":"first"', b'"prepend_scheme":"never"'))
    return other


class _Window:
    """The bytes that an id adds to the text of the last few: for decoders that are more than the bytes of each id."""

    def __init__(self, decode: Callable[[Sequence[int]], str], ids: list[int]) -> None:
        self._decode, self._ids, self._text = decode, ids, decode(ids)

    def piece(self, index: int) -> bytes:
        self._ids.append(index)
        text = self._decode(self._ids)
        if text.endswith("\ufffd"):  # perhaps a character whose bytes are still coming
            return b""
        new = text[len(self._text) :]
        self._ids = self._ids[-WINDOW:]
        self._text = self._decode(self._ids)
        return new.encode()


class LibraryVocabulary:
    """Ids and text of the ``content`` of one tokenizer.json.

    ``normalized`` says that text arrives in the form that the file's normalizer would give it, which costs time;
    ``shown`` are special tokens that decode to their text.
    ``specials`` are the special tokens: text -> (id, takes the white space before it, and after it); ``added`` are
    all that are not the model's own: text -> (id, special).
    """

    def __init__(self, content: bytes, *, normalized: bool = False, shown: Sequence[int] = ()) -> None:
        self._tokenizer: Tokenizer = Tokenizer.from_buffer(content)
        if normalized:
            self._tokenizer.normalizer = None
        self._tokenizer.encode_special_tokens = True  # text that spells a special token stays text
        self._byte_level = isinstance(self._tokenizer.decoder, ByteLevel)
        self._by_pieces = set(_KIND.findall(_state(self._tokenizer.decoder))) in _BY_PIECES
        self._strips = b'"Strip"' in _state(self._tokenizer.decoder)
        self._leads_text = b'"prepend_scheme":"first"' in _state(self._tokenizer.pre_tokenizer)
        self._taking_turns = threading.Lock()  # where the pre-tokenizer is changed for a text
        added = self._tokenizer.get_added_tokens_decoder()
        self.specials = {t.content: (index, t.lstrip, t.rstrip) for index, t in added.items() if t.special}
        self.added = {token.content: (index, token.special) for index, token in added.items()}
        self._pieces: dict[int, bytes | None] = {}  # those that were asked for
        self._silent = {index for index, token in added.items() if token.special} - {*shown}

    def encode(self, text: str, *, start: bool = True) -> list[int]:
        """Return the ids of ``text``, special tokens' spellings included as ordinary text.

        ``start`` says that nothing comes before it: some vocabularies put a space before the whole text only.
        """
        if not self._leads_text:
            return self._encoded(text)
        with self._taking_turns:
            usual = self._tokenizer.pre_tokenizer
            if not start:
                self._tokenizer.pre_tokenizer = _without_lead(usual)
            try:
                return self._encoded(text)
            finally:
                if not start:
                    self._tokenizer.pre_tokenizer = usual

    def _encoded(self, text: str) -> list[int]:
        try:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        except BaseException as error:
            # The library's patterns give up on text that makes them search for too long, by a panic of Rust.
            if type(error).__name__ != "PanicException":
                raise
            raise RequestError(f"the tokenizer cannot split this text: {str(error)[:200]}") from None
        return ids

    def encode_plain(self, text: str) -> list[int]:
        """Return the ids of ``text`` by the model alone: nothing in it is an added token, of whatever kind."""
        tokenizer = self._tokenizer
        if tokenizer.normalizer is not None:
            text = tokenizer.normalizer.normalize_str(text)
        splits = [text]
        with self._taking_turns:
            if tokenizer.pre_tokenizer is not None:
                splits = [split for split, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
        return [token.id for split in splits for token in tokenizer.model.tokenize(split)]

    def piece(self, index: int) -> bytes | None:
        """Return the bytes of an id, None if there is none; of one outside the byte-level alphabet, its UTF-8.

        An added token is text of the decoder like any other: Gemma's are runs of the sign for a space.
        """
        if index not in self._pieces:
            token = self._tokenizer.id_to_token(index)
            self._pieces[index] = None if token is None else self._bytes(token)
        return self._pieces[index]

    def _bytes(self, token: str) -> bytes:
        if self._byte_level:
            known = all(character in _BYTES for character in token)
            return bytes(_BYTES[character] for character in token) if known else token.encode()
        byte = _BYTE_TOKEN.fullmatch(token)
        return bytes.fromhex(byte[1]) if byte else token.replace(SPACE, " ").encode()

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids`` without special tokens; bytes that are not UTF-8 become U+FFFD."""
        heard = [index for index in ids if index not in self._silent]
        text: str = self._tokenizer.decode(heard, skip_special_tokens=False)
        return text

    def stream(self, after: int | None = None) -> TextStream:
        """Return a decoder of ids that arrive one at a time, after the id ``after``."""
        silent = self._silent
        if not self._by_pieces:
            return TextStream(_Window(self.decode, [] if after is None else [after]).piece)
        strip = self._strips and (after is None or after in silent)
        return TextStream(lambda index: b"" if index in silent else self.piece(index) or b"", strip=strip)
