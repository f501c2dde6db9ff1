"""Text of ids that arrive one at a time."""

from __future__ import annotations

import codecs
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class TextStream:
    """Turns ids into text; a character whose bytes are still coming is held back.

    ``piece`` gives the bytes of an id, none for a special token. With ``strip`` one space that leads the text is left
    out: there the vocabulary puts one of its own.
    """

    def __init__(self, piece: Callable[[int], bytes], *, strip: bool = False) -> None:
        self._piece, self._strip = piece, strip
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def step(self, token: int) -> str:
        """Return the text that ``token`` completes, which may be none."""
        data = self._piece(token)
        if self._strip and data:
            data, self._strip = data.removeprefix(b" "), False
        return self._decoder.decode(data)

    def finish(self) -> str:
        """Return what was held back at the end: bytes that never became a character, as U+FFFD."""
        return self._decoder.decode(b"", final=True)
