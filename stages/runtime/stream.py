"""Text of ids that arrive one at a time."""

from __future__ import annotations

import codecs
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class TextStream:
    """Turns ids into text; a character whose bytes are still coming is held back.

    ``piece`` gives the bytes of an id, none for a special token. With ``strip`` one space that leads the text is left
    out: there the vocabulary puts one of its own. ``stopped`` is the stop string that ended the text, once one has.
    """

    def __init__(self, piece: Callable[[int], bytes], *, strip: bool = False) -> None:
        self._piece, self._strip = piece, strip
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops: Sequence[bytes] = ()
        self._pending = b""
        self.stopped: bytes | None = None

    def stop_at(self, stops: Sequence[bytes]) -> None:
        """End the text before the first of ``stops``, whichever tokens its bytes are spread over."""
        self._stops = stops

    def step(self, token: int) -> str:
        """Return the text that ``token`` completes, which may be none."""
        return self.add(self._piece(token))

    def add(self, data: bytes) -> str:
        """Return the text that ``data``, the bytes of a token, completes."""
        if self._strip and data:
            data, self._strip = data.removeprefix(b" "), False
        return self._decoder.decode(self._before_stop(data) if self._stops else data)

    def finish(self) -> str:
        """Return what was held back at the end: bytes that never became a character, as U+FFFD."""
        return self._decoder.decode(self._pending, final=True)

    def _before_stop(self, data: bytes) -> bytes:
        """Return what surely comes before a stop string; what may be the beginning of one is held."""
        if self.stopped is not None:
            return b""
        text = self._pending + data
        # As if bytes came one by one: the string that is whole first, and of several the longest.
        ends = [(at + len(stop), -len(stop), stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            end, _, self.stopped = min(ends)
            self._pending = b""
            return text[: end - len(self.stopped)]
        longest = min(len(text), max(map(len, self._stops)) - 1)
        starts = (n for n in range(longest, 0, -1) if any(stop.startswith(text[-n:]) for stop in self._stops))
        certain = len(text) - next(starts, 0)
        self._pending = text[certain:]
        return text[:certain]
