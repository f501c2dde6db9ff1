"""The checks T01 to T18 of an emitted tokenizer: each is for one mistake that bundles have had.

E findings fail the build, W findings are shown by every run, N findings are noted in the node's pages. Comparing ids
and text with the reference (T19 to T21) is in :mod:`stages.tokenizers.proof.equality`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.tokenizers import library
from stages.tokenizers.errors import TokenizerError
from stages.tokenizers.files import read_bytes
from stages.tokenizers.formats.byte_level import CHARACTERS
from stages.tokenizers.formats.json_tables import by_text
from stages.tokenizers.formats.world_vocabulary import FILE as WORLD
from stages.tokenizers.formats.world_vocabulary import WorldTokenizer
from stages.tokenizers.resolution import read_json
from stages.tokenizers.tokenizer_family import Finding, ModelFacts

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from stages.documents.files import JsonObject

ERROR, WARNING, NOTE = "E", "W", "N"
MAX_FINDINGS = 5
MAX_BYTES = 20
MOST_PADDING = 16  # one row in so many without a token is still padding, of published models
NEVER_IN_UTF8 = {0xC0, 0xC1, *range(0xF5, 0x100)}
SPECIAL_LITERAL = re.compile(r"<\|[^\s|<>]+\|>")
CONVERSION = (
    "the emitted tokenizer is not the checkpoint's and must not ship; the conversion or the installed version of "
    "tokenizers is at fault, not your files"
)


def error(check: str, text: str, advice: str = "") -> Finding:
    """Make an E finding; without advice of its own it says that the conversion is at fault."""
    return Finding(check, ERROR, f"{text}; {advice or CONVERSION}")


@dataclass(frozen=True)
class Subject:
    """An emitted directory, read back: the three files parsed, and the tokenizer as a runtime loads it."""

    spec: JsonObject
    config: JsonObject
    info: JsonObject
    tokenizer: Tokenizer
    facts: ModelFacts
    declared: Mapping[int, str]
    roles: Mapping[str, str]

    @cached_property
    def ids(self) -> dict[str, int]:
        """Token as written in tokenizer.json -> id, added tokens included."""
        return self.tokenizer.get_vocab(with_added_tokens=True)


def examine(
    directory: Path, facts: ModelFacts, declared: Mapping[int, str], roles: Mapping[str, str] | None = None
) -> tuple[Subject, list[Finding]]:
    """Read an emitted directory back and run every check but the proof.

    ``declared`` are ids that the checkpoint states, ``roles`` the tokens it names as bos, eos, pad and unk.
    A check gives its first few findings: what is wrong with one token is wrong with its neighbours too.
    """
    subject = _read(directory, facts, declared, roles or {})
    return subject, [finding for check in CHECKS for finding in islice(check(subject), MAX_FINDINGS)]


def _read(directory: Path, facts: ModelFacts, declared: Mapping[int, str], roles: Mapping[str, str]) -> Subject:
    """T01, T02: the files are there, are not pointers, and load; :class:`TokenizerError` otherwise."""
    tokenizer, spec = _load_world(directory) if (directory / WORLD).is_file() else _load(directory)
    return Subject(
        spec=spec,
        config=read_json(directory / "tokenizer_config.json"),
        info=read_json(directory / "tokenizer_info.json"),
        tokenizer=tokenizer,
        facts=facts,
        declared=declared,
        roles=roles,
    )


def _load_world(directory: Path) -> tuple[Any, Any]:
    tokenizer = WorldTokenizer.load(directory / WORLD)
    return tokenizer, tokenizer.spec()


def _load(directory: Path) -> tuple[Tokenizer, Any]:
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise TokenizerError(f"T01: {path}: there is no such file")
    data = read_bytes(path)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"T01: {path}: cannot be loaded ({error})") from None
    return library.load(text, f"T01: {path}: cannot be loaded"), json.loads(data)


def added_tokens_unique(subject: Subject) -> Iterator[Finding]:
    """T03: no added token twice."""
    contents = Counter(token["content"] for token in subject.spec["added_tokens"])
    for content, count in sorted(contents.items()):
        if count > 1:
            yield error("T03", f"added token {content!r} is listed {count} times")


def ids_consistent(subject: Subject) -> Iterator[Finding]:
    """T04, T05: a token has one id, an id one token, and both are what the checkpoint states beside its vocabulary."""
    vocab = by_text(subject.spec["model"]["vocab"])
    owner = {index: token for token, index in vocab.items()}
    if len(owner) != len(vocab):
        yield error("T05", f"{len(vocab) - len(owner)} ids of the vocabulary have two tokens")
    for token in subject.spec["added_tokens"]:
        content, index = token["content"], token["id"]
        if vocab.get(content, index) != index:
            yield error("T04", f"{content!r} is {vocab[content]} in the vocabulary and {index} as added token")
        if owner.get(index, content) != content:
            yield error("T05", f"id {index} is {owner[index]!r} in the vocabulary and {content!r} as added token")
        if subject.ids.get(content) != index:
            yield error(
                "T05", f"added token {content!r} is written with id {index} and loads as {subject.ids.get(content)}"
            )
    for index, text in sorted(subject.declared.items()):
        actual = subject.tokenizer.token_to_id(text)
        if actual != index:
            stated = f"the checkpoint states that {text!r} has id {index}, its vocabulary gives it {actual}"
            yield error("T05", stated, "one of its tokenizer files belongs to another model")


def ids_fit_the_embedding(subject: Subject) -> Iterator[Finding]:
    """T06, T07, T08: every id has a row; rows without a token are few, and noted for masking."""
    facts, largest = subject.facts, max(subject.ids.values())
    if facts.rows != facts.vocab_size:
        text = f"{facts.embedding} has {facts.rows} rows, config.json says vocab_size {facts.vocab_size}"
        yield error("T06", text, "one of them belongs to another model")
    if largest >= facts.rows:
        text = f"the largest id is {largest}, but {facts.embedding} has only {facts.rows} rows"
        yield error("T06", text, "the vocabulary belongs to another model")
    if subject.info["active_vocab_size"] != largest + 1:
        yield error("T08", f"active_vocab_size is {subject.info['active_vocab_size']}, the largest id is {largest}")
    padded = facts.rows - len(set(subject.ids.values()))
    text = f"{padded:,} of the {facts.rows:,} rows of {facts.embedding} have no token; they are masked"
    if padded * MOST_PADDING > max(1024 * MOST_PADDING, facts.rows):
        yield Finding("T07", WARNING, f"{text}: far more than padding; is the vocabulary this model's, and whole?")
    elif padded > 0:
        yield Finding("T08", NOTE, text)


def decoder_matches_pre_tokenizer(subject: Subject) -> Iterator[Finding]:
    """T09, T10: the decoder is byte-level if the pre-tokenizer is, and has byte fallback if the model has."""
    into, out = kinds(subject.spec["pre_tokenizer"]), kinds(subject.spec["decoder"])
    if ("ByteLevel" in into) != ("ByteLevel" in out):
        yield error("T09", f"text comes back garbled: pre_tokenizer {sorted(into)}, decoder {sorted(out)}")
    if subject.spec["model"].get("byte_fallback") and "ByteFallback" not in out:
        text = f"byte_fallback is on and the decoder is {sorted(out) or 'none'}: bytes come back as <0xNN>"
        yield Finding("T10", WARNING, f"{text}, as in its own library")


def every_byte_has_a_token(subject: Subject) -> Iterator[Finding]:
    """T11, T12: which bytes have no token; in published vocabularies, too, and text loses them in their own library."""
    model, vocab = subject.spec["model"], subject.ids
    if "ByteLevel" in kinds(subject.spec["pre_tokenizer"]):
        missing = [byte for byte in range(256) if byte not in NEVER_IN_UTF8 and CHARACTERS[byte] not in vocab]
        if missing:
            text = f"{len(missing)} bytes of UTF-8 have no token in this vocabulary: {_bytes(missing)}"
            yield Finding("T11", WARNING, f"{text}; they vanish from a text or become unknown, as in its own library")
        return
    missing = [byte for byte in range(256) if f"<0x{byte:02X}>" not in vocab]
    if model.get("byte_fallback") and missing:
        text = f"byte_fallback is on and {len(missing)} of the 256 tokens <0xNN> are missing: {_bytes(missing)}"
        yield Finding("T12", WARNING, f"{text}; characters that need them become unknown, as in its own library")
    elif not model.get("byte_fallback"):
        text = "without byte fallback every character that has no token becomes unknown, or vanishes, and is lost"
        yield Finding("T12", WARNING, text)


def _bytes(missing: list[int]) -> str:
    shown = " ".join(f"{byte:02X}" for byte in missing[:MAX_BYTES])
    return f"{shown} ..." if missing[MAX_BYTES:] else shown


def special_tokens_are_single(subject: Subject) -> Iterator[Finding]:
    """T13: the text of a special token becomes its own id, or it cannot be written."""
    for token in subject.spec["added_tokens"]:
        ids = subject.tokenizer.encode(token["content"], add_special_tokens=False).ids
        if token["special"] and ids != [token["id"]]:
            text = f"the text of special token {token['content']!r}, id {token['id']}, encodes to {ids}"
            yield Finding("T13", WARNING, f"{text}: no prompt and no chat template can write it")


def text_stays_text(subject: Subject) -> Iterator[Finding]:
    """T13: which control tokens a plain text becomes because the vocabulary has them as pieces: a Unigram model may."""
    special = [token for token in subject.spec["added_tokens"] if token["special"]]
    subject.tokenizer.encode_special_tokens = True
    try:
        found = [t for t in special if t["id"] in subject.tokenizer.encode(t["content"], add_special_tokens=False).ids]
    finally:
        subject.tokenizer.encode_special_tokens = False
    if found:
        shown = ", ".join(repr(token["content"]) for token in found[:MAX_FINDINGS])
        more = f" and {len(found) - MAX_FINDINGS} more" if len(found) > MAX_FINDINGS else ""
        text = f"a prompt that spells {shown}{more} becomes the control token, as in its own library"
        yield Finding("T13", WARNING, f"{text}: the vocabulary has it as a piece; in a chat it stays text")


def control_ids_exist(subject: Subject) -> Iterator[Finding]:
    """T14, T15: the model's bos, eos, pad and stop ids are special tokens, and one of them ends a text."""
    facts, info = subject.facts, subject.info
    special = {token["id"] for token in subject.spec["added_tokens"] if token["special"]}
    roles = [
        ("bos", facts.bos),
        ("pad", facts.pad),
        *(("eos", i) for i in facts.eos),
        *(("stop", i) for i in facts.stop),
    ]
    for role, index in roles:
        token = None if index is None else subject.tokenizer.id_to_token(index)
        if index is not None and token is None:
            text = f"generation_config.json: {role} id {index} is no token (ids: 0..{info['active_vocab_size'] - 1})"
            yield error("T14", text, "the file belongs to another model")
        elif index is not None and index not in special:
            text = f"generation_config.json: {role} id {index} is the ordinary token {token!r}, not a special one"
            yield Finding("T15", WARNING, text)
    if not facts.eos:
        text = f"generation_config.json names no eos_token_id; the family's end of text, {info['eos']}, is taken"
        yield Finding("T15", WARNING, text)


