"""A vocabulary over characters with U+2581 for the space, as data, and the tokenizer.json that says it."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stages.tokenizers.formats.byte_pairs import Added, assemble, template

if TYPE_CHECKING:
    from stages.documents.files import JsonObject


SPACE = "\u2581"
# When a U+2581 goes before a text. SEGMENT: before each part between added tokens. TEXT: before the text as a whole.
# The last two are the library's Metaspace, which puts none before a part that begins with a space already.
NEVER, SEGMENT, TEXT, SEGMENT_WITHOUT, TEXT_WITHOUT = "never", "segment", "text", "segment-without", "text-without"
# In this order: the second has then only one space to look at, at either end.
RUNS, EDGES = " {2,}", r"\A | \z"


@dataclass(frozen=True)
class Characters:
    """What goes around ``model``, tokenizer.json's, whose tokens are characters; ``lead`` says when U+2581 goes first.

    ``charsmap`` is sentencepiece's table of normal forms, if any; ``collapse`` removes spaces at the edges and repeated
    ones; ``strip`` removes one space that leads a decoded text; ``prefix`` are the tokens that go before every text.
    ``symbols`` are joined to nothing. ``cut`` is a pattern of characters that begin a piece, which keeps apart what
    spells a token that no text may become.
    """

    model: JsonObject
    added: Sequence[Added]
    lead: str
    collapse: bool
    strip: bool
    prefix: tuple[str, ...]
    symbols: tuple[str, ...] = ()
    charsmap: bytes = b""
    cut: str | None = None


def document(characters: Characters) -> JsonObject:
    """Return tokenizer.json as a value."""
    fallback = [{"type": "ByteFallback"}] if characters.model["byte_fallback"] else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if characters.strip else []
    return assemble(
        characters.added,
        normalizer={"type": "Sequence", "normalizers": _normalizers(characters)},
        pre_tokenizer=_pre_tokenizer(characters),
        post_processor=template(characters.prefix, characters.added),
        decoder={"type": "Sequence", "decoders": [_replace(SPACE, " "), *fallback, {"type": "Fuse"}, *strip]},
        model=characters.model,
    )


def _normalizers(characters: Characters) -> list[JsonObject]:
    encoded = base64.b64encode(characters.charsmap).decode()
    table = [{"type": "Precompiled", "precompiled_charsmap": encoded}] if encoded else []
    prepend = [{"type": "Prepend", "prepend": SPACE}] if characters.lead == SEGMENT else []
    collapse = [_replace(RUNS, " ", kind="Regex"), _replace(EDGES, "", kind="Regex")] if characters.collapse else []
    return [*table, *collapse, *prepend, _replace(" ", SPACE)]


def _pre_tokenizer(characters: Characters) -> JsonObject | None:
    steps = []
    if characters.lead == TEXT:
        # Metaspace puts nothing before a text that begins with its own character: first with a character that no text
        # has any more, then with the one that is meant.
        steps = [_metaspace(" ", "first"), _metaspace(SPACE, "never")]
    if characters.symbols:
        longest = sorted(characters.symbols, key=len, reverse=True)
        steps.append(_split("|".join(map(re.escape, longest)), "Isolated"))
    if characters.cut:
        steps.append(_split(characters.cut, "MergedWithNext"))
    return {"type": "Sequence", "pretokenizers": steps} if steps else None


def _split(pattern: str, behavior: str) -> JsonObject:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": False}


def _metaspace(character: str, scheme: str) -> JsonObject:
    return {"type": "Metaspace", "replacement": character, "prepend_scheme": scheme, "split": False}


def _replace(pattern: str, content: str, kind: str = "String") -> JsonObject:
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}
