"""Byte-pair encodings over characters in ``tokenizer.json``: what came out of sentencepiece (Llama 2, Mistral)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from stages.tokenizers import json_tables
from stages.tokenizers.byte_pairs import load
from stages.tokenizers.character_loop import CharacterLoop
from stages.tokenizers.errors import TokenizerError
from stages.tokenizers.metaspace import NEVER, SEGMENT, SEGMENT_WITHOUT, SPACE, TEXT_WITHOUT, CharacterPairs, document
from stages.tokenizers.record import TokenizerFamily

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from stages.tokenizers.resolution import Resolution

PREPEND = {"type": "Prepend", "prepend": SPACE}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
BACK = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
BYTES, FUSE = {"type": "ByteFallback"}, {"type": "Fuse"}
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
SCHEMES = {"never": NEVER, "always": SEGMENT_WITHOUT, "first": TEXT_WITHOUT}


def convert(resolution: Resolution) -> Tokenizer:
    """Build the tokenizer that the file describes; :class:`TokenizerError` for what cannot be followed exactly."""
    where = str(resolution.vocabulary)
    spec = json_tables.read_object(resolution.vocabulary)
    model = spec.get("model")
    kind = model.get("type") if isinstance(model, dict) else None
    if not isinstance(model, dict) or kind not in {"BPE", None}:
        raise TokenizerError(f"{where}: the model is {kind} and not BPE: only its own library can say its ids")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"):
        if model.get(key):
            raise TokenizerError(f"{where}: model.{key} is {model[key]!r}; a vocabulary of sentencepiece has none")
    vocab = json_tables.table(model.get("vocab"), where)
    unk, fallback = model.get("unk_token"), bool(model.get("byte_fallback"))
    if (unk is not None or not fallback) and str(unk) not in vocab:
        raise TokenizerError(f"{where}: model.unk_token {unk!r} is no token, and it is what other characters become")
    if unk is not None and not fallback and not model.get("fuse_unk"):
        raise TokenizerError(f"{where}: model.fuse_unk is off, which sentencepiece never does")
    absent = [byte for byte in range(256) if fallback and f"<0x{byte:02X}>" not in vocab]
    if absent:
        raise TokenizerError(f"{where}: T12: {len(absent)} of the 256 tokens of bytes are missing; it is truncated")
    added = json_tables.added_tokens(spec.get("added_tokens") or [], where)
    before = json_tables.prefix(spec, where)
    unknown = [text for text in before if text not in {token.content for token in added}]
    if unknown:
        raise TokenizerError(f"{where}: post_processor puts {unknown[0]!r} before a text, which is no added token")
    merges = json_tables.merge_list(model.get("merges"), vocab, where)
    reserved = {token.content for token in added if token.special}
    forging = [pair for pair in merges if "".join(pair) in reserved]
    if forging:
        raise TokenizerError(f"{where}: merging {forging[0]} makes a special token out of ordinary text")
    pairs = CharacterPairs(
        vocab=vocab,
        merges=merges,
        added=added,
        unk=unk,
        byte_fallback=fallback,
        lead=_lead(spec, where),
        collapse=False,
        strip=_strips(spec, where, fallback=fallback),
        prefix=before,
    )
    return load(document(pairs), added)


def _lead(spec: Mapping[str, Any], where: str) -> str:
    """Return when a space goes before a text; anything that is not understood is refused by name."""
    normalizer = json_tables.flat(spec.get("normalizer"), "normalizers")
    parts = json_tables.flat(spec.get("pre_tokenizer"), "pretokenizers")
    if not parts and normalizer in ([PREPEND, REPLACE], [REPLACE, PREPEND]):
        return SEGMENT
    if not parts and normalizer == [REPLACE]:
        return NEVER
    if not normalizer and len(parts) == 1 and parts[0].get("type") == "Metaspace":
        part = parts[0]
        known = part.get("replacement") == SPACE and part.get("split") is False
        if known and part.get("prepend_scheme") in SCHEMES:
            return SCHEMES[part["prepend_scheme"]]
    raise TokenizerError(
        f"{where}: normalizer {json.dumps(normalizer)[:200]} with pre_tokenizer {json.dumps(parts)[:200]} is none of "
        f"those that put {SPACE!r} for spaces: Prepend and Replace, Replace alone, or Metaspace that does not split"
    )


def _strips(spec: Mapping[str, Any], where: str, *, fallback: bool) -> bool:
    decoder = json_tables.flat(spec.get("decoder"), "decoders")
    expected = [BACK, *([BYTES] if fallback else []), FUSE]
    if decoder not in (expected, [*expected, STRIP]):
        types = [part.get("type") for part in decoder]
        raise TokenizerError(
            f"{where}: T09: decoder {types} does not undo what is done to text: Replace, "
            f"{'ByteFallback, ' if fallback else ''}Fuse and possibly Strip of one space"
        )
    return len(decoder) > len(expected)


def reference(resolution: Resolution) -> CharacterLoop:
    """Open the same file in a plain loop, which reads its JSON itself."""
    where = str(resolution.vocabulary)
    spec = json.loads(resolution.vocabulary.read_bytes())
    model, added = spec["model"], spec.get("added_tokens") or []
    pairs = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
    ranks = {pair: rank for rank, pair in enumerate(pairs)}
    ids = {token["content"]: token["id"] for token in added}
    fallback = bool(model.get("byte_fallback"))
    return CharacterLoop(
        model["vocab"],
        lambda left, right: ranks.get((left, right)),
        added=added,
        unk=model["vocab"].get(model.get("unk_token")),
        byte_fallback=fallback,
        lead=_lead(spec, where),
        strip=_strips(spec, where, fallback=fallback),
        prefix=[ids[text] for text in json_tables.prefix(spec, where)],
    )


FAMILY = TokenizerFamily(
    name="metaspace-bpe",
    convert=convert,
    reference=reference,
    normalize=None,
    end_of_text="</s>",
    chats={},
)
