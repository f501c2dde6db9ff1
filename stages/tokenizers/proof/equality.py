"""The proof T19 to T21: the emitted tokenizer and an independent reader of the source vocabulary give the same ids.

Text reaches the emitted tokenizer as our runtime feeds it: normalised by Python, whose Unicode tables are newer than
those of the tokenizers library. The probes go in raw too, because a foreign runtime relies on the file alone.
"""

from __future__ import annotations

import hashlib
import json
import sys
import unicodedata
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from functools import cache
from itertools import islice
from pathlib import Path

from stages.tokenizers.emission import prefix_of
from stages.tokenizers.formats.byte_level import read_token
from stages.tokenizers.formats.metaspace import SPACE
from stages.tokenizers.proof.checks import NOTE, Subject, error, kinds
from stages.tokenizers.tokenizer_family import Finding, ReferenceTokenizer

SAMPLE_CORPUS = Path(__file__).with_name("sample_corpus.jsonl")
GENERATED_CORPUS = Path(__file__).with_name("generated_corpus.jsonl")
# Marks and letters of these are older than Unicode 9, where Python's and the library's NFC agree.
PROBES = (
    "Hello, world! It's 2024; we've 1,234.56 reasons.",
    " leading, double  and trailing space ",
    " " * 37 + "thirty-seven spaces",
    "\n\n  \t\tindented\r\n\r\n\r\nlines   \n",
    "def f(x):\n    return {'a': x[0], \"b\": -1.5e-3}  # comment\n",
    "https://www.example.org/a/b?q=1&r=%20#top",
    "你好，世界！今天天气怎么样？",
    "日本語のテキスト、カタカナと한국어 문장",
    "Привет, мир! Γειά σου Κόσμε. שלום עולם مرحبا بالعالم",
    "नमस्ते दुनिया สวัสดีชาวโลก",
    "cafe\u0301 A\u030angstro\u0308m \u1112\u1161\u11ab \u212b \uf900",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e8\U0001f1f3 \U0001f44d\U0001f3fd \u2764\ufe0f",
    "a\x00b\x07c\x1bd\x7fe\x85f\u200bg\u202eh\ufeffi",
    "literal \u2581 \u0120 \u010a <0x0A> <unk>",
    "0123456789 ٣٤٥ ⅷ ½ ² 1234567",
    "CamelCaseHTTPServer_snake_case don't DON'T i'LL",
    "special <|im_start|>user\n<|endoftext|><|im_end|> <|not_a_token|>",
)
STEPS = (7919, 7927)  # primes; one of them is coprime to any vocabulary below 60 million
SEQUENCE = 32
MAX_OVERLAP, MAX_OVERLAPS = 65, 50_000  # longer tokens and more overlaps are no published vocabulary's
CODE_POINTS = "code points"
MAX_ADDED = 128  # of a long list its beginning and its end are tried


@cache
def sample_corpus() -> tuple[tuple[str, str], ...]:
    """Return the written (kind, text) pairs that ship with the project, 27 KB."""
    return _pairs(SAMPLE_CORPUS)


@cache
def generated_corpus() -> tuple[tuple[str, str], ...]:
    """Return the drawn (kind, text) pairs that ship with the project, 180 KB; benchmarks/corpus.py writes them."""
    return _pairs(GENERATED_CORPUS)


def _pairs(path: Path) -> tuple[tuple[str, str], ...]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return tuple((kind, text) for kind, text in map(json.loads, lines))


@cache
def code_points() -> tuple[tuple[str, str], ...]:
    """Return (kind, text) pairs with every assigned code point of Python's Unicode tables, thirty-two to a text."""
    assigned = [chr(i) for i in range(sys.maxunicode + 1) if unicodedata.category(chr(i)) not in {"Cn", "Cs", "Co"}]
    parts = (assigned[start : start + SEQUENCE] for start in range(0, len(assigned), SEQUENCE))
    return tuple((CODE_POINTS, "".join(f"a{character} " for character in part)) for part in parts)


