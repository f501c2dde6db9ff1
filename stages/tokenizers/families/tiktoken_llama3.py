"""Llama 3: a ``tokenizer.model`` of ranks as tiktoken has them, and the special tokens that other files state."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from stages.tokenizers.errors import TokenizerError
from stages.tokenizers.formats import json_tables
from stages.tokenizers.formats.byte_level import spell
from stages.tokenizers.formats.byte_pairs import Added, BytePairs, build
from stages.tokenizers.formats.patterns import LLAMA3
from stages.tokenizers.formats.ranks import all_splits, read_ranks
from stages.tokenizers.reference.tiktoken_reference import TiktokenReference, ranks_of
from stages.tokenizers.tokenizer_family import TokenizerFamily

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from stages.tokenizers.resolution import Resolution

TABLES = "tokenizer.json"
BEGIN = "<|begin_of_text|>"
WHAT = "the special tokens are not in tokenizer.model"


def convert(resolution: Resolution) -> Tokenizer:
    """Build the tokenizer; :class:`TokenizerError` if no file states the special tokens, or other ids than follow."""
    path = resolution.vocabulary
    ranks = read_ranks(path)
    added = _special_tokens(resolution)
    wrong = [token for token in added if token.id < len(ranks)]
    if wrong:
        raise TokenizerError(
            f"{path}: special token {wrong[0].content!r} is stated to have id {wrong[0].id}, which is a rank of the "
            f"vocabulary (0..{len(ranks) - 1}): the files belong to different models"
        )
    return build(
        BytePairs(
            vocab={spell(token): rank for token, rank in ranks.items()},
            merges=[(spell(left), spell(right)) for left, right in all_splits(ranks)],
            added=added,
            split=LLAMA3,
            prefix=tuple(_prefix(resolution, added)),
        )
    )


def _special_tokens(resolution: Resolution) -> tuple[Added, ...]:
    stated = resolution.config.get("added_tokens_decoder")
    if isinstance(stated, dict) and stated:
        entries: list[Any] = [{**entry, "id": int(index)} for index, entry in stated.items()]
        where = "tokenizer_config.json: added_tokens_decoder"
    elif TABLES in resolution.files:
        entries = json_tables.read_object(resolution.files[TABLES]).get("added_tokens") or []
        where = f"{resolution.files[TABLES]}: added_tokens"
    else:
        entries = []
    if not entries:
        raise TokenizerError(
            f"{resolution.vocabulary}: {WHAT}; add tokenizer_config.json with its added_tokens_decoder, or {TABLES}"
        )
    return json_tables.added_tokens(entries, where)


def _begin(resolution: Resolution) -> Any:
    """Return what goes before every text unless the checkpoint says otherwise."""
    bos = resolution.config.get("bos_token", BEGIN)
    if resolution.config.get("add_bos_token", True) is False:
        return None
    return bos.get("content") if isinstance(bos, dict) else bos


def _prefix(resolution: Resolution, added: Sequence[Added]) -> list[str]:
    text = _begin(resolution)
    if text is not None and text not in [token.content for token in added]:
        raise TokenizerError(f"{resolution.vocabulary}: T14: bos_token {text!r} is none of the special tokens")
    return [] if text is None else [text]


class Llama3Reference(TiktokenReference):
    """tiktoken on the same ranks and the special tokens as the JSON beside them states them."""

    def __init__(self, resolution: Resolution) -> None:
        stated = resolution.config.get("added_tokens_decoder")
        if not stated:
            table = json.loads(resolution.files[TABLES].read_bytes())["added_tokens"]
            stated = {entry["id"]: entry for entry in table}
        specials = {entry["content"]: int(index) for index, entry in stated.items()}
        super().__init__("llama3", LLAMA3, ranks_of(resolution.vocabulary), specials, _begin(resolution))


FAMILY = TokenizerFamily(
    name="tiktoken-llama3",
    convert=convert,
    reference=Llama3Reference,
    normalize=None,
    end_of_text=("<|end_of_text|>",),
    chats={},
)
