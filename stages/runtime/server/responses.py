"""Builds the responses of the API: complete ones, and the chunks of streamed ones."""

from __future__ import annotations

import secrets
import time
from typing import TYPE_CHECKING, Protocol

from stages.runtime.server.answer import Chosen, TextPiece
from stages.runtime.server.tools import Reader

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stages.runtime.server.documents import (
        ChatLogprobs,
        Choice,
        Completion,
        Message,
        TextLogprobs,
        TokenLogprob,
        ToolCall,
    )
    from stages.runtime.server.tools import Tools
    from stages.runtime.tokenizer import BundleTokenizer


class Form(Protocol):
    """The response format of one endpoint."""

    def opening(self) -> Choice | None:
        """Return the first chunk of a choice, None for no such chunk."""

    def delta(self, index: int, piece: TextPiece) -> Choice | None:
        """Return the chunk for one more piece of a choice, None if nothing is to be sent."""

    def closing(self, index: int, finish: str) -> Choice:
        """Return the last chunk of a choice, with its finish_reason."""

    def choice(self, index: int, pieces: Sequence[TextPiece], finish: str) -> Choice:
        """Return a complete choice, with its finish_reason."""

    def envelope(self, choices: Sequence[Choice], *, chunk: bool) -> Completion:
        """Return the document around choices."""


class _Answers:
    """The parts that both endpoints share: the envelope, and the text of a token."""

    prefix = kind = chunk_kind = ""

    def __init__(self, model: str, tokenizer: BundleTokenizer) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._id, self._created = f"{self.prefix}-{secrets.token_hex(12)}", int(time.time())

    def envelope(self, choices: Sequence[Choice], *, chunk: bool) -> Completion:
        """Return the document around choices."""
        kind = self.chunk_kind if chunk else self.kind
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "choices": [*choices],
        }

    def _bytes(self, token: int) -> bytes:
        return self._tokenizer.piece(token) or b""

    def _text_of(self, token: int) -> str:
        return self._bytes(token).decode(errors="replace")


class Chat(_Answers):
    """The format of /v1/chat/completions; with ``tools``, calls are separated from the text of an answer."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, model: str, tokenizer: BundleTokenizer, tools: Tools | None = None) -> None:
        super().__init__(model, tokenizer)
        self._tools = tools
        self._readers: dict[int, Reader] = {}

    def opening(self) -> Choice | None:
        """Return the first chunk of a choice: its role."""
        return {"delta": {"role": "assistant", "content": ""}}

    def delta(self, index: int, piece: TextPiece) -> Choice | None:
        """Return the chunk for one more piece of a choice, None if nothing is to be sent."""
        text = piece.text
        if self._tools is not None:
            text = self._readers.setdefault(index, Reader(self._tools)).feed(text)
        if not text and not piece.chosen:
            return None
        return {"delta": {"content": text}, "logprobs": self._logprobs([piece])}

    def closing(self, index: int, finish: str) -> Choice:
        """Return the last chunk of a choice, with its finish_reason."""
        text, calls = self._readers[index].finish() if index in self._readers else ("", [])
        delta: Message = {"content": text} if text else {}
        if calls:
            delta["tool_calls"] = [{**call, "index": at} for at, call in enumerate(calls)]
        return {"delta": delta, "finish_reason": "tool_calls" if calls else finish}

    def choice(self, index: int, pieces: Sequence[TextPiece], finish: str) -> Choice:  # noqa: ARG002 - as the others
        """Return a complete choice, with its finish_reason."""
        text = "".join(piece.text for piece in pieces)
        calls: list[ToolCall] = []
        if self._tools is not None:
            reader = Reader(self._tools)
            text = reader.feed(text)
            rest, calls = reader.finish()
            text += rest
        message: Message = {"role": "assistant", "content": text if text or not calls else None, "refusal": None}
        if calls:
            message["tool_calls"] = calls
        reason = "tool_calls" if calls else finish
        return {"message": message, "logprobs": self._logprobs(pieces), "finish_reason": reason}

    def _logprobs(self, pieces: Sequence[TextPiece]) -> ChatLogprobs | None:
        chosen = [each for piece in pieces for each in piece.chosen]
        return {"content": [self._logprob(each) for each in chosen], "refusal": None} if chosen else None

    def _logprob(self, chosen: Chosen) -> TokenLogprob:
        assert chosen.logprob is not None, "every token of a message follows another"
        top = [self._entry(token, logprob) for token, logprob in chosen.top]
        return {**self._entry(chosen.token, chosen.logprob), "top_logprobs": top}

    def _entry(self, token: int, logprob: float) -> TokenLogprob:
        return {"token": self._text_of(token), "logprob": logprob, "bytes": [*self._bytes(token)]}


class Text(_Answers):
    """The format of /v1/completions."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str, tokenizer: BundleTokenizer) -> None:
        super().__init__(model, tokenizer)
        self._lengths: dict[int, int] = {}  # of the text of each choice so far

    def opening(self) -> Choice | None:
        """Return None: a text has no chunk before its first piece."""
        return None

    def delta(self, index: int, piece: TextPiece) -> Choice | None:
        """Return the chunk for one more piece of a choice, None if nothing is to be sent."""
        if not piece.text and not piece.chosen:
            return None
        offset = self._lengths.get(index, 0)
        self._lengths[index] = offset + len(piece.text)
        return {"text": piece.text, "logprobs": self._logprobs([piece], offset)}

    def closing(self, index: int, finish: str) -> Choice:  # noqa: ARG002 - as the others
        """Return the last chunk of a choice, with its finish_reason."""
        return {"text": "", "logprobs": None, "finish_reason": finish}

    def choice(self, index: int, pieces: Sequence[TextPiece], finish: str) -> Choice:  # noqa: ARG002 - as the others
        """Return a complete choice, with its finish_reason."""
        text = "".join(piece.text for piece in pieces)
        return {"text": text, "logprobs": self._logprobs(pieces, 0), "finish_reason": finish}

    def _logprobs(self, pieces: Sequence[TextPiece], offset: int) -> TextLogprobs | None:
        found: TextLogprobs = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for piece in pieces:
            for each in piece.chosen:
                token, logprob = self._text_of(each.token), each.logprob
                likeliest = {self._text_of(other): of_other for other, of_other in each.top}
                found["tokens"].append(token)
                found["token_logprobs"].append(logprob)
                found["top_logprobs"].append(None if logprob is None else {**likeliest, token: logprob})
                found["text_offset"].append(offset)
            offset += len(piece.text)
        return found if found["tokens"] else None
