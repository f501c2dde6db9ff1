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
            _check(self._info)
            self._tokenizer: Tokenizer = Tokenizer.from_file(str(root / "tokenizer.json"))
        except Exception as error:  # noqa: BLE001 - the tokenizers library raises Exception itself
            raise BundleError(f"{root}: the tokenizer cannot be read: {type(error).__name__}: {error}") from None
        self._tokenizer.encode_special_tokens = True  # text that spells a special token stays text

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``, special tokens' spellings included as ordinary text."""
        form = self._info.get("normalize")
        # Python's tables are newer than those inside tokenizer.json, and are what the original used.
        normal = unicodedata.normalize(form, text) if form else text
        try:
            normal.encode()
        except UnicodeEncodeError as error:
            raise RequestError(f"the text is not UTF-8 at character {error.start}") from None
        return self._tokenizer.encode(normal, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids`` without special tokens; bytes that are not UTF-8 become U+FFFD."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def chat(self, message: str) -> list[int]:
        """Return the ids of one user turn up to where the assistant speaks, after the format's own system message.

        Where tokenizer_info.json says piecewise, role and content are encoded one by one: at once they would merge,
        to other ids than the model was trained on.
        """
        chat = self._info.get("chat") or {}
        form = chat.get("format")
        if form != "chatml":
            raise RequestError(f"this bundle has no chat format known here (found {form or 'none'}); leave out --chat")
        start, end, newline = self._special("<|im_start|>"), self._special("<|im_end|>"), self.encode("\n")
        ids: list[int] = []
        for role, content in (("system", chat["system"]), ("user", message)):
            pieces = (role, "\n", content) if chat["piecewise"] else (f"{role}\n{content}",)
            ids += [start, *(token for piece in pieces for token in self.encode(piece)), end, *newline]
        return [*ids, start, *self.encode("assistant"), *newline]

    def stream(self) -> TextStream:
        """Return a decoder of ids that arrive one at a time."""
        return TextStream(self._tokenizer)

    def _special(self, token: str) -> int:
        found = self._tokenizer.token_to_id(token)
        if found is None:
            raise BundleError(f"the tokenizer has no {token}, which its chat format needs")
        return found


def _check(info: Any) -> None:
    """Raise :class:`ValueError` where tokenizer_info.json does not hold what is read from it."""
    active, form, chat = info["active_vocab_size"], info.get("normalize"), info.get("chat") or {}
    if type(active) is not int or active < 1:
        raise ValueError(f"active_vocab_size must be a positive integer, found {active!r:.60}")
    if form not in (None, "NFC", "NFD", "NFKC", "NFKD"):
        raise ValueError(f"normalize must be a Unicode form or null, found {form!r:.60}")
    if chat.get("format") == "chatml" and not (
        isinstance(chat.get("system"), str) and isinstance(chat.get("piecewise"), bool)
    ):
        raise ValueError("chat must have a 'system' message and say whether it is 'piecewise'")


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
