"""A byte-level byte-pair encoding as data, and the tokenizer.json that says it: one form for all ways to store it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from stages.tokenizers import library
from stages.tokenizers.errors import TokenizerError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from stages.documents.files import JsonObject


@dataclass(frozen=True)
class Added:
    """A token matched in the text before it is split; ``normalized`` ones are sought in the normalised text.

    ``lstrip`` and ``rstrip`` take the white space beside it along; ``single_word`` wants no letter beside it.
    """

    id: int
    content: str
    special: bool
    normalized: bool
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False


@dataclass(frozen=True)
class BytePairs:
    """``vocab`` and ``merges`` are spelled in the byte-level alphabet; ``split`` is the pattern of pieces.

    ``prefix`` are the tokens that go before every text. A piece that is a token stays one, whatever the merges.
    """

    vocab: Mapping[str, int]
    merges: Sequence[tuple[str, str]]
    added: Sequence[Added]
    split: str
    prefix: tuple[str, ...]


def build(pairs: BytePairs) -> Tokenizer:
    """Return the tokenizer; :class:`TokenizerError` where the library refuses the merges or gives other ids."""
    return load(document(pairs), pairs.added)


def load(value: JsonObject, added: Sequence[Added]) -> Tokenizer:
    """Return the tokenizer of a tokenizer.json's value; :class:`TokenizerError` if its added tokens get other ids."""
    refused = "the tokenizers library does not take the vocabulary"
    tokenizer = library.load(json.dumps(value, ensure_ascii=False), refused)
    moved = [token for token in added if tokenizer.token_to_id(token.content) != token.id]
    if moved:
        raise TokenizerError(
            f"added token {moved[0].content!r} has id {moved[0].id}, which is not the next one after the vocabulary "
            f"(it would become {tokenizer.token_to_id(moved[0].content)}); the ids of {len(moved)} added tokens leave "
            "a gap or repeat: the vocabulary is truncated, or the added tokens belong to another model"
        )
    return tokenizer


def document(pairs: BytePairs) -> JsonObject:
    """Return tokenizer.json as a value."""
    model = merging(pairs.vocab, pairs.merges, unk_token=None, fuse_unk=False, byte_fallback=False, ignore_merges=True)
    plain, before = _byte_level(trim_offsets=False), template(pairs.prefix, pairs.added)
    return assemble(
        pairs.added,
        normalizer=None,
        pre_tokenizer=_pre_tokenizer(pairs.split),
        post_processor={"type": "Sequence", "processors": [plain, before]} if before else plain,
        decoder=_byte_level(),
        model=model,
    )


def assemble(added: Sequence[Added], *, model: JsonObject, **parts: Any) -> JsonObject:
    """Return a tokenizer.json with the ``parts`` of its pipeline and the ``model``."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [asdict(token) for token in sorted(added, key=lambda token: token.id)],
        **parts,
        "model": dict(model),
    }


def merging(vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], **options: Any) -> JsonObject:
    """Return the model of a tokenizer.json that joins the pairs of ``merges``, the first of them first."""
    return {
        "type": "BPE",
        "dropout": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        **options,
        "vocab": dict(vocab),
        "merges": [list(pair) for pair in merges],
    }


def template(prefix: Sequence[str], added: Sequence[Added]) -> JsonObject | None:
    """Return the post-processor that puts the tokens of ``prefix`` before every text; None for none."""
    if not prefix:
        return None
    ids = {token.content: token.id for token in added}
    before = [{"SpecialToken": {"id": text, "type_id": 0}} for text in prefix]
    return {
        "type": "TemplateProcessing",
        "single": [*before, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [*before, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {t: {"id": t, "ids": [ids[t]], "tokens": [t]} for t in prefix},
    }


def _pre_tokenizer(pattern: str) -> JsonObject:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, _byte_level(use_regex=False)]}


def _byte_level(*, trim_offsets: bool = True, use_regex: bool = True) -> JsonObject:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": trim_offsets, "use_regex": use_regex}