def named_roles_exist(subject: Subject) -> Iterator[Finding]:
    """T14: what the checkpoint names as a special token is a token; one that ends or begins a text must be."""
    for role, text in subject.roles.items():
        if subject.tokenizer.token_to_id(text) is None:
            found = f"tokenizer_config.json: {role}_token {text!r} is no token of the vocabulary"
            if role in ("bos", "eos"):
                yield error("T14", found, "one of the two files belongs to another model")
            else:
                yield Finding("T14", WARNING, f"{found}; it is text where a chat template writes it")


def control_ids_agree(subject: Subject) -> Iterator[Finding]:
    """T14: every id that the checkpoint ends a text with is a stop id, and tokenizer_config.json has its own roles."""
    facts, info = subject.facts, subject.info
    named = subject.tokenizer.token_to_id(subject.roles.get("eos", ""))
    ends = {*facts.eos, *facts.stop, *(() if named is None else (named,))}
    missing = sorted(ends - {*info["stop"]})
    if missing:
        yield error("T14", f"stop ids {missing} of the checkpoint are not in tokenizer_info.json")
    for role in ("bos", "eos", "pad"):
        name = subject.config.get(f"{role}_token")
        if name != subject.roles.get(role, name):
            yield error("T14", f"tokenizer_config.json: {role}_token {name!r}, expected {subject.roles[role]!r}")
        index = None if name is None else subject.tokenizer.token_to_id(name)
        known = info["eos"] if role == "eos" else [info[role]]
        if index is not None and index not in known:
            yield error("T14", f"tokenizer_config.json: {role}_token {name!r} is id {index}, expected {known}")


