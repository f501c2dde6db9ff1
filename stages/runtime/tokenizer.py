"""The bundle's tokenizer: text to ids without letting text forge special tokens, ids to text as they arrive."""

from __future__ import annotations

import json
import re
import unicodedata
from typing import TYPE_CHECKING, Any

from stages.runtime import trie
from stages.runtime.errors import BundleError, RequestError
from stages.runtime.trie import TrieVocabulary

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from stages.runtime.library import LibraryVocabulary
    from stages.runtime.stream import TextStream

INFO, CONFIG = "tokenizer_info.json", "tokenizer_config.json"
_MARKS = range(0xE000, 0xF900)  # private use: no text has all of them


class BundleTokenizer:
    """The vocabulary with what tokenizer_info.json says about it.

    ``stop`` are the ids that end a text; ``active_vocab_size`` is the number of ids that have a token, beyond which
    the model's logits are padding.
    """

    def __init__(self, root: Path) -> None:
        try:
            self._info: dict[str, Any] = json.loads((root / INFO).read_text(encoding="utf-8"))
            self.active_vocab_size: int = self._info["active_vocab_size"]
            self.stop = frozenset(int(token) for token in self._info["stop"])
            _check(self._info)
            self.prefix = [int(token) for token in self._info.get("prefix", ())]
            self._vocabulary = _open(root, normalized=bool(self._info.get("normalize")))
        except Exception as error:  # noqa: BLE001 - the tokenizers library raises Exception itself
            raise BundleError(f"{root}: the tokenizer cannot be read: {type(error).__name__}: {error}") from None
        self._root = root
        longest = sorted(self._vocabulary.specials, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest)) or r"(?!)")

    def normalize(self, text: str) -> str:
        """Return ``text`` in the Unicode form that it has before it is split."""
        form = self._info.get("normalize")
        # Python's tables are newer than those inside tokenizer.json, and are what the original used.
        normal = unicodedata.normalize(form, text) if form else text
        try:
            normal.encode()
        except UnicodeEncodeError as error:
            raise RequestError(f"the text is not UTF-8 at character {error.start}") from None
        return normal

    def encode(self, text: str, *, specials: bool = False) -> list[int]:
        """Return the ids of ``text``; what spells a special token is ordinary text unless ``specials``."""
        return self._with_specials(self.normalize(text)) if specials else self._vocabulary.encode(self.normalize(text))

    def prompt(self, text: str) -> list[int]:
        """Return the ids of a text to continue: those of ``text`` after what the model wants before every text."""
        return [*self.prefix, *self.encode(text)]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids`` without special tokens; bytes that are not UTF-8 become U+FFFD."""
        return self._vocabulary.decode(ids)

    def piece(self, index: int) -> bytes | None:
        """Return the bytes that an id stands for; None if it has no token."""
        return self._vocabulary.piece(index)

    def is_special(self, index: int) -> bool:
        """Say whether an id is a special token."""
        return any(index == special[0] for special in self._vocabulary.specials.values())

    def chat(self, message: str, *, system: str | None = None) -> list[int]:
        """Return the ids of one user turn up to where the assistant speaks, in the bundle's chat format."""
        form = (self._info.get("chat") or {}).get("format")
        if form == "chatml":
            return self._chatml(message, system)
        if form == "template":
            return self._templated(message, system)
        raise RequestError(f"this bundle has no chat format known here (found {form or 'none'}); leave out --chat")

    def stream(self, after: Sequence[int] = ()) -> TextStream:
        """Return a decoder of ids that arrive one at a time and continue the ids ``after``."""
        return self._vocabulary.stream(after[-1] if after else None)

    def _chatml(self, message: str, system: str | None) -> list[int]:
        """Encode one turn after ``system`` or the format's own system message.

        Where tokenizer_info.json says piecewise, role and content are encoded one by one: at once they would merge,
        to other ids than the model was trained on.
        """
        chat = self._info["chat"]
        start, end, newline = self._id("<|im_start|>"), self._id("<|im_end|>"), self.encode("\n")
        ids: list[int] = []
        for role, content in (("system", system or chat["system"]), ("user", message)):
            pieces = (role, "\n", content) if chat["piecewise"] else (f"{role}\n{content}",)
            ids += [start, *(token for piece in pieces for token in self.encode(piece)), end, *newline]
        return [*ids, start, *self.encode("assistant"), *newline]

    def _templated(self, message: str, system: str | None) -> list[int]:
        from stages.runtime.render import render

        config = json.loads((self._root / CONFIG).read_text(encoding="utf-8"))
        template = config["chat_template"]
        mark = next(chr(i) for i in _MARKS if chr(i) not in message + (system or "") + template)
        turns = [("system", system)] if system else []
        messages = [{"role": role, "content": self._guard(text, mark)} for role, text in (*turns, ("user", message))]
        roles = {name: config.get(name) or "" for name in ("bos_token", "eos_token", "pad_token")}
        text = render(template, {"messages": messages, "add_generation_prompt": True, **roles})
        return self._with_specials(text, mark)

    def _guard(self, text: str, mark: str) -> str:
        """Break every beginning of a special token with ``mark``, so that only the template can write one."""
        starts = "".join({special[0] for special in self._vocabulary.specials})
        return re.sub(f"[{re.escape(starts)}]", lambda found: found[0] + mark, text) if starts else text

    def _with_specials(self, text: str, mark: str = "") -> list[int]:
        ids: list[int] = []
        start = 0
        for match in self._special.finditer(text):
            special, before, after = self._vocabulary.specials[match[0]]
            part = text[start : match.start()]
            ids += self._plain(part.rstrip() if before else part, mark, start=not start)
            ids.append(special)
            start = match.end()
            if after:
                start = len(text) - len(text[start:].lstrip())
        return ids + self._plain(text[start:], mark, start=not start)

    def _plain(self, text: str, mark: str, *, start: bool) -> list[int]:
        return self._vocabulary.encode(self.normalize(text.replace(mark, "") if mark else text), start=start)

    def _id(self, token: str) -> int:
        if token not in self._vocabulary.specials:
            raise BundleError(f"the tokenizer has no {token}, which its chat format needs")
        return self._vocabulary.specials[token][0]


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


def _open(root: Path, *, normalized: bool) -> LibraryVocabulary | TrieVocabulary:
    if (root / trie.FILE).is_file():
        return TrieVocabulary(root / trie.FILE)
    from stages.runtime import library

    return library.LibraryVocabulary(root / library.FILE, normalized=normalized)
