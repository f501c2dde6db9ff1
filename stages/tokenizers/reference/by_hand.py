"""Second readings of the files that transformers loads: our own loops, and tokenizer.json taken literally.

What they find is a warning: the ids are transformers' in any case, but whoever trained the model may have had others.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from stages.tokenizers.families import tokenizer_json
from stages.tokenizers.formats import json_tables
from stages.tokenizers.formats.metaspace import NEVER, SEGMENT, SEGMENT_WITHOUT, SPACE, TEXT_WITHOUT
from stages.tokenizers.formats.patterns import GPT2, KNOWN
from stages.tokenizers.proof.checks import NOTE, WARNING
from stages.tokenizers.proof.equality import CODE_POINTS, difference
from stages.tokenizers.reference.automatic import Automatic
from stages.tokenizers.reference.character_loop import CharacterLoop
from stages.tokenizers.reference.merge_loop import MergeLoop
from stages.tokenizers.resolution import Resolution
from stages.tokenizers.tokenizer_family import Finding, ReferenceTokenizer

if TYPE_CHECKING:
    from stages.documents.files import JsonObject


PREPEND = {"type": "Prepend", "prepend": SPACE}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
BACK = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
FALLBACK, FUSE = {"type": "ByteFallback"}, {"type": "Fuse"}
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
SCHEMES = {"never": NEVER, "always": SEGMENT_WITHOUT, "first": TEXT_WITHOUT}
MAX_SHOWN = 20
PIPELINE = ("normalizer", "pre_tokenizer", "post_processor", "decoder", "added_tokens")
MODEL = ("type", "unk_token", "byte_fallback", "ignore_merges", "fuse_unk", "dropout", "unk_id")


class UnreadError(Exception):
    """A pipeline that our loops do not know; the message names the part."""


def second_readings(resolution: Resolution, opened: Automatic, texts: Sequence[tuple[str, str]]) -> Iterator[Finding]:
    """T22: texts to which our loops, or the file alone, give other ids than transformers; T17: what goes around a text.

    ``texts`` are (kind, text); a loop of Python reads them without the code points one by one, which take it seconds.
    """
    if opened.refused:
        text = (
            f"transformers does not take the checkpoint's own class ({opened.refused}); its files are read as they are"
        )
        yield Finding("T22", WARNING, text)
    yield from _around(resolution, opened)
    yield from _untrained(resolution, opened)
    try:
        loop = loop_of(resolution, opened.document)
    except UnreadError as unread:
        yield Finding(
            "T22", NOTE, f"no second reading by a loop of our own: {unread}; transformers' {opened.name} alone"
        )
    else:
        yield from _differ("our own loop", loop, opened, [text for kind, text in texts if kind != CODE_POINTS])
    if resolution.name == tokenizer_json.TABLES:
        yield from _file_alone(resolution, opened, [text for _, text in texts])


def _around(resolution: Resolution, opened: Automatic) -> Iterator[Finding]:
    """Yield T17 where what goes before and after a text is not what another reader would put there."""
    if opened.suffix:
        text = f"the tokenizer ends every text with the ids {opened.suffix}; a prompt to continue goes without"
        yield Finding("T17", WARNING, text)
    for role, around in (("bos", opened.prefix), ("eos", opened.suffix)):
        wanted = resolution.config.get(f"add_{role}_token")
        if isinstance(wanted, bool) and wanted is not bool(around) and resolution.name == tokenizer_json.TABLES:
            text = (
                f"add_{role}_token is {json.dumps(wanted)} in tokenizer_config.json, which transformers 4 goes by; "
                f"transformers 5 puts {around or 'nothing'} there, as tokenizer.json says, and so does the bundle"
            )
            yield Finding("T17", WARNING, text)


def _untrained(resolution: Resolution, opened: Automatic) -> Iterator[Finding]:
    """Yield T14 for tokens that transformers adds because they are named and are in no vocabulary."""
    vocab, _ = tokenizer_json.tables(resolution)
    known = {*vocab, *resolution.declared.values(), *tokenizer_json.added_in(resolution)}
    lacking = [token for token in opened.document["added_tokens"] if token["content"] not in known]
    if lacking:
        shown = ", ".join(f"{token['content']!r} ({token['id']})" for token in lacking[:MAX_SHOWN])
        text = f"the files name {len(lacking)} tokens that the vocabulary lacks: {shown}"
        yield Finding("T14", WARNING, f"{text}; transformers gives them new ids, which the model was not trained with")


def _differ(what: str, other: ReferenceTokenizer, opened: Automatic, texts: Sequence[str]) -> Iterator[Finding]:
    for text in texts:
        for specials in (True, False):
            here, there = opened.encode(text, specials=specials), other.encode(text, specials=specials)
            if here != there:
                found = difference(
                    f"{what} reads otherwise than {opened.name}:", text, here, there, (opened.name, what)
                )
                yield Finding("T22", WARNING, f"{found}; transformers' ids are used")
                return


def _file_alone(resolution: Resolution, opened: Automatic, texts: Sequence[str]) -> Iterator[Finding]:
    written = json.loads(resolution.vocabulary.read_bytes())
    if _pipeline(written) == _pipeline(opened.document):
        return
    alone = opened.alone(texts)
    if "error" in alone:
        text = f"tokenizer.json alone cannot be loaded: {alone['error']}"
        yield Finding("T22", WARNING, f"{text}; what transformers makes of it is used")
        return
    for text, there in zip(texts, alone["ids"], strict=True):
        here = opened.encode(text, specials=True)
        if here != there:
            names = (opened.name, "tokenizer.json alone")
            found = difference(
                "the class or the files beside change what tokenizer.json says:", text, here, there, names
            )
            yield Finding("T22", WARNING, f"{found}; transformers' ids are used")
            return


def _pipeline(document: JsonObject) -> list[Any]:
    return [*(document.get(part) for part in PIPELINE), *(document["model"].get(key) for key in MODEL)]


def loop_of(resolution: Resolution, document: JsonObject) -> ReferenceTokenizer:
    """Return a loop over the source's tables by the document's pipeline; :class:`UnreadError` if it cannot go by it."""
    model = document["model"]
    if model["type"] != "BPE":
        raise UnreadError(f"the model is {model['type']}")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise UnreadError(f"model.{key} is {model[key]!r}")
    vocab, merges = tokenizer_json.tables(resolution)
    if json_tables.types(document["decoder"]) == ["ByteLevel"]:
        return _byte_level(document, vocab, merges)
    return _characters(document, vocab, merges)


def _byte_level(document: JsonObject, vocab: Mapping[str, int], merges: list[tuple[str, str]]) -> MergeLoop:
    model = document["model"]
    if model.get("byte_fallback") or (model.get("unk_token") and model["unk_token"] in vocab):
        raise UnreadError("characters may become an unknown token")
    normalizer = json_tables.types(document["normalizer"])
    if normalizer not in ([], ["NFC"]):
        raise UnreadError(f"normalizer {normalizer}")
    return MergeLoop(
        vocab,
        merges,
        added=document["added_tokens"],
        normalize=bool(normalizer),
        splits=[pattern for part in json_tables.flat(document["pre_tokenizer"]) for pattern in _patterns(part)],
        ignore_merges=bool(model.get("ignore_merges")),
    )


def _patterns(part: JsonObject) -> list[str]:
    kind = part["type"]
    if kind == "ByteLevel" and not part.get("add_prefix_space"):
        return [GPT2] if part.get("use_regex", True) else []
    if kind == "Digits" and part.get("individual_digits"):
        return [r"\p{N}"]
    pattern = part.get("pattern", {}).get("Regex")
    if kind == "Split" and pattern in KNOWN and part["behavior"] == "Isolated" and not part["invert"]:
        return [pattern]
    raise UnreadError(f"pre_tokenizer {json.dumps(part)[:160]}")


def _characters(document: JsonObject, vocab: Mapping[str, int], merges: list[tuple[str, str]]) -> CharacterLoop:
    model = document["model"]
    fallback = bool(model.get("byte_fallback"))
    if not model.get("fuse_unk") or any(fallback and f"<0x{byte:02X}>" not in vocab for byte in range(256)):
        raise UnreadError("what a character without a token becomes")
    decoder = json_tables.flat(document["decoder"])
    expected = [BACK, *([FALLBACK] if fallback else []), FUSE]
    if decoder not in (expected, [*expected, STRIP]) or model.get("ignore_merges"):
        raise UnreadError(f"decoder {json_tables.types(document['decoder'])}")
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    return CharacterLoop(
        vocab,
        lambda left, right: ranks.get((left, right)),
        added=document["added_tokens"],
        unk=vocab.get(model.get("unk_token")),
        byte_fallback=fallback,
        lead=_lead(document),
        strip=decoder != expected,
    )


def _lead(document: JsonObject) -> str:
    """Return when a space goes before a text."""
    normalizer, parts = json_tables.flat(document["normalizer"]), json_tables.flat(document["pre_tokenizer"])
    if not parts and normalizer in ([PREPEND, REPLACE], [REPLACE, PREPEND]):
        return SEGMENT
    if not parts and normalizer == [REPLACE]:
        return NEVER
    if not normalizer and len(parts) == 1 and parts[0]["type"] == "Metaspace":
        part = parts[0]
        if part["replacement"] == SPACE and part["split"] is False and part["prepend_scheme"] in SCHEMES:
            return SCHEMES[part["prepend_scheme"]]
    kinds = f"{json_tables.types(document['normalizer'])} and {json_tables.types(document['pre_tokenizer'])}"
    raise UnreadError(f"normalizer and pre_tokenizer {kinds}")
