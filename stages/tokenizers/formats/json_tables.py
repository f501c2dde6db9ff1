"""The tables of vocabularies in JSON, read strictly: tokenizer.json, vocab.json with merges.txt."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.tokenizers.errors import TokenizerError
from stages.tokenizers.files import read_json_text, read_text
from stages.tokenizers.formats.byte_pairs import Added

if TYPE_CHECKING:
    from stages.documents.files import JsonObject


MAX_ADDED = 65_536
MAX_TOKEN = 65_536  # characters; whole programs are tokens of published vocabularies
_FLAGS = ("special", "normalized", "single_word", "lstrip", "rstrip")


def read_object(path: Path) -> JsonObject:
    """Return the JSON object in a vocabulary file; a key given twice is an error, for a parser keeps either."""

    def unique(pairs: list[tuple[str, object]]) -> JsonObject:
        value = dict(pairs)
        if len(value) != len(pairs):
            keys = [key for key, _ in pairs]
            raise ValueError(f"{len(pairs) - len(value)} keys twice, such as {first_twice(keys)!r}")
        return value

    try:
        value = json.loads(read_json_text(path), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        if isinstance(error, TokenizerError):
            raise
        raise TokenizerError(f"{path}: not JSON as expected ({error})") from None
    if not isinstance(value, dict):
        raise TokenizerError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def table(value: Any, where: str) -> dict[str, int]:
    """Check token -> id: ids are no less than 0 and of one token each, tokens of possible length."""
    if not isinstance(value, dict) or not value:
        raise TokenizerError(f"{where}: no table of tokens and ids")
    wrong = [token for token, index in value.items() if type(index) is not int or index < 0]
    if wrong:
        raise TokenizerError(f"{where}: token {wrong[0]!r} has id {value[wrong[0]]!r}, which is no id")
    long = [token for token in value if len(token) > MAX_TOKEN]
    if long:
        raise TokenizerError(f"{where}: token {long[0][:40]!r}... of {len(long[0]):,} characters is no token")
    if len(set(value.values())) != len(value):
        twice = first_twice(value.values())
        raise TokenizerError(f"{where}: id {twice} has the tokens {[t for t, i in value.items() if i == twice][:3]}")
    return value


def scored(value: Any, where: str) -> None:
    """Check the ``[token, score]`` list of a Unigram vocabulary."""
    if not isinstance(value, list) or not value:
        raise TokenizerError(f"{where}: no list of tokens and scores")
    for index, entry in enumerate(value):
        pair = entry if isinstance(entry, list) else []
        if len(pair) != 2 or not isinstance(pair[0], str) or type(pair[1]) not in (int, float):
            raise TokenizerError(f"{where}: entry {index} of the vocabulary is {str(entry)[:60]} and no [token, score]")
        if len(pair[0]) > MAX_TOKEN:
            raise TokenizerError(f"{where}: token {pair[0][:40]!r}... of {len(pair[0]):,} characters is no token")


def by_text(vocab: Any) -> dict[str, int]:
    """Return token -> id of a checked vocabulary, whichever form its model has it in."""
    return {entry[0]: index for index, entry in enumerate(vocab)} if isinstance(vocab, list) else dict(vocab)


def merge_list(value: Any, vocab: Mapping[str, int], where: str) -> list[tuple[str, str]]:
    """Check merges, each ``"left right"`` or ``[left, right]``: both and their union are tokens."""
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
            raise TokenizerError(f"{where}: T03: two added tokens have the {what} {first_twice(values)!r}")
    return tuple(tokens)


def flat(part: Any) -> list[JsonObject]:
    """Return the steps of a component of tokenizer.json, whose Sequences hold them under a name of their own."""
    if not isinstance(part, dict):
        return []
    if part.get("type") == "Sequence":
        return [step for inner in part.values() if isinstance(inner, list) for item in inner for step in flat(item)]
    return [part]


def types(part: Any) -> list[Any]:
    """Return the kinds of a component's steps."""
    return [step.get("type") for step in flat(part)]


def first_twice(values: Iterable[Any]) -> Any:
    """Return the first value that is there a second time, None if none is."""
    seen = set()
    for value in values:
        if value in seen:
            return value
        seen.add(value)
    return None
