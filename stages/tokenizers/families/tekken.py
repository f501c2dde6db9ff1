"""Mistral's Tekken: ``tekken.json`` holds ranks as tiktoken has them; the special tokens have the ids before them."""

from __future__ import annotations

import base64
import binascii
import json
from typing import TYPE_CHECKING, Any

from stages.tokenizers.errors import TokenizerError
from stages.tokenizers.formats import json_tables
from stages.tokenizers.formats.byte_level import spell
from stages.tokenizers.formats.byte_pairs import Added, BytePairs, build
from stages.tokenizers.formats.patterns import TEKKEN
from stages.tokenizers.formats.ranks import MAX_TOKEN_BYTES, all_splits
from stages.tokenizers.reference.tiktoken_reference import TiktokenReference
from stages.tokenizers.tokenizer_family import TokenizerFamily

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from stages.documents.files import JsonObject
    from stages.tokenizers.resolution import Resolution

BEGIN = "<s>"
# Files before version v11 may leave them out; mistral-common then has these, and a filler for every id after them.
UNSTATED = (
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]",
    "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]",
)  # fmt: skip
WITHOUT_TOKENS = ("v1", "v2", "v3", "v7")


def convert(resolution: Resolution) -> Tokenizer:
    """Build the equivalent tokenizer; :class:`TokenizerError` for a file that is not sound."""
    path = resolution.vocabulary
    value = json_tables.read_object(path)
    config = value.get("config")
    if not isinstance(config, dict) or config.get("pattern") != TEKKEN:
        found = config.get("pattern") if isinstance(config, dict) else None
        raise TokenizerError(
            f"{path}: the split pattern {str(found)[:120]!r} is not Tekken's; a pattern is run on every text and is "
            "not taken from a file: add it to stages/tokenizers/formats/patterns.py"
        )
    try:
        size, count = int(config["default_vocab_size"]), int(config["default_num_special_tokens"])
        ranks = _ranks(value.get("vocab"), size - count)
        specials = _special_tokens(value.get("special_tokens"), count, str(config.get("version")))
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise TokenizerError(f"{path}: {error}") from None
    bos = _begin(resolution)
    if bos is not None and bos not in specials:
        raise TokenizerError(f"{path}: T14: bos_token {bos!r} is none of the special tokens")
    vocab = {text: index for index, text in enumerate(specials)}
    spelled = {spell(token): count + rank for token, rank in ranks.items()}
    both = sorted(vocab.keys() & spelled.keys())
    if both:
        raise TokenizerError(f"{path}: T04: special token {both[0]!r} is an ordinary token too")
    return build(
        BytePairs(
            vocab=vocab | spelled,
            merges=[(spell(left), spell(right)) for left, right in all_splits(ranks)],
            added=[Added(id=index, content=text, special=True, normalized=False) for text, index in vocab.items()],
            split=TEKKEN,
            prefix=(bos,) if bos else (),
        )
    )


def _ranks(entries: Any, size: int) -> dict[bytes, int]:
    """Return token -> rank of the first ``size`` entries; what comes after them is in the file and not in use."""
    if not isinstance(entries, list) or not 256 <= size <= len(entries):
        count = len(entries) if isinstance(entries, list) else 0
        raise ValueError(f"{size} tokens are in use and the file has {count}: it is truncated")
    ranks: dict[bytes, int] = {}
    for rank, entry in enumerate(entries[:size]):
        if not isinstance(entry, dict) or entry.get("rank") != rank or not isinstance(entry.get("token_bytes"), str):
            raise ValueError(f"vocab[{rank}] is {str(entry)[:80]} and not the token of rank {rank}")
        try:
            token = base64.b64decode(entry["token_bytes"], validate=True)
        except binascii.Error as error:
            raise ValueError(f"vocab[{rank}]: token_bytes is not base64 ({error})") from None
        if not 0 < len(token) <= MAX_TOKEN_BYTES:
            raise ValueError(f"vocab[{rank}]: a token of {len(token)} bytes (1 to {MAX_TOKEN_BYTES} are possible)")
        if token in ranks:
            raise ValueError(f"token {token!r} has the ranks {ranks[token]} and {rank}")
        ranks[token] = rank
    absent = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if absent:
        raise ValueError(f"T11: {len(absent)} of the 256 single bytes have no token")
    return ranks


def _special_tokens(entries: Any, count: int, version: str) -> list[str]:
    """Return the special tokens by id: those that are stated, and fillers up to ``count``."""
    if entries is None and version in WITHOUT_TOKENS:
        entries = [{"rank": rank, "token_str": text} for rank, text in enumerate(UNSTATED)]
    if not isinstance(entries, list) or not 0 <= count <= json_tables.MAX_ADDED:
        raise ValueError(f"no list of special tokens, or no possible number of them ({count:,})")
    stated: dict[int, str] = {}
    for entry in entries:
        rank, text = (entry.get("rank"), entry.get("token_str")) if isinstance(entry, dict) else (None, None)
        if type(rank) is not int or not 0 <= rank < count or not isinstance(text, str) or not text or rank in stated:
            raise ValueError(f"special token {str(entry)[:80]} has no id of its own below {count}")
        stated[rank] = text
    tokens = [stated.get(rank, f"<SPECIAL_{rank}>") for rank in range(count)]
    if len(set(tokens)) != len(tokens):
        raise ValueError(f"T03: special token {json_tables.first_twice(tokens)!r} is there twice")
    return tokens


def _begin(resolution: Resolution) -> str | None:
    """Return the begin of text, which goes before every text unless the checkpoint says otherwise."""
    return None if resolution.config.get("add_bos_token", True) is False else resolution.roles.get("bos", BEGIN)


class TekkenReference(TiktokenReference):
    """tiktoken on the ranks, moved behind the special tokens; its own reading of the file."""

    def __init__(self, resolution: Resolution) -> None:
        value: JsonObject = json.loads(resolution.vocabulary.read_bytes())
        config, size = value["config"], value["config"]["default_num_special_tokens"]
        used = value["vocab"][: config["default_vocab_size"] - size]
        ranks = {base64.b64decode(entry["token_bytes"]): size + entry["rank"] for entry in used}
        stated = value.get("special_tokens") or [{"rank": i, "token_str": text} for i, text in enumerate(UNSTATED)]
        names = {entry["rank"]: entry["token_str"] for entry in stated}
        specials = {names.get(i, f"<SPECIAL_{i}>"): i for i in range(size)}
        super().__init__("tekken", config["pattern"], ranks, specials, _begin(resolution))


FAMILY = TokenizerFamily(
    name="tekken",
    convert=convert,
    reference=TekkenReference,
    normalize=None,
    end_of_text=("</s>",),
    chats={},
)
