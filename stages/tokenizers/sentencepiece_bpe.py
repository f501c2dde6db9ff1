"""sentencepiece's byte-pair encoding: ``tokenizer.model`` (Llama 2, Mistral), scores and all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from stages.tokenizers import json_tables
from stages.tokenizers.byte_pairs import Added, load
from stages.tokenizers.character_loop import CharacterLoop
from stages.tokenizers.errors import TokenizerError
from stages.tokenizers.metaspace import NEVER, SEGMENT, SPACE, TEXT, CharacterPairs, document
from stages.tokenizers.ranks import bound_cuts, bound_lengths
from stages.tokenizers.record import TokenizerFamily
from stages.tokenizers.sentencepiece_model import (
    BPE,
    BYTE,
    CONTROL,
    MODELS,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    SentencePieceModel,
    read_model,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from stages.tokenizers.resolution import Resolution

MAX_SHOWN = 3


def convert(resolution: Resolution) -> Tokenizer:
    """Build the equivalent tokenizer; :class:`TokenizerError` with everything that has no exact equivalent."""
    path = resolution.vocabulary
    model = read_model(path)
    added = _added(resolution, model)
    problems = [*_unlike(model), *_unsound(model), *_contradicted(model, added), *_inexact(resolution, model)]
    if problems:
        raise TokenizerError(*(f"{path}: {problem}" for problem in problems))
    lead = _lead(resolution, model)
    pairs = CharacterPairs(
        vocab={piece.text: index for index, piece in enumerate(model.pieces)},
        merges=_merges(model),
        added=added,
        unk=model.pieces[model.unk].text,
        byte_fallback=model.byte_fallback,
        lead=lead,
        collapse=model.remove_extra_whitespaces,
        strip=lead != NEVER,
        prefix=_prefix(resolution, model, added),
        symbols=_isolated(resolution, model),
    )
    return load(document(pairs), added)


def _unlike(model: SentencePieceModel) -> Iterator[str]:
    """Yield what makes the model one of another kind than is converted here."""
    if model.model_type != BPE:
        kind = MODELS.get(model.model_type, str(model.model_type))
        yield f"the model is {kind} and not BPE: its pieces are chosen by probability, which merges cannot say"
    if model.charsmap:
        yield (
            "text is normalised by a table inside the model (nmt_nfkc or the like), which no other library applies "
            "exactly; only models that were trained with normalization_rule_name=identity are converted"
        )
    if model.whitespace_as_suffix or not model.escape_whitespaces:
        yield f"spaces are not written as {SPACE!r} before a word"


def _unsound(model: SentencePieceModel) -> Iterator[str]:
    """Yield faults of the vocabulary."""
    texts = Counter(piece.text for piece in model.pieces)
    if len(texts) != len(model.pieces):
        twice = next(text for text, count in texts.items() if count > 1)
        yield f"T05: piece {twice!r} is there {texts[twice]} times, with ids of its own"
    of_bytes = {piece.text for piece in model.pieces if piece.kind == BYTE}
    expected = {f"<0x{byte:02X}>" for byte in range(256)} if model.byte_fallback else set()
    if of_bytes != expected:
        yield f"T12: there are tokens of {len(of_bytes)} bytes and must be of {len(expected)}; the file is truncated"
    unknown = [index for index, piece in enumerate(model.pieces) if piece.kind == UNKNOWN]
    if unknown != [model.unk]:
        yield f"the unknown pieces have ids {unknown[:MAX_SHOWN]} and the trainer says {model.unk}"


def _contradicted(model: SentencePieceModel, added: Sequence[Added]) -> Iterator[str]:
    """Yield the tokens that are stated with an id that is another piece's."""
    for token in added:
        piece = model.pieces[token.id].text if token.id < len(model.pieces) else token.content
        if piece != token.content:
            yield f"T05: {token.content!r} is stated to have id {token.id}, which is {piece!r}: a file of another model"


def _inexact(resolution: Resolution, model: SentencePieceModel) -> Iterator[str]:
    """Yield what sentencepiece does and a tokenizer.json cannot say."""
    unused = [piece.text for piece in model.pieces if piece.kind == UNUSED]
    if unused:
        yield f"{len(unused)} pieces are unused ({unused[:MAX_SHOWN]}): they are merged and then taken apart again"
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
    spaced = [text for text in defined if SPACE in text or " " in text]
    if spaced:
        yield f"the user-defined symbols {spaced[:MAX_SHOWN]} have spaces in them"
    if model.remove_extra_whitespaces and resolution.config.get("legacy") is False:
        yield 'remove_extra_whitespaces together with "legacy": false of tokenizer_config.json'
    if resolution.config.get("add_eos_token"):
        yield "add_eos_token of tokenizer_config.json would end a prompt before the model continues it"


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


