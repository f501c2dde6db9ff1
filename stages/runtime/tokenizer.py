"""The bundle's tokenizer: text to ids without letting text forge special tokens, ids to text as they arrive."""

from __future__ import annotations

import json
import unicodedata
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from stages.runtime.errors import BundleError, RequestError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


DEFAULT_SYSTEM = "You are a helpful assistant."


class BundleTokenizer:
    """tokenizer.json with what tokenizer_info.json says about it.

    ``stop`` are the ids that end a text; ``active_vocab_size`` is the number of ids that have a token, beyond which
    the model's logits are padding.
    """

    def __init__(self, root: Path) -> None:
        try:
            self._info: dict[str, Any] = json.loads((root / "tokenizer_info.json").read_text(encoding="utf-8"))
            self.active_vocab_size: int = self._info["active_vocab_size"]
            self.stop = frozenset(int(token) for token in self._info["stop"])
            self._tokenizer: Tokenizer = Tokenizer.from_file(str(root / "tokenizer.json"))
        except Exception as error:  # noqa: BLE001 - the tokenizers library raises Exception itself
            raise BundleError(f"{root}: the tokenizer cannot be read: {type(error).__name__}: {error}") from None
        self._tokenizer.encode_special_tokens = True  # text that spells a special token stays text

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``, special tokens' spellings included as ordinary text."""
        form = self._info.get("normalize")
        # Python's tables are newer than those inside tokenizer.json, and are what the original used.
        normal = unicodedata.normalize(form, text) if form else text
        return self._tokenizer.encode(normal, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids`` without special tokens; bytes that are not UTF-8 become U+FFFD."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def chat(self, message: str, *, system: str = DEFAULT_SYSTEM) -> list[int]:
        """Return the ids of one user turn up to where the assistant speaks; the pieces are encoded one by one.

        Encoding the whole string at once would merge across the pieces: other ids than the model was trained on.
        """
        form = (self._info.get("chat") or {}).get("format")
        if form != "chatml":
            raise RequestError(f"this bundle has no chat format known here (found {form or 'none'}); leave out --chat")
        start, end, newline = self._special("<|im_start|>"), self._special("<|im_end|>"), self.encode("\n")
        ids: list[int] = []
        for role, content in (("system", system), ("user", message)):
            ids += [start, *self.encode(role), *newline, *self.encode(content), end, *newline]
        return [*ids, start, *self.encode("assistant"), *newline]

    def stream(self) -> TextStream:
        """Return a decoder of ids that arrive one at a time."""
        return TextStream(self._tokenizer)

    def _special(self, token: str) -> int:
        found = self._tokenizer.token_to_id(token)
        if found is None:
            raise BundleError(f"the tokenizer has no {token}, which its chat format needs")
        return found


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