def template_tokens_are_single(subject: Subject) -> Iterator[Finding]:
    """T16: what looks like a special token in a chat template and is none; some models were trained so."""
    for literal in sorted(set(SPECIAL_LITERAL.findall(_templates(subject)))):
        encoding = subject.tokenizer.encode(literal, add_special_tokens=False)
        if len(encoding.ids) != 1:
            text = (
                f"chat template: {literal} is no token here but text, of {len(encoding.ids)} tokens {encoding.tokens}"
            )
            yield Finding("T16", NOTE, text)


def _templates(subject: Subject) -> str:
    """Return the text of every chat template."""
    found = subject.config.get("chat_template") or ""
    return found if isinstance(found, str) else "\n".join(entry["template"] for entry in found)


def no_double_bos(subject: Subject) -> Iterator[Finding]:
    """T17: template and post-processor do not both write the beginning of text."""
    added = subject.info["prefix"]
    template = _templates(subject)
    bos = subject.config.get("bos_token")
    if added and ("bos_token" in template or (bos and bos in template)):
        text = (
            f"the chat template writes bos and the tokenizer adds {added}: encode chats with add_special_tokens=False"
        )
        yield Finding("T17", WARNING, text)


def no_clean_up(subject: Subject) -> Iterator[Finding]:
    """T18: decoding must not delete spaces."""
    if subject.config.get("clean_up_tokenization_spaces") is not False:
        text = "clean_up_tokenization_spaces is not false: some runtimes delete spaces before punctuation"
        yield Finding("T18", WARNING, text)


CHECKS = (
    added_tokens_unique,
    ids_consistent,
    ids_fit_the_embedding,
    decoder_matches_pre_tokenizer,
    every_byte_has_a_token,
    special_tokens_are_single,
    text_stays_text,
    control_ids_exist,
    named_roles_exist,
    control_ids_agree,
    template_tokens_are_single,
    no_double_bos,
    no_clean_up,
)


def kinds(part: Any) -> set[str]:
    """Return the ``type`` of a component of tokenizer.json and of everything inside it."""
    if isinstance(part, list):
        return set().union(*map(kinds, part))
    if isinstance(part, dict):
        own = {part["type"]} if isinstance(part.get("type"), str) else set()
        return own.union(*map(kinds, part.values()))
    return set()
