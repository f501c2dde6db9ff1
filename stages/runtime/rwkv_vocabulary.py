"""The vocabulary of RWKV World in a bundle: ``rwkv_vocab.txt``, read into a trie; the longest token wins at each byte.

One token a line: its id in decimal, a space, its bytes in base64; id 0 ends a text and has no line.
"""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any

from stages.runtime.stream import TextStream

if TYPE_CHECKING:
    from collections.abc import Sequence

FILE = "rwkv_vocab.txt"
END, END_TEXT = 0, "<|endoftext|>"


class TrieVocabulary:
    """Ids and bytes of one vocabulary; :class:`ValueError` for a file that is not one."""

    specials: dict[str, tuple[int, bool, bool]] = {END_TEXT: (END, False, False)}
    added: dict[str, tuple[int, bool]] = {END_TEXT: (END, True)}

    def __init__(self, content: bytes) -> None:
        self._tokens: dict[int, bytes] = {}
        for line in content.splitlines():
            number, _, token = line.partition(b" ")
            self._tokens[int(number)] = base64.b64decode(token, validate=True)
        self._root: dict[int, Any] = {}
        for index, data in self._tokens.items():
            node = self._root
            for byte in data:
                node = node.setdefault(byte, {})
            node[-1] = index  # no byte is negative

    def encode(self, text: str, *, start: bool = True) -> list[int]:  # noqa: ARG002 - every part is as the first
        """Return the ids of ``text``; bytes that no token begins with, which a sound file has none of, are left out."""
        data = text.encode("utf-8", "surrogatepass")
        ids, at = [], 0
        while at < len(data):
            node: dict[int, Any] | None = self._root
            found, after, i = None, at + 1, at
            while i < len(data) and (node := node.get(data[i])) is not None:  # type: ignore[union-attr]
                i += 1
                if -1 in node:
                    found, after = node[-1], i
            ids += [] if found is None else [found]
            at = after
        return ids

    def encode_plain(self, text: str) -> list[int]:
        """Return the ids of ``text``, in which this vocabulary sees no special token anyway."""
        return self.encode(text)

    def piece(self, index: int) -> bytes | None:
        """Return the bytes of an id."""
        return END_TEXT.encode() if index == END else self._tokens.get(index)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids`` without the end of text; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self._tokens.get(index, b"") for index in ids).decode(errors="replace")

    def stream(self, after: int | None = None) -> TextStream:  # noqa: ARG002 - no token here depends on others
        """Return a decoder of ids that arrive one at a time, after the id ``after``."""
        return TextStream(lambda index: self._tokens.get(index, b""))
