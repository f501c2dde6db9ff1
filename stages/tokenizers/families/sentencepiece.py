"""sentencepiece: ``tokenizer.model`` (Llama 2, Mistral), byte-pair encodings and Unigram models, scores and all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from stages.tokenizers.errors import TokenizerError
from stages.tokenizers.formats import json_tables, sentencepiece_bpe, sentencepiece_unigram
from stages.tokenizers.formats.byte_pairs import Added, load
from stages.tokenizers.formats.charsmap import Charsmap
from stages.tokenizers.formats.metaspace import NEVER, SEGMENT, SPACE, TEXT, Characters, document
from stages.tokenizers.formats.sentencepiece_model import (
    BPE,
    BYTE,
    CONTROL,
    MAX_SHOWN,
    MODELS,
    UNIGRAM,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    SentencePieceModel,
    read_model,
)
from stages.tokenizers.proof.checks import WARNING
from stages.tokenizers.reference.character_loop import CharacterLoop
from stages.tokenizers.resolution import MODEL, read_json
from stages.tokenizers.tokenizer_family import Finding, TokenizerFamily

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from stages.documents.files import JsonObject
    from stages.tokenizers.resolution import Resolution


# Classes of transformers 5 that put a space before a text alone; for some models it takes a class of its own instead.
MODERN = ("LlamaTokenizer", "CodeLlamaTokenizer")
GENERIC = ("mistral",)
WITHOUT_BEGINNING = ("T5Tokenizer",)  # whose texts have an end alone; Japanese models of GPT-NeoX go by it


def convert(resolution: Resolution) -> Tokenizer:
    """Build the equivalent tokenizer; :class:`TokenizerError` with everything that has no exact equivalent."""
    path = resolution.vocabulary
    model = read_model(path)
    added = _added(resolution, model)
    problems = [*_unlike(model), *_unsound(model), *_contradicted(model, added)]
    problems += _inexact(model, _lead(resolution, model))
    if problems:
        raise TokenizerError(*(f"{path}: {problem}" for problem in problems))
    lead, unigram = _lead(resolution, model), model.model_type == UNIGRAM
    characters = Characters(
        model=(sentencepiece_unigram if unigram else sentencepiece_bpe).document(model),
        added=added,
        lead=lead,
        collapse=model.remove_extra_whitespaces,
        strip=lead != NEVER,
        prefix=_prefix(resolution, model, added),
        symbols=_isolated(resolution, model),
        charsmap=model.charsmap,
        cut=sentencepiece_unigram.cut(model) if unigram else None,
    )
    return load(document(characters), added)


def _unlike(model: SentencePieceModel) -> Iterator[str]:
    """Yield what makes the model one of another kind than is converted here."""
    if model.model_type not in {BPE, UNIGRAM}:
        kind = MODELS.get(model.model_type, str(model.model_type))
        yield f"the model is {kind}, and only BPE and Unigram models are converted"
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


def _inexact(model: SentencePieceModel, lead: str) -> Iterator[str]:
    """Yield what sentencepiece does and a tokenizer.json cannot say."""
    unused = [piece.text for piece in model.pieces if piece.kind == UNUSED]
    if unused:
        yield f"{len(unused)} pieces are unused ({unused[:MAX_SHOWN]}): they are merged and then taken apart again"
    if model.model_type == BPE:
        yield from sentencepiece_bpe.inexact(model)
    defined = [piece.text for piece in model.pieces if piece.kind == USER_DEFINED]
    spaces = lead == NEVER and model.model_type == BPE  # then they can be looked for where a space is U+2581 already
    spaced = [text for text in defined if (SPACE in text or " " in text) and not (spaces and _is_spaces(text))]
    if spaced:
        yield f"the user-defined symbols {spaced[:MAX_SHOWN]} have spaces in them"
    try:
        table = Charsmap(model.charsmap) if model.charsmap else None
    except ValueError as error:
        yield str(error)
        return
    changed = [text for text in defined if table and table.normalize(text) != text]
    if changed:
        yield f"the user-defined symbols {changed[:MAX_SHOWN]} are not normal forms of the model's own table"


def _is_spaces(symbol: str) -> bool:
    return set(symbol) == {SPACE}


def _lead(resolution: Resolution, model: SentencePieceModel) -> str:
    """Say when a space goes before a text; what ``legacy`` leaves to each part is as in transformers 5."""
    if not model.dummy_prefix or resolution.config.get("add_prefix_space") is False:
        return NEVER
    # The library finds no beginning of a text whose first spaces were removed.
    return SEGMENT if model.remove_extra_whitespaces or _legacy(resolution) else TEXT


def _legacy(resolution: Resolution) -> bool:
    return bool(resolution.config.get("legacy", not _modern(resolution)))


def _modern(resolution: Resolution) -> bool:
    """Say whether transformers 5 reads the file with a class that is not ``legacy`` unless told so."""
    if resolution.class_name not in MODERN:
        return False
    kind = read_json(resolution.files[MODEL]).get("model_type") if MODEL in resolution.files else None
    return kind not in GENERIC


def _isolated(resolution: Resolution, model: SentencePieceModel) -> tuple[str, ...]:
    """Return the user-defined symbols that splitting the text can keep apart: those that no merge has to make."""
    defined = [piece.text for piece in model.pieces if piece.kind == USER_DEFINED]
    if model.model_type == UNIGRAM:
        return tuple(defined)
    return () if _lead(resolution, model) == NEVER else tuple(text for text in defined if len(text) == 1)


def shown(resolution: Resolution) -> list[int]:
    """Return the ids of user-defined symbols that are special tokens here, but are decoded as text."""
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
    found = [{**entry, "normalized": _is_spaces(entry["content"])} for entry in entries]
    return json_tables.added_tokens(found, "added tokens")


def _prefix(resolution: Resolution, model: SentencePieceModel, added: tuple[Added, ...]) -> tuple[str, ...]:
    """Return the begin of text, which goes before every text unless the checkpoint says otherwise."""
    text = resolution.roles.get("bos") or (model.pieces[model.bos].text if 0 <= model.bos < len(model.pieces) else None)
    stated = resolution.config.get("add_bos_token", resolution.class_name not in WITHOUT_BEGINNING)
    if stated is False or text is None:
        return ()
    if text not in {token.content for token in added}:
        raise TokenizerError(f"{resolution.vocabulary}: T14: bos_token {text!r} is none of the special tokens")
    return (text,)


def reference(resolution: Resolution) -> CharacterLoop:
    """Read the scores in a plain loop; :class:`TokenizerError` for a model that merges by something else."""
    model = read_model(resolution.vocabulary)
    problems = [*_unlike(model), *_unsound(model)]
    if problems:
        raise TokenizerError(*problems)
    lead, added = _lead(resolution, model), _added(resolution, model)
    isolated = _isolated(resolution, model)
    defined = [piece.text for piece in model.pieces if piece.kind == USER_DEFINED]
    frozen = [text for text in defined if lead == NEVER or text in isolated]
    vocab = {piece.text: index for index, piece in enumerate(model.pieces)}
    ids = vocab | {token.content: token.id for token in added}
    settings: JsonObject = {
        "added": [vars(token) for token in added if token.content not in frozen],
        "lead": lead,
        "collapse": model.remove_extra_whitespaces,
        "strip": lead != NEVER,
        "prefix": [ids[text] for text in _prefix(resolution, model, added)],
        "frozen": frozen,
        "form": _library_form(model),
    }
    if model.model_type == UNIGRAM:
        return sentencepiece_unigram.ViterbiLoop(model, **settings)
    rank = sentencepiece_bpe.rank(model)
    return CharacterLoop(vocab, rank, unk=model.unk, byte_fallback=model.byte_fallback, **settings)


def _library_form(model: SentencePieceModel) -> Callable[[str], str]:
    """Return the normal form as the tokenizers library reads the model's table, which :func:`readings` judges."""
    from tokenizers import normalizers

    if not model.charsmap:
        return str
    return normalizers.Precompiled(model.charsmap).normalize_str


