"""The tables of vocabularies in JSON, read strictly: tokenizer.json, vocab.json with merges.txt."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from stages.tokenizers.byte_level import BYTES
from stages.tokenizers.byte_pairs import Added
from stages.tokenizers.errors import TokenizerError
from stages.tokenizers.files import read_text
from stages.tokenizers.patterns import DIGIT, GPT2, KNOWN
from stages.tokenizers.ranks import MAX_TOKEN_BYTES

MAX_ADDED = 65_536
_FLAGS = ("special", "normalized", "single_word", "lstrip", "rstrip")


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a vocabulary file; a key given twice is an error, for a parser keeps either."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) != len(pairs):
            keys = [key for key, _ in pairs]
            raise ValueError(f"{len(pairs) - len(value)} keys twice, such as {_first_twice(keys)!r}")
        return value

    try:
        value = json.loads(read_text(path), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        if isinstance(error, TokenizerError):
            raise
        raise TokenizerError(f"{path}: not JSON as expected ({error})") from None
    if not isinstance(value, dict):
        raise TokenizerError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def vocabulary(value: Any, where: str) -> dict[str, int]:
    """Check token -> id of a byte-level vocabulary, where every ASCII character has a token."""
    vocab = table(value, where)
    absent = [byte for character, byte in BYTES.items() if 0x20 < byte < 0x7F and character not in vocab]
    if absent:
        raise TokenizerError(f"{where}: {len(absent)} ASCII characters have no token; this is no byte-level vocabulary")
    return vocab


def table(value: Any, where: str) -> dict[str, int]:
    """Check token -> id: ids are no less than 0 and of one token each, tokens of possible length."""
    if not isinstance(value, dict) or not value:
        raise TokenizerError(f"{where}: no table of tokens and ids")
    wrong = [token for token, index in value.items() if type(index) is not int or index < 0]
    if wrong:
        raise TokenizerError(f"{where}: token {wrong[0]!r} has id {value[wrong[0]]!r}, which is no id")
    long = [token for token in value if len(token) > MAX_TOKEN_BYTES]
    if long:
        raise TokenizerError(f"{where}: token {long[0][:40]!r}... of {len(long[0]):,} characters is no token")
    if len(set(value.values())) != len(value):
        twice = _first_twice(value.values())
        raise TokenizerError(f"{where}: id {twice} has the tokens {[t for t, i in value.items() if i == twice][:3]}")
    return value


def merge_list(value: Any, vocab: Mapping[str, int], where: str) -> list[tuple[str, str]]:
    """Check merges, each ``"left right"`` or ``[left, right]``: both and their union are tokens, and no pair twice."""
    merges: list[tuple[str, str]] = []
    for rank, entry in enumerate(value if isinstance(value, list) else [value]):
        pair = entry.split(" ") if isinstance(entry, str) else entry
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) and part for part in pair):
            raise TokenizerError(f"{where}: merge {rank} is {str(entry)[:60]!r} and not two tokens")
        unknown = [part for part in (*pair, "".join(pair)) if part not in vocab]
        if unknown:
            advice = "; the file has CRLF line endings" if unknown[0].endswith("\r") else ""
            raise TokenizerError(
                f"{where}: merge {rank}, {pair[0]!r} and {pair[1]!r}, needs {unknown[0]!r}, which is not in the "
                f"vocabulary{advice}: the vocabulary is truncated or another model's"
            )
        merges.append((pair[0], pair[1]))
    if len(set(merges)) != len(merges):
        raise TokenizerError(f"{where}: the pair {_first_twice(merges)} is merged twice, with two ranks")
    return merges


def read_merges(path: Path, vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    """Read merges.txt: a version line, then one pair a line in the order of rank."""
    lines = read_text(path).split("\n")
    first = 1 if lines[0].startswith("#version") else 0
    return merge_list([line for line in lines[first:] if line], vocab, str(path))


def added_tokens(value: Any, where: str) -> tuple[Added, ...]:
    """Check the list of added tokens as tokenizer.json has it."""
    entries = value if isinstance(value, list) else [value]
    if len(entries) > MAX_ADDED:
        raise TokenizerError(f"{where}: {len(entries):,} added tokens, far more than any model has")
    tokens = []
    for entry in entries:
        if (
            not isinstance(entry, dict)
            or not isinstance(entry.get("content"), str)
            or not entry["content"]
            or type(entry.get("id")) is not int
            or not all(isinstance(entry.get(flag, False), bool) for flag in _FLAGS)
        ):
            raise TokenizerError(f"{where}: {str(entry)[:80]} is no added token")
        flags = {flag: entry.get(flag, False) for flag in _FLAGS}
        flags["normalized"] = entry.get("normalized", not flags["special"])
        tokens.append(Added(id=entry["id"], content=entry["content"], **flags))
    for what in ("content", "id"):
        values = [getattr(token, what) for token in tokens]
        if len(set(values)) != len(values):
            raise TokenizerError(f"{where}: T03: two added tokens have the {what} {_first_twice(values)!r}")
    return tuple(tokens)


def pipeline(spec: Mapping[str, Any], where: str) -> tuple[bool, tuple[str, ...]]:
    """Return (NFC or not, split patterns) of a tokenizer.json; anything that is not understood is refused by name."""
    normalizer = flat(spec.get("normalizer"), "normalizers")
    if any(part.get("type") != "NFC" for part in normalizer):
        raise TokenizerError(f"{where}: normalizer {_types(normalizer)} is not NFC or none")
    splits: list[str] = []
    parts = flat(spec.get("pre_tokenizer"), "pretokenizers")
    for part in parts:
        splits += _splits(part, where)
    if not parts or parts[-1].get("type") != "ByteLevel":
        raise TokenizerError(f"{where}: T09: pre_tokenizer {_types(parts)} does not end in ByteLevel")
    decoder = flat(spec.get("decoder"), "decoders")
    if _types(decoder) != ["ByteLevel"]:
        raise TokenizerError(f"{where}: T09: text comes back garbled: decoder {_types(decoder)} is not ByteLevel")
    if not splits:
        raise TokenizerError(f"{where}: text is not split before it is merged, which no byte-level model does")
    return bool(normalizer), tuple(splits)


def prefix(spec: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """Return the tokens that the post-processor puts before a text; anything after it, or else, is refused."""
    before: list[str] = []
    for part in flat(spec.get("post_processor"), "processors"):
        if part.get("type") == "ByteLevel":
            continue
        single = part.get("single") if part.get("type") == "TemplateProcessing" else None
        if not isinstance(single, list) or not single or "Sequence" not in single[-1]:
            raise TokenizerError(f"{where}: post_processor {part.get('type')} does more than put tokens before a text")
        before += [str(piece["SpecialToken"]["id"]) for piece in single[:-1] if "SpecialToken" in piece]
    return tuple(before)


def _splits(part: Mapping[str, Any], where: str) -> list[str]:
    kind = part.get("type")
    if kind == "ByteLevel" and not part.get("add_prefix_space"):
        return [GPT2] if part.get("use_regex", True) else []
    if kind == "Digits" and part.get("individual_digits"):
        return [DIGIT]
    if kind == "Split":
        pattern = (part.get("pattern") or {}).get("Regex")
        if pattern in KNOWN and part.get("behavior") == "Isolated" and not part.get("invert"):
            return [pattern]
        known = ", ".join(KNOWN.values())
        raise TokenizerError(
            f"{where}: the split pattern {str(pattern)[:120]!r} is not one of those known here ({known}); a pattern is "
            "run on every text and is not taken from a file: add it to stages/tokenizers/patterns.py"
        )
    raise TokenizerError(f"{where}: pre_tokenizer {kind} with {dict(part)} is not supported")


def flat(part: Any, key: str) -> list[dict[str, Any]]:
    """Return the steps of a component of tokenizer.json, whose Sequences hold them under ``key``."""
    if not isinstance(part, dict):
        return []
    if part.get("type") == "Sequence":
        return [inner for item in part.get(key) or () for inner in flat(item, key)]
    return [part]


def _types(parts: Iterable[Mapping[str, Any]]) -> list[Any]:
    return [part.get("type") for part in parts]


def _first_twice(values: Iterable[Any]) -> Any:
    seen = set()
    for value in values:
        if value in seen:
            return value
        seen.add(value)
    return None
