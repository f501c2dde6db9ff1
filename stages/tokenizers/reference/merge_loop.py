"""A plain reference for byte-level byte-pair encodings: split, look up pairs, join the lowest; no tokenizers library.

Text goes through as in the library's documentation: added tokens that are not normalised are found first, what lies
between them is normalised, the others are found there, and only then is text split and merged.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from stages.tokenizers.formats.byte_level import BYTES, CHARACTERS
from stages.tokenizers.reference.unicode9_nfc import nfc

if TYPE_CHECKING:
    from stages.documents.files import JsonObject


MAX_REMEMBERED = 200_000


class MergeLoop:
    """Ids of a byte-level vocabulary, computed from its tables alone.

    ``vocab`` and ``merges`` are spelled in the byte-level alphabet; ``added`` are entries as tokenizer.json has them;
    ``splits`` are patterns of the ``regex`` package; ``prefix`` are the ids that go before a text.
    """

    def __init__(
        self,
        vocab: Mapping[str, int],
        merges: Sequence[tuple[str, str]],
        *,
        added: Sequence[JsonObject] = (),
        normalize: bool = False,
        splits: Sequence[str] = (),
        ignore_merges: bool = False,
        prefix: Sequence[int] = (),
    ) -> None:
        import regex

        self.prefix = list(prefix)
        self._vocab = vocab
        self._ranks = {(left, right): rank for rank, (left, right) in enumerate(merges)}
        self._normalize: Callable[[str], str] = nfc if normalize else str
        self._splits = [regex.compile(pattern) for pattern in splits]
        self._ignore_merges = ignore_merges
        self._specials = frozenset(entry["content"] for entry in added if entry.get("special"))
        self._raw = Finder([entry for entry in added if not entry.get("normalized")], str)
        self._late = Finder([entry for entry in added if entry.get("normalized")], self._normalize)
        self._remembered: dict[str, list[int]] = {}
        self._bytes = {index: bytes(BYTES[c] for c in token) for token, index in vocab.items() if _spelled(token)}
        self._bytes |= {entry["id"]: entry["content"].encode() for entry in added}
        self._texts = {entry["id"]: entry["content"] for entry in added}

    def encode(self, text: str, *, specials: bool) -> list[int]:
        """Return the ids of ``text``; ``specials`` says whether special-token text becomes special tokens."""
        skip: frozenset[str] = frozenset() if specials else self._specials
        ids: list[int] = []
        for between, token in self._raw.parts(text, skip):
            for piece, late in self._late.parts(self._normalize(between), skip):
                for word in self._words(piece):
                    ids += self._word(word)
                ids += [] if late is None else [late]
            ids += [] if token is None else [token]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids``; the bytes between two added tokens are decoded together."""
        text, pending = "", b""
        for index in ids:
            if index in self._texts:
                text, pending = text + pending.decode(errors="replace") + self._texts[index], b""
            else:
                pending += self._bytes[index]
        return text + pending.decode(errors="replace")

    def tokens(self) -> dict[int, bytes]:
        """Return every id with its bytes."""
        return self._bytes

    def _words(self, text: str) -> list[str]:
        words = [text]
        for pattern in self._splits:
            words = [part for word in words for part in _isolated(pattern, word)]
        return words

    def _word(self, word: str) -> list[int]:
        found = self._remembered.get(word)
        if found is None:
            spelled = "".join(CHARACTERS[byte] for byte in word.encode("utf-8", "surrogatepass"))
            whole = self._vocab.get(spelled) if self._ignore_merges else None
            found = self._merge(spelled) if whole is None else [whole]
            if len(self._remembered) < MAX_REMEMBERED:
                self._remembered[word] = found
        return found

    def _merge(self, spelled: str) -> list[int]:
        """Return the ids of one word; bytes without a token vanish."""
        parts = join([c for c in spelled if c in self._vocab], lambda left, right: self._ranks.get((left, right)))
        return [self._vocab[part] for part in parts]


def join(parts: list[str], rank: Callable[[str, str], float | None]) -> list[str]:
    """Join the neighbours of lowest ``rank``, the leftmost of equals, until no two have one (None)."""
    end = len(parts)
    following, before = list(range(1, end + 1)), list(range(-1, end - 1))
    queue: list[tuple[float, int]] = []

    def consider(left: int) -> None:
        if left >= 0 and following[left] < end:
            found = rank(parts[left], parts[following[left]])
            if found is not None:
                heapq.heappush(queue, (found, left))

    for i in range(end):
        consider(i)
    while queue:
        lowest, left = heapq.heappop(queue)
        right = following[left]
        if not parts[left] or right >= end or rank(parts[left], parts[right]) != lowest:
            continue  # one of the two was joined to another since
        parts[left], parts[right] = parts[left] + parts[right], ""
        following[left] = following[right]
        if following[left] < end:
            before[following[left]] = left
        consider(left)
        consider(before[left])
    return [part for part in parts if part]


class Finder:
    """Added tokens in a text: the leftmost, of those the longest."""

    def __init__(self, entries: Sequence[JsonObject], normalize: Callable[[str], str]) -> None:
        import regex

        self._entries = {normalize(entry["content"]): entry for entry in entries}
        longest = sorted(self._entries, key=len, reverse=True)
        self._pattern = regex.compile("|".join(map(regex.escape, longest))) if longest else None

    def parts(self, text: str, skip: frozenset[str]) -> Iterator[tuple[str, int | None]]:
        """Yield (text before, id of the token) and at last (text after, None)."""
        start = 0
        for match in self._pattern.finditer(text) if self._pattern else ():
            entry, first, last = self._entries[match[0]], match.start(), match.end()
            if entry["content"] in skip:
                continue
            if entry.get("single_word") and (text[first - 1 : first].isalnum() or text[last : last + 1].isalnum()):
                continue
            if entry.get("lstrip"):
                first = max(start, len(text[:first].rstrip()))
            if entry.get("rstrip"):
                last = len(text) - len(text[last:].lstrip())
            yield text[start:first], entry["id"]
            start = last
        yield text[start:], None


def _isolated(pattern: Any, text: str) -> Iterator[str]:
    start = 0
    for match in pattern.finditer(text):
        if match.start() > start:
            yield text[start : match.start()]
        if match[0]:
            yield match[0]
        start = match.end()
    if start < len(text):
        yield text[start:]


def _spelled(token: str) -> bool:
    return all(character in BYTES for character in token)