def fingerprint(reference: ReferenceTokenizer) -> str:
    """Return digest of the probes' ids / digest of the id -> bytes map, as the independent reference has them."""
    ids = [reference.encode(text, specials=True) for text in PROBES]
    table = "".join(f"{index} {token.hex()}\n" for index, token in sorted(reference.tokens().items()))
    return f"{_digest(json.dumps(ids))}/{_digest(table)}"


def texts_for(subject: Subject) -> list[tuple[str, str]]:
    """Return the (kind, text) pairs of the whole proof; those with the subject's own tokens are the last."""
    texts = [("probe", text) for text in PROBES] + [*sample_corpus(), *generated_corpus(), *code_points()]
    return [*texts, *_added(subject), *_overlapping(subject)]


def prove(
    subject: Subject,
    reference: ReferenceTokenizer,
    progress: Callable[[int, int], None],
    texts: Sequence[tuple[str, str]] | None = None,
    left_out: Container[int] = (),
) -> list[Finding]:
    """Run T19, T20 and T21; each yields its first difference only. ``progress`` gets texts done and texts in all.

    ``left_out`` are ids of the reference that are left out on purpose, and that no text of ``texts`` has.
    """
    known = {index: token for index, token in reference.tokens().items() if index not in left_out}
    checks = (
        same_map(subject, known),
        probes_raw(subject, reference),
        round_trip(subject, reference),
        same_ids(subject, reference, texts_for(subject) if texts is None else texts, progress),
        same_text(subject, reference, known),
    )
    return [finding for check in checks if (finding := next(check, None))]


def _added(subject: Subject) -> Iterator[tuple[str, str]]:
    """Yield texts with the added tokens themselves: apart, together, and amid words and white space."""
    tokens = [token["content"] for token in subject.spec["added_tokens"]]
    for text in [*tokens[:MAX_ADDED], *tokens[MAX_ADDED:][-MAX_ADDED:]]:
        yield "added token", f"{text}a{text} {text}{text}\n{text}  b {text[:-1]}{text}e\u0301"


def _overlapping(subject: Subject) -> Iterator[tuple[str, str]]:
    """Yield tokens that overlap themselves, twice: there the order of merges of one score shows, if anywhere."""
    if not _over_characters(subject):
        return
    added = {token["content"] for token in subject.spec["added_tokens"]}
    lengths = range(3, MAX_OVERLAP)
    tokens = [token.replace(SPACE, " ") for token in subject.ids if len(token) in lengths and token not in added]
    ends = ((token, size) for token in tokens for size in range(1, len(token)) if token.startswith(token[-size:]))
    twice = [f"{token}{token[size:]}" for token, size in islice(ends, MAX_OVERLAPS)]
    for start in range(0, len(twice), SEQUENCE):
        yield "overlap", "|".join(twice[start : start + SEQUENCE])


def _over_characters(subject: Subject) -> bool:
    """Say whether tokens are spelled in characters, with U+2581 for the space, and not in the byte-level alphabet."""
    return "ByteLevel" not in kinds(subject.spec["decoder"])


def same_map(subject: Subject, expected: Mapping[int, bytes]) -> Iterator[Finding]:
    """T20, map: every id stands for the same bytes; two swapped ids show nowhere else."""
    added = {token["content"] for token in subject.spec["added_tokens"]}
    read = str.encode if _over_characters(subject) else read_token
    emitted = {index: token.encode() if token in added else read(token) for token, index in subject.ids.items()}
    for index in sorted({*emitted, *expected}):
        if emitted.get(index) != expected.get(index):
            pair = f"{emitted.get(index)!r} in the emitted file and {expected.get(index)!r} in the source vocabulary"
            yield error("T20", f"id {index} is {pair}")


def probes_raw(subject: Subject, reference: ReferenceTokenizer) -> Iterator[Finding]:
    """T20, probes: the file alone, without our runtime's normalisation, gives the reference's ids."""
    for text in PROBES:
        emitted, expected = _encode(subject, text, specials=True), reference.encode(text, specials=True)
        if emitted != expected:
            yield error("T20", difference("probe", text, emitted, expected))


