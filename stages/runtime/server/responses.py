"""The documents that answers are sent as: whole, and in chunks."""

from __future__ import annotations

import secrets
import time
from typing import TYPE_CHECKING, Any, Protocol

from stages.runtime.server.answer import Chosen, Piece

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stages.runtime.tokenizer import BundleTokenizer


class Form(Protocol):
    """How one endpoint words its answers."""

    def opening(self) -> dict[str, Any] | None:
        """Return what a choice's stream begins with, None for nothing."""

    def delta(self, index: int, piece: Piece) -> dict[str, Any]:
        """Return what one more piece adds to a choice."""

    def closing(self) -> dict[str, Any]:
        """Return what a choice's stream ends with, beside why."""

    def choice(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        """Return a whole choice."""

    def envelope(self, choices: Sequence[dict[str, Any]], *, chunk: bool) -> dict[str, Any]:
        """Return the document around choices."""


class _Answers:
    """What both endpoints have: the envelope, and the text of a token."""

    prefix = kind = chunk_kind = ""

    def __init__(self, model: str, tokenizer: BundleTokenizer) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._id, self._created = f"{self.prefix}-{secrets.token_hex(12)}", int(time.time())

    def envelope(self, choices: Sequence[dict[str, Any]], *, chunk: bool) -> dict[str, Any]:
        """Return the document around choices."""
        kind = self.chunk_kind if chunk else self.kind
        head = {"id": self._id, "object": kind, "created": self._created, "model": self._model}
        return {**head, "choices": [*choices]}

    def _bytes(self, token: int) -> bytes:
        return self._tokenizer.piece(token) or b""

    def _said(self, token: int) -> str:
        return self._bytes(token).decode(errors="replace")


class Chat(_Answers):
    """/v1/chat/completions."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self) -> dict[str, Any] | None:
        """Return what a choice's stream begins with: who speaks."""
        return {"delta": {"role": "assistant", "content": ""}}

    def delta(self, index: int, piece: Piece) -> dict[str, Any]:  # noqa: ARG002 - the same for all
        """Return what one more piece adds to a choice."""
        return {"delta": {"content": piece.text}, "logprobs": self._logprobs([piece])}

    def closing(self) -> dict[str, Any]:
        """Return what a choice's stream ends with, beside why."""
        return {"delta": {}}

    def choice(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:  # noqa: ARG002
        """Return a whole choice."""
        text = "".join(piece.text for piece in pieces)
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"message": message, "logprobs": self._logprobs(pieces)}

    def _logprobs(self, pieces: Sequence[Piece]) -> dict[str, Any] | None:
        chosen = [each for piece in pieces for each in piece.chosen]
        return {"content": [self._logprob(each) for each in chosen], "refusal": None} if chosen else None

    def _logprob(self, chosen: Chosen) -> dict[str, Any]:
        top = [self._entry(token, logprob) for token, logprob in chosen.top]
        return {**self._entry(chosen.token, chosen.logprob), "top_logprobs": top}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        return {"token": self._said(token), "logprob": logprob, "bytes": [*self._bytes(token)]}


class Text(_Answers):
    """/v1/completions; ``echo`` are texts that go before the choices, as many for each as there are ``answers``."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str, tokenizer: BundleTokenizer, echo: Sequence[str] = ()) -> None:
        super().__init__(model, tokenizer)
        self._echo = echo
        self._lengths: dict[int, int] = {}  # of the text of each choice so far

    def opening(self) -> dict[str, Any] | None:
        """Return nothing: a text begins with its first piece."""
        return None

    def delta(self, index: int, piece: Piece) -> dict[str, Any]:
        """Return what one more piece adds to a choice."""
        begun = self._lengths.get(index)
        offset = 0 if begun is None else begun
        text = (self._echo[index] if self._echo and begun is None else "") + piece.text
        self._lengths[index] = offset + len(text)
        return {"text": text, "logprobs": self._logprobs([piece], offset)}

    def closing(self) -> dict[str, Any]:
        """Return what a choice's stream ends with, beside why."""
        return {"text": "", "logprobs": None}

    def choice(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        """Return a whole choice."""
        text = (self._echo[index] if self._echo else "") + "".join(piece.text for piece in pieces)
        return {"text": text, "logprobs": self._logprobs(pieces, 0)}

    def _logprobs(self, pieces: Sequence[Piece], offset: int) -> dict[str, Any] | None:
        found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for piece in pieces:
            for each in piece.chosen:
                likeliest = {self._said(token): logprob for token, logprob in each.top}
                found["tokens"].append(self._said(each.token))
                found["token_logprobs"].append(each.logprob)
                found["top_logprobs"].append({**likeliest, self._said(each.token): each.logprob})
                found["text_offset"].append(offset)
            offset += len(piece.text)
        return found if found["tokens"] else None
