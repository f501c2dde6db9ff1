"""A byte-pair encoding over characters with U+2581 for the space, as data, and the tokenizer.json that says it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stages.tokenizers.byte_pairs import Added, assemble, template

SPACE = "\u2581"
# When a U+2581 goes before a text. SEGMENT: before each part between added tokens. TEXT: before the text as a whole.
# The last two are the library's Metaspace, which puts none before a part that begins with a space already.
NEVER, SEGMENT, TEXT, SEGMENT_WITHOUT, TEXT_WITHOUT = "never", "segment", "text", "segment-without", "text-without"
# In this order: the second has then only one space to look at, at either end.
RUNS, EDGES = " {2,}", r"\A | \z"


@dataclass(frozen=True)
class CharacterPairs:
    """``merges`` are in the order of rank; ``lead`` says when U+2581 is put before a text.

    ``collapse`` removes spaces at the edges and repeated ones; ``strip`` removes one space that leads a decoded text;
    ``prefix`` are the tokens that go before every text; ``symbols`` are characters that are joined to nothing. A
    character without a token becomes its bytes' tokens where there is ``byte_fallback``, and else ``unk``.
    """

    vocab: Mapping[str, int]
    merges: Sequence[tuple[str, str]]
    added: Sequence[Added]
    unk: str | None
    byte_fallback: bool
    lead: str
    collapse: bool
    strip: bool
    prefix: tuple[str, ...]
    symbols: tuple[str, ...] = ()


def document(pairs: CharacterPairs) -> dict[str, Any]:
    """Return tokenizer.json as a value."""
    model = {
        "unk_token": pairs.unk,
        "fuse_unk": True,
        "byte_fallback": pairs.byte_fallback,
        "ignore_merges": False,
        "vocab": dict(pairs.vocab),
        "merges": [list(pair) for pair in pairs.merges],
    }
    fallback = [{"type": "ByteFallback"}] if pairs.byte_fallback else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if pairs.strip else []
    return assemble(
        pairs.added,
        normalizer=_normalizer(pairs),
        pre_tokenizer=_pre_tokenizer(pairs.lead, pairs.symbols),
        post_processor=template(pairs.prefix, pairs.added),
        decoder={"type": "Sequence", "decoders": [_replace(SPACE, " "), *fallback, {"type": "Fuse"}, *strip]},
        model=model,
    )


def _normalizer(pairs: CharacterPairs) -> dict[str, Any] | None:
    collapse = [_replace(RUNS, " ", kind="Regex"), _replace(EDGES, "", kind="Regex")] if pairs.collapse else []
    prepend = [{"type": "Prepend", "prepend": SPACE}] if pairs.lead == SEGMENT else []
    return {"type": "Sequence", "normalizers": [*collapse, *prepend, _replace(" ", SPACE)]}


def _pre_tokenizer(lead: str, symbols: Sequence[str]) -> dict[str, Any] | None:
    steps = []
    if lead == TEXT:
        # Metaspace puts nothing before a text that begins with its own character: first with a character that no text
        # has any more, then with the one that is meant.
        steps = [_metaspace(" ", "first"), _metaspace(SPACE, "never")]
    if symbols:
        pattern = {"Regex": "|".join(map(re.escape, symbols))}
        steps.append({"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False})
    return {"type": "Sequence", "pretokenizers": steps} if steps else None


def _metaspace(character: str, scheme: str) -> dict[str, Any]:
    return {"type": "Metaspace", "replacement": character, "prepend_scheme": scheme, "split": False}


def _replace(pattern: str, content: str, kind: str = "String") -> dict[str, Any]:
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}