def readings(resolution: Resolution, texts: Sequence[tuple[str, str]]) -> Iterator[Finding]:
    """T22: the texts that the tokenizers library, and so transformers, normalises otherwise than sentencepiece."""
    model = read_model(resolution.vocabulary)
    if not model.charsmap:
        return
    theirs, own = _library_form(model), Charsmap(model.charsmap)
    unlike = [text for _, text in texts if _spaced(theirs(text), model) != _spaced(own.normalize(text), model)]
    if unlike:
        text = (
            f"{len(unlike)} of {len(texts)} texts have another normal form in the tokenizers library than in "
            f"sentencepiece, such as {unlike[0][:80]!r}: it reads the model's table by whole grapheme clusters"
        )
        yield Finding("T22", WARNING, f"{text}; the bundle does as the library, and so does transformers")


def _spaced(text: str, model: SentencePieceModel) -> str:
    return " ".join(filter(None, text.split(" "))) if model.remove_extra_whitespaces else text


def warnings(resolution: Resolution) -> Sequence[str]:
    """Return where the emitted tokenizer is deliberately not sentencepiece's, or not what others make of the file."""
    model, found = read_model(resolution.vocabulary), []
    ids = shown(resolution)
    if ids:
        first = model.pieces[ids[0]].text
        cause = f"T13: the {len(ids)} user-defined symbols, such as {first!r}, are special tokens here"
        found += [f"{cause}: a user's text that spells one stays text, where sentencepiece would make it the symbol"]
    if "legacy" not in resolution.config and _lead(resolution, model) == TEXT:
        cause = f"T17: tokenizer_config.json names {resolution.class_name} and does not say `legacy`"
        found += [f"{cause}: a space goes before a text as in transformers 5; 4 puts one after each special token, too"]
    if model.dummy_prefix and model.remove_extra_whitespaces and not _legacy(resolution):
        found += ["T17: a space goes after each special token too, where transformers has none: spaces are removed"]
    if resolution.config.get("add_eos_token"):
        found += ["T17: add_eos_token of tokenizer_config.json ends every text; a prompt to continue goes without"]
    return found


FAMILY = TokenizerFamily(
    name="sentencepiece",
    convert=convert,
    reference=reference,
    normalize=None,
    end_of_text=("</s>",),
    chats={},
    warnings=warnings,
    shown=shown,
    readings=readings,
    transformers_needs=("sentencepiece", "google.protobuf"),
)
