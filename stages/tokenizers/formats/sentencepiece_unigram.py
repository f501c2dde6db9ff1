"""sentencepiece's Unigram model: of all ways to cut a text into pieces, the one whose scores have the largest sum."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from stages.tokenizers.formats.sentencepiece_model import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    SentencePieceModel,
)
from stages.tokenizers.reference.character_loop import CharacterLoop

if TYPE_CHECKING:
    from stages.documents.files import JsonObject


UNKNOWN_PENALTY = 10.0  # below the worst score of a piece
BYTE_PIECE = "<0x[0-9A-F]{2}>"


def document(model: SentencePieceModel) -> JsonObject:
    """Return the model of tokenizer.json; scores are float32 in the file and float64 there, which is exact."""
    return {
        "type": "Unigram",
        "unk_id": model.unk,
        "byte_fallback": model.byte_fallback,
        "vocab": [[piece.text, piece.score] for piece in model.pieces],
    }


def cut(model: SentencePieceModel) -> str | None:
    """Return the pattern of characters before which a text is cut: the last of what spells a piece no text may become.

    The library looks for every piece in a text, control pieces and those of bytes included; sentencepiece does not.
    """
    spelt = [f"(?<={re.escape(text[:-1])}){re.escape(text[-1])}" for text in _controls(model)]
    bytes_ = ["(?<=<0x[0-9A-F]{2})>"] if model.byte_fallback else []
    return "|".join([*spelt, *bytes_]) or None


def _controls(model: SentencePieceModel) -> list[str]:
    return [piece.text for piece in model.pieces if piece.kind in {UNKNOWN, CONTROL} and len(piece.text) > 1]


class ViterbiLoop(CharacterLoop):
    """Ids of a Unigram model by a plain loop over all pieces that end at each character; sums are float64.

    sentencepiece adds in float32, so of cuts whose sums are equal but for rounding, as in long runs of one character,
    it may take another.
    """

    def __init__(self, model: SentencePieceModel, *, frozen: Sequence[str], **settings: Any) -> None:
        vocab = {piece.text: index for index, piece in enumerate(model.pieces)}
        super().__init__(
            vocab,
            lambda left, right: None,  # noqa: ARG005 - nothing is joined
            unk=model.unk,
            byte_fallback=model.byte_fallback,
            frozen=frozen,
            **settings,
        )
        self._scores = {p.text: p.score for p in model.pieces if p.kind in {NORMAL, USER_DEFINED}}
        self._unknown = min((p.score for p in model.pieces), default=0.0) - UNKNOWN_PENALTY
        self._longest = max(map(len, self._scores), default=1)
        hidden = [re.escape(text) for text in sorted(_controls(model), key=len, reverse=True)]
        hidden += [BYTE_PIECE] if any(piece.kind == BYTE for piece in model.pieces) else []
        self._hidden = re.compile(f"(?=({'|'.join(hidden) or '(?!)'}))")
        longest = sorted(frozen, key=len, reverse=True)
        self._apart = re.compile(f"({'|'.join(map(re.escape, longest)) or '(?!)'})")

    def _pieces(self, text: str) -> Iterable[str]:
        for part in filter(None, self._apart.split(text)):
            if part in self._frozen:
                yield part
                continue
            edges = {0, len(part), *(found.start() + len(found[1]) - 1 for found in self._hidden.finditer(part))}
            for start, end in pairwise(sorted(edges)):
                yield from self._best(part[start:end])

    def _best(self, text: str) -> Iterator[str]:
        """Yield the pieces of the largest sum; of equal sums, the one whose last piece begins first."""
        sums, begins = [0.0] + [-math.inf] * len(text), [0] * (len(text) + 1)
        for start in range(len(text)):
            for end in range(start + 1, min(len(text), start + self._longest) + 1):
                score = self._scores.get(text[start:end])
                if score is None:
                    if end > start + 1:
                        continue
                    score = self._unknown
                if sums[start] + score > sums[end]:
                    sums[end], begins[end] = sums[start] + score, start
        found, end = [], len(text)
        while end:
            found.append(text[begins[end] : end])
            end = begins[end]
        yield from reversed(found)