def _lead(resolution: Resolution, model: SentencePieceModel) -> str:
    """Say when a space goes before a text; what ``legacy`` leaves to each part is as in transformers."""
    if not model.dummy_prefix or resolution.config.get("add_prefix_space") is False:
        return NEVER
    return TEXT if resolution.config.get("legacy") is False else SEGMENT


def _isolated(resolution: Resolution, model: SentencePieceModel) -> tuple[str, ...]:
    """Return the user-defined symbols of one character, which splitting the text can keep apart (digits, a newline)."""
    if _lead(resolution, model) == NEVER:
        return ()
    return tuple(piece.text for piece in model.pieces if piece.kind == USER_DEFINED and len(piece.text) == 1)


def shown(resolution: Resolution) -> list[int]:
    """Return the ids of user-defined symbols that are special tokens here, but text all the same when they come out."""
    model = read_model(resolution.vocabulary)
    symbols = {piece.text for piece in model.pieces if piece.kind == USER_DEFINED}
    return [token.id for token in _added(resolution, model) if token.special and token.content in symbols]


def _added(resolution: Resolution, model: SentencePieceModel) -> tuple[Added, ...]:
    """Return the control pieces as special tokens, user-defined symbols, and what is stated beside them.

    Where a space goes before a text, no added token can stand in it and leave the rest without a space of its own:
    user-defined symbols are special tokens then, which a user's text does not become.
    """
    inside, isolated = _lead(resolution, model) == NEVER, _isolated(resolution, model)
    own = [
        {"id": index, "content": piece.text, "special": not (inside and piece.kind == USER_DEFINED)}
        for index, piece in enumerate(model.pieces)
        if piece.kind in {UNKNOWN, CONTROL, USER_DEFINED}
    ]
    stated = resolution.config.get("added_tokens_decoder")
    if isinstance(stated, dict) and stated:
        entries = [{**entry, "id": int(index)} for index, entry in stated.items()]
    else:
        entries = [{"id": i, "content": text, "special": True} for i, text in resolution.declared.items()]
    named = {entry["content"] for entry in entries}
    entries += [entry for entry in own if entry["content"] not in named]
    entries = [entry for entry in entries if entry["content"] not in isolated]
    # A model's own tokens are found in the text as it is, whatever tokenizer_config.json says for other libraries.
    return json_tables.added_tokens([{**entry, "normalized": False} for entry in entries], "added tokens")


def _prefix(resolution: Resolution, model: SentencePieceModel, added: tuple[Added, ...]) -> tuple[str, ...]:
    """Return the begin of text, which goes before every text unless the checkpoint says otherwise."""
    text = resolution.roles.get("bos") or (model.pieces[model.bos].text if 0 <= model.bos < len(model.pieces) else None)
    if resolution.config.get("add_bos_token", True) is False or text is None:
        return ()
    if text not in {token.content for token in added}:
        raise TokenizerError(f"{resolution.vocabulary}: T14: bos_token {text!r} is none of the special tokens")
    return (text,)


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


def reference(resolution: Resolution) -> CharacterLoop:
    """Read the scores in a plain loop; :class:`TokenizerError` for a model that merges by something else."""
    model = read_model(resolution.vocabulary)
    problems = [*_unlike(model), *_unsound(model)]
    if problems:
        raise TokenizerError(*problems)
    scores = {piece.text: piece.score for piece in model.pieces if piece.kind == NORMAL}
    lead, added = _lead(resolution, model), _added(resolution, model)
    isolated = _isolated(resolution, model)
    defined = [piece.text for piece in model.pieces if piece.kind == USER_DEFINED]
    frozen = [text for text in defined if lead == NEVER or text in isolated]
    vocab = {piece.text: index for index, piece in enumerate(model.pieces)}
    ids = vocab | {token.content: token.id for token in added}

    def rank(left: str, right: str) -> float | None:
        score = scores.get(left + right)
        return None if score is None else -score

    return CharacterLoop(
        vocab,
        rank,
        added=[vars(token) for token in added if token.content not in frozen],
        unk=model.unk,
        byte_fallback=model.byte_fallback,
        lead=lead,
        collapse=model.remove_extra_whitespaces,
        strip=lead != NEVER,
        prefix=[ids[text] for text in _prefix(resolution, model, added)],
        frozen=frozen,
    )


def doubts(resolution: Resolution) -> Sequence[str]:
    """Return where the emitted tokenizer is deliberately not sentencepiece's."""
    model = read_model(resolution.vocabulary)
    ids = shown(resolution)
    if not ids:
        return ()
    first = model.pieces[ids[0]].text
    said = f"T13: the {len(ids)} user-defined symbols, such as {first!r}, are special tokens here"
    return (f"{said}: a user's text that spells one stays text, where sentencepiece would make it the symbol",)


FAMILY = TokenizerFamily(
    name="sentencepiece-bpe",
    convert=convert,
    reference=reference,
    normalize=None,
    end_of_text=("</s>",),
    chats={},
    doubts=doubts,
    shown=shown,
)
