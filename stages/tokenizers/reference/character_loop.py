"""A plain reference for byte-pair encodings over characters, by scores or by merges; no tokenizers library.

With scores this is what sentencepiece does: of all neighbours whose union is a piece, those of the best score are
joined, the leftmost of equals; what is no piece in the end becomes its bytes or the unknown token.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from stages.tokenizers.formats.metaspace import SEGMENT, SEGMENT_WITHOUT, SPACE, TEXT, TEXT_WITHOUT
from stages.tokenizers.reference.merge_loop import Finder, join

if TYPE_CHECKING:
    from stages.documents.files import JsonObject


BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class CharacterLoop:
    """Ids of a vocabulary over characters, computed from its tables alone.

    ``rank`` is of two neighbours, None where they are never joined; ``frozen`` are texts that are one symbol from the
    start and are joined to nothing. ``added`` are entries as tokenizer.json has them, ``form`` gives a text its normal
    form. A character without a token becomes its bytes' tokens where there is ``byte_fallback``, and else ``unk``. The
    rest is as in :class:`~stages.tokenizers.formats.metaspace.Characters`, but ``prefix`` are ids.
    """

    def __init__(
        self,
        vocab: Mapping[str, int],
        rank: Callable[[str, str], float | None],
        *,
        added: Sequence[JsonObject],
        unk: int | None,
        byte_fallback: bool,
        lead: str,
        collapse: bool = False,
        strip: bool,
        prefix: Sequence[int] = (),
        frozen: Sequence[str] = (),
        form: Callable[[str], str] = str,
    ) -> None:
        self.prefix = list(prefix)
        self._vocab, self._rank, self._unk, self._strip = vocab, rank, unk, strip
        self._lead, self._collapse, self._form = lead, collapse, form
        self._bytes = [vocab[f"<0x{byte:02X}>"] for byte in range(256)] if byte_fallback else []
        self._frozen = frozenset(frozen)
        self._known: dict[tuple[str, bool], list[int]] = {}  # the same texts are compared with several others
        longest = sorted(frozen, key=len, reverse=True)
        self._symbols = re.compile("|".join([*map(re.escape, longest), "."]), re.DOTALL)
        self._specials = frozenset(entry["content"] for entry in added if entry.get("special"))
        self._raw = Finder([entry for entry in added if not entry.get("normalized")], str)
        self._late = Finder([entry for entry in added if entry.get("normalized")], self._normalize)
        self._texts = {index: text for text, index in vocab.items()} | {e["id"]: e["content"] for e in added}

    def encode(self, text: str, *, specials: bool) -> list[int]:
        """Return the ids of ``text``; ``specials`` says whether special-token text becomes special tokens."""
        if (text, specials) not in self._known:
            self._known[text, specials] = self._encode(text, specials=specials)
        return self._known[text, specials]

    def _encode(self, text: str, *, specials: bool) -> list[int]:
        skip: frozenset[str] = frozenset() if specials else self._specials
        ids: list[int] = []
        for i, (between, token) in enumerate(self._raw.parts(text, skip)):
            for j, (piece, late) in enumerate(self._late.parts(self._normalize(between), skip)):
                ids += self._ids(self._led(piece, start=i == j == 0))
                ids += [] if late is None else [late]
            ids += [] if token is None else [token]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids``; neighbouring bytes that are not UTF-8 together become U+FFFD, each."""
        text, pending = "", b""
        for token in [*(self._texts[index] for index in ids), ""]:
            byte = BYTE.fullmatch(token) if self._bytes else None
            if byte:
                pending += bytes.fromhex(byte[1])
                continue
            text, pending = text + _text(pending) + token.replace(SPACE, " "), b""
        return text[1:] if self._strip and text.startswith(" ") else text

    def tokens(self) -> dict[int, bytes]:
        """Return every id with its text as the vocabulary spells it."""
        return {index: text.encode() for index, text in self._texts.items()}

    def _normalize(self, text: str) -> str:
        text = self._form(text)
        if self._collapse:
            text = " ".join(part for part in text.split(" ") if part)
        if self._lead == SEGMENT and text:
            text = SPACE + text
        return text if self._lead in {SEGMENT_WITHOUT, TEXT_WITHOUT} else text.replace(" ", SPACE)

    def _led(self, text: str, *, start: bool) -> str:
        spaced = text.replace(" ", SPACE)
        if not text or (self._lead in {TEXT, TEXT_WITHOUT} and not start):
            return spaced
        without = self._lead in {SEGMENT_WITHOUT, TEXT_WITHOUT} and not spaced.startswith(SPACE)
        return SPACE + spaced if self._lead == TEXT or without else spaced

    def _ids(self, text: str) -> Iterator[int]:
        unknown = False
        for part in self._pieces(text):
            index = self._vocab.get(part)
            if index is None and self._bytes:
                yield from (self._bytes[byte] for byte in part.encode("utf-8", "surrogatepass"))
            elif index is not None:
                yield index
            elif not unknown and self._unk is not None:
                yield self._unk
            unknown = index is None

    def _pieces(self, text: str) -> Iterable[str]:
        return join(self._symbols.findall(text), self._pair)

    def _pair(self, left: str, right: str) -> float | None:
        return None if left in self._frozen or right in self._frozen else self._rank(left, right)


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "\ufffd" * len(data)
