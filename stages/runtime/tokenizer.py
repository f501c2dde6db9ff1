"""The bundle's tokenizer: text to ids without letting text forge special tokens, ids to text as they arrive."""

from __future__ import annotations

import re
import unicodedata
from typing import TYPE_CHECKING

from stages.runtime import chat as chats
from stages.runtime import rwkv_vocabulary
from stages.runtime.errors import BundleError, RequestError
from stages.runtime.folder import Folder
from stages.runtime.rwkv_vocabulary import TrieVocabulary

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from stages.runtime.documents import JsonObject
    from stages.runtime.library import LibraryVocabulary
    from stages.runtime.stream import TextStream

INFO, CONFIG = "tokenizer_info.json", "tokenizer_config.json"


class BundleTokenizer:
    """The vocabulary in a directory, or in a bundle's listed files, with what tokenizer_info.json says about it.

    ``stop`` are the ids that end a text; ``active_vocab_size`` is the number of ids that have a token, beyond which
    the model's logits are padding.
    """

    def __init__(self, place: Path | Folder) -> None:
        self._folder = place if isinstance(place, Folder) else Folder(place)
        try:
            self._info: JsonObject = self._folder.json(INFO)
            self.active_vocab_size: int = self._info["active_vocab_size"]
            self.stop = frozenset(int(token) for token in self._info["stop"])
            _check(self._info)
            self.prefix = [int(token) for token in self._info.get("prefix", ())]
            self._vocabulary = _open(self._folder, self._info)
        except BundleError:
            raise
        except BaseException as error:
            # The tokenizers library raises Exception itself, and a panic of Rust is not even one.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            root, reason = self._folder.root, f"{type(error).__name__}: {error!s:.200}"
            raise BundleError(f"{root}: the tokenizer cannot be read: {reason}") from None
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

    def chat(
        self,
        messages: str | Sequence[JsonObject],
        *,
        system: str | None = None,
        add_generation_prompt: bool = True,
        variables: JsonObject | None = None,
        template: str | None = None,
    ) -> list[int]:
        """Return the ids of a conversation in the bundle's chat format.

        ``messages`` are mappings with ``role`` and ``content``, as Hugging Face's templates know them, or one text of
        the user; ``system`` goes before them. They end where the assistant speaks, if ``add_generation_prompt``.
        ``variables`` are what a template may ask for besides (``tools``, ``documents``, ``enable_thinking`` ...), and
        ``template`` is the name of one where the checkpoint has several.

        What messages and variables spell of control tokens becomes ordinary text. :class:`RequestError` where the
        bundle has no chat format, or its template refuses the conversation.
        """
        conversation = chats.turns(messages, system)
        form = (self._info.get("chat") or {}).get("format")
        if form == "chatml":
            return self._chatml(conversation, add_generation_prompt=add_generation_prompt)
        if form != "template":
            raise RequestError(
                f"this bundle has no chat format known here (found {form or 'none'}): give plain text, "
                "as `generate` with --prompt TEXT does"
            )
        given = {"tools": None, "documents": None, **(variables or {})}
        given |= {"messages": conversation, "add_generation_prompt": add_generation_prompt}
        config = self._config()
        chosen = chats.choose(config.get("chat_template"), tools=given["tools"] is not None, name=template)
        vocabulary = self._spelling(config)
        return chats.encoded(chats.marked(chosen, given, vocabulary), vocabulary)

    def tool_template(self) -> str:
        """Return the text of the template that conversations with tools have; empty where they have none."""
        if (self._info.get("chat") or {}).get("format") != "template":
            return ""
        return chats.choose(self._config().get("chat_template"), tools=True)

    def _config(self) -> JsonObject:
        config = self._folder.json(CONFIG)
        if not isinstance(config, dict):
            raise BundleError(f"{self._folder.root / CONFIG}: expected an object, found {config!r:.60}")
        return config

    def _spelling(self, config: JsonObject) -> chats.Vocabulary:
        controls = config.get("chat_control_tokens")
        return chats.Vocabulary(
            encode=lambda text: self.encode(text, specials=True),
            encode_plain=lambda text: self._vocabulary.encode_plain(self.normalize(text)),
            added=self._vocabulary.added,
            roles={name: text for name, text in config.items() if name.endswith("_token") and isinstance(text, str)},
            controls=controls if isinstance(controls, list) else None,
        )

    def stream(self, after: Sequence[int] = ()) -> TextStream:
        """Return a decoder of ids that arrive one at a time and continue the ids ``after``."""
        return self._vocabulary.stream(after[-1] if after else None)

    def _chatml(self, messages: Sequence[JsonObject], *, add_generation_prompt: bool) -> list[int]:
        """Encode turns after the format's own system message, unless they begin with one.

        Where tokenizer_info.json says piecewise, role and content are encoded one by one: at once they would merge,
        to other ids than the model was trained on.
        """
        form = self._info["chat"]
        start, end, newline = self._id("<|im_start|>"), self._id("<|im_end|>"), self.encode("\n")
        if messages[0].get("role") != "system":
            messages = [{"role": "system", "content": form["system"]}, *messages]
        ids: list[int] = []
        for message in messages:
            role, content = message.get("role"), message.get("content")
            if role not in ("system", "user", "assistant") or not isinstance(content, str):
                raise RequestError(f"this bundle's chat format has no message of role {role!r} with such content")
            pieces = (role, "\n", content) if form["piecewise"] else (f"{role}\n{content}",)
            ids += [start, *(token for piece in pieces for token in self.encode(piece)), end, *newline]
        return [*ids, start, *self.encode("assistant"), *newline] if add_generation_prompt else ids

    def _with_specials(self, text: str) -> list[int]:
        ids: list[int] = []
        start = 0
        for match in self._special.finditer(text):
            special, before, after = self._vocabulary.specials[match[0]]
            part = text[start : match.start()]
            ids += self._plain(part.rstrip() if before else part, start=not start)
            ids.append(special)
            start = match.end()
            if after:
                start = len(text) - len(text[start:].lstrip())
        return ids + self._plain(text[start:], start=not start)

    def _plain(self, text: str, *, start: bool) -> list[int]:
        return self._vocabulary.encode(self.normalize(text), start=start)

    def _id(self, token: str) -> int:
        if token not in self._vocabulary.specials:
            raise BundleError(f"the tokenizer has no {token}, which its chat format needs")
        return self._vocabulary.specials[token][0]


def _check(info: JsonObject) -> None:
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


def _open(folder: Folder, info: JsonObject) -> LibraryVocabulary | TrieVocabulary:
    if rwkv_vocabulary.FILE in folder:
        return TrieVocabulary(bytes(folder.read(rwkv_vocabulary.FILE)))
    from stages.runtime import library

    shown = [int(index) for index in info.get("shown", ())]
    content = bytes(folder.read(library.FILE))
    return library.LibraryVocabulary(content, normalized=bool(info.get("normalize")), shown=shown)