def round_trip(subject: Subject, reference: ReferenceTokenizer) -> Iterator[Finding]:
    """T19: the ids of a text decode to what the reference makes of them, whether or not that is the text."""
    known, lossy = reference.tokens(), None
    for text in PROBES:
        given = _normalize(subject, text)
        ids = _encode(subject, given, specials=not _over_characters(subject))
        decoded, expected = _decode(subject, ids), reference.decode([index for index in ids if index in known])
        if decoded != expected:
            yield error("T19", f"probe {text!r} decodes to {decoded!r}, the reference says {expected!r}")
        elif decoded != given and lossy is None:
            lossy = Finding("T19", NOTE, f"not every text comes back: {given!r} is {decoded!r}, as in its own library")
    if lossy is not None:
        yield lossy


def same_ids(
    subject: Subject,
    reference: ReferenceTokenizer,
    texts: Sequence[tuple[str, str]],
    progress: Callable[[int, int], None],
) -> Iterator[Finding]:
    """T21: equal ids for every text, with special-token text taken as special tokens and as plain text."""
    starts = {token["content"][:2] for token in subject.spec["added_tokens"] if token["special"]}
    marked = sorted({"<|", *starts})
    if prefix_of(subject.tokenizer) != reference.prefix or subject.info["prefix"] != reference.prefix:
        ids = f"{prefix_of(subject.tokenizer)} (tokenizer_info.json: {subject.info['prefix']})"
        yield error("T21", f"every text is preceded by the ids {ids}, the reference says {reference.prefix}")
    for done, (kind, text) in enumerate(texts, 1):
        normal = _normalize(subject, text)
        for specials in (True, False) if any(special in text for special in marked) else (True,):
            emitted, expected = _encode(subject, normal, specials=specials), reference.encode(text, specials=specials)
            if emitted != expected:
                where = kind if specials else f"{kind}, specials as text"
                yield error("T21", difference(where, text, emitted, expected))
        progress(done, len(texts))


def same_text(subject: Subject, reference: ReferenceTokenizer, tokens: Mapping[int, bytes]) -> Iterator[Finding]:
    """T21, decoding: every id once, next to unrelated ids, so that incomplete UTF-8 meets every kind of neighbour."""
    known = sorted(tokens)
    step = next(step for step in STEPS if len(known) % step)
    ids = [known[i * step % len(known)] for i in range(len(known))]
    for start in range(0, len(ids), SEQUENCE):
        sequence = ids[start : start + SEQUENCE]
        emitted, expected = _decode(subject, sequence), reference.decode(sequence)
        if emitted != expected:
            yield error("T21", f"ids {sequence} decode to {emitted!r}, the reference says {expected!r}")


def _normalize(subject: Subject, text: str) -> str:
    form = subject.info["normalize"]
    return unicodedata.normalize(form, text) if form else text


def _encode(subject: Subject, text: str, *, specials: bool) -> list[int]:
    subject.tokenizer.encode_special_tokens = not specials
    ids: list[int] = subject.tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def _decode(subject: Subject, ids: Sequence[int]) -> str:
    text: str = subject.tokenizer.decode(ids, skip_special_tokens=False)
    return text


def difference(
    kind: str, text: str, here: Sequence[int], there: Sequence[int], names: tuple[str, str] = ("emitted", "reference")
) -> str:
    """Describe where two lists of ids of ``text`` first differ, with the text around it."""
    pairs = enumerate(zip(here, there, strict=False))
    at = next((i for i, pair in pairs if pair[0] != pair[1]), min(len(here), len(there)))
    window = slice(max(0, at - 4), at + 8)
    return (
        f"{kind} {text[:200]!r}: ids differ from position {at} on: {names[0]} {list(here[window])}, "
        f"{names[1]} {list(there[window])}"
    )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
