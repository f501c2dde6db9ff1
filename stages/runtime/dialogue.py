"""A conversation with a bundle: its messages, and the ids that they are read as, exactly those that were generated."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stages.runtime.generation import Generation
    from stages.runtime.tokenizer import BundleTokenizer


class Dialogue:
    """The messages so far, each with its ``role`` and ``content``."""

    def __init__(self, tokenizer: BundleTokenizer, system: str | None = None) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []  # of everything up to the last answer
        self.messages: list[dict[str, str]] = []
        self.set_system(system)

    def set_system(self, content: str | None) -> None:
        """Replace the system message; None for the chat format's own, where it has one."""
        others = [message for message in self.messages if message["role"] != "system"]
        self.messages = [{"role": "system", "content": content}, *others] if content else others
        self._ids = []

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages = [message for message in self.messages if message["role"] == "system"]
        self._ids = []

    def prompt(self, content: str) -> list[int]:
        """Return the ids that a user's message with this content is answered after; remembers nothing of it."""
        rendered = self._tokenizer.chat([*self.messages, {"role": "user", "content": content}])
        return self._as_generated(rendered)

    def add(self, content: str, generation: Generation) -> None:
        """Remember a user's message and its answer."""
        answer = generation.plain_text(self._tokenizer)
        self.messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        self._ids = [*generation.prompt, *generation.ids]

    def _as_generated(self, rendered: Sequence[int]) -> list[int]:
        """Return ``rendered`` with the ids of answers as they were generated, which another encoding may spell.

        They stand for one another where they spell the same bytes and are no special tokens.
        """
        generated = self._ids
        i = j = 0
        while True:
            while i < len(rendered) and j < len(generated) and rendered[i] == generated[j]:
                i, j = i + 1, j + 1
            same = (i, j)
            mine = theirs = b""
            while not mine or mine != theirs:
                ids, at = (rendered, i) if len(mine) <= len(theirs) else (generated, j)
                piece = self._plain(ids[at]) if at < len(ids) else b""
                if ids is rendered:
                    mine, i = mine + piece, i + 1
                else:
                    theirs, j = theirs + piece, j + 1
                if not piece or not (mine.startswith(theirs) or theirs.startswith(mine)):
                    return [*generated[: same[1]], *rendered[same[0] :]]

    def _plain(self, token: int) -> bytes:
        """Return the bytes of an id; none for a special token."""
        return b"" if self._tokenizer.is_special(token) else self._tokenizer.piece(token) or b""
