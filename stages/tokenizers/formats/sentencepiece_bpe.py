"""sentencepiece's byte-pair encoding: of all neighbours whose union is a piece those of the best score are joined."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby
from typing import TYPE_CHECKING

from stages.tokenizers.formats.byte_pairs import merging
from stages.tokenizers.formats.ranks import bound_cuts, bound_lengths
from stages.tokenizers.formats.sentencepiece_model import MAX_SHOWN, NORMAL, USER_DEFINED, SentencePieceModel

if TYPE_CHECKING:
    from stages.documents.files import JsonObject


def document(model: SentencePieceModel) -> JsonObject:
    """Return the model of tokenizer.json."""
    return merging(
        {piece.text: index for index, piece in enumerate(model.pieces)},
        _merges(model),
        unk_token=model.pieces[model.unk].text,
        fuse_unk=True,
        byte_fallback=model.byte_fallback,
        ignore_merges=False,
    )


def rank(model: SentencePieceModel) -> Callable[[str, str], float | None]:
    """Return the priority with which two neighbours are joined, the lowest first; None if they never are."""
    scores = {piece.text: piece.score for piece in model.pieces if piece.kind == NORMAL}

    def of(left: str, right: str) -> float | None:
        score = scores.get(left + right)
        return None if score is None else -score

    return of


def inexact(model: SentencePieceModel) -> Iterator[str]:
    """Yield the behaviours of sentencepiece that merges cannot represent."""
    known = {piece.text for piece in model.pieces if piece.kind == NORMAL}
    ends = {part for text in known if len(text) > 1 for part in _ends(text, known)}
    if ends:
        shown = sorted(ends)[:MAX_SHOWN]
        yield f"{len(ends)} pieces join a character that is no piece ({shown}), which sentencepiece alone does"
    for tied in _tied(model):
        if len(tied) > 1 and len(set("".join(tied))) > 1:
            yield f"{len(tied)} pieces share a score ({tied[:MAX_SHOWN]}): of equals the leftmost is merged first"
    defined = [piece.text for piece in model.pieces if piece.kind == USER_DEFINED]
    if defined and model.remove_extra_whitespaces:
        yield f"there are user-defined symbols ({defined[:MAX_SHOWN]}), and spaces beside them are removed"


def _tied(model: SentencePieceModel) -> list[list[str]]:
    """Return the pieces that are merged, the best score first, those of one score together."""
    mergeable = (piece for piece in model.pieces if piece.kind == NORMAL and len(piece.text) > 1)
    ranked = sorted(mergeable, key=lambda piece: -piece.score)
    return [[piece.text for piece in tied] for _, tied in groupby(ranked, key=lambda piece: piece.score)]


def _ends(text: str, known: set[str]) -> Iterator[str]:
    """Yield the first or the last character of a piece if it is no piece but could be joined to the rest."""
    for character, rest in ((text[0], text[1:]), (text[-1], text[:-1])):
        if character not in known and (rest in known or len(rest) == 1):
            yield character


def _merges(model: SentencePieceModel) -> list[tuple[str, str]]:
    """Return every way to make each piece of two others, the best score first."""
    known = {piece.text for piece in model.pieces if piece.kind == NORMAL}
    bound_lengths(known)
    cuts: list[tuple[str, str]] = []
    for tied in _tied(model):
        bound_cuts(len(cuts))
        # Pieces of one score are runs of one character. Of these the leftmost grows, so the longest left side is first.
        found = [(text[:at], text[at:]) for text in tied for at in splits(text)]
        pairs = [pair for pair in found if pair[0] in known and pair[1] in known]
        cuts += pairs if len(tied) == 1 else sorted(pairs, key=lambda pair: (-len(pair[0]), -len(pair[1])))
    return cuts


def splits(text: str) -> list[int]:
    """Return where to cut ``text`` in two, in the order in which cuts must be tried.

    One score for all cuts means that of two that meet the left one is made. They meet where the right side of one is
    the left side of the other, which is so for parts that ``text`` both begins and ends with.
    """
    size = len(text)
    cuts = list(range(size - 1, 0, -1))
    for at in range(size - 1, size // 2, -1):
        other = size - at
        if text.startswith(text[other:]) and not text.startswith(text[at:]):
            cuts[size - 1 - at], cuts[size - 1 - other] = other, at
    return cuts
