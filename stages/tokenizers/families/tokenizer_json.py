"""``tokenizer.json``, or ``vocab.json`` with ``merges.txt``: emitted as transformers runs them, whatever they hold.

transformers is the reference, for the class that it chooses and the files beside change what tokenizer.json says: white
space before a text, flags of added tokens, whole pipelines. What the tables are is checked here first, because the
library takes much that is damaged; and where a pipeline is one that we know, our own loops read the tables too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

from stages.tokenizers.errors import TokenizerError
from stages.tokenizers.formats import json_tables
from stages.tokenizers.reference.automatic import Automatic
from stages.tokenizers.tokenizer_family import TokenizerFamily

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from stages.documents.files import JsonObject
    from stages.tokenizers.formats.byte_pairs import Added
    from stages.tokenizers.resolution import Resolution

TABLES, MERGES = "tokenizer.json", "merges.txt"
MAX_LOST = 4  # at most one in so many tokens is made by no merge
# Classes that transformers builds from vocab.json and merges.txt, which do not say how text is split.
WITHOUT_TABLES = ("GPT2Tokenizer", "GPTNeoXTokenizer", "Qwen2Tokenizer")


def reference(resolution: Resolution) -> Automatic:
    """Open the files in transformers; :class:`TokenizerError` for tables that are damaged, or what it says of them."""
    added = _check_tables(resolution) if resolution.name == TABLES else _check_vocab_and_merges(resolution)
    opened = Automatic(resolution.files)
    ids = {token["content"]: token["id"] for token in opened.document["added_tokens"]}
    moved = [token for token in added if ids.get(token.content, token.id) != token.id]
    if moved:
        raise TokenizerError(
            f"{resolution.vocabulary}: added token {moved[0].content!r} has id {moved[0].id}, which is not the next "
            f"one after the vocabulary (it would become {ids[moved[0].content]}); the ids of {len(moved)} added tokens "
            "leave a gap or repeat: the vocabulary is truncated, or the added tokens belong to another model"
        )
    return opened


def convert(resolution: Resolution) -> Tokenizer:
    """Return the tokenizer that transformers makes of the files."""
    return reference(resolution).tokenizer()


def tables(resolution: Resolution) -> tuple[Mapping[str, int], list[tuple[str, str]]]:
    """Return the source's (vocabulary, merges), read anew for a second reading."""
    if resolution.name != TABLES:
        vocab = json.loads(resolution.vocabulary.read_bytes())
        lines = resolution.files[MERGES].read_bytes().decode().split("\n")
        pairs = [line.split(" ") for line in lines[lines[0].startswith("#version") :] if line]
        return vocab, [(left, right) for left, right in pairs]
    model = json.loads(resolution.vocabulary.read_bytes())["model"]
    vocab, merges = json_tables.by_text(model["vocab"]), model.get("merges", [])
    split = (merge.split(" ") if isinstance(merge, str) else merge for merge in merges)
    return vocab, [(left, right) for left, right in split]


def added_in(resolution: Resolution) -> list[str]:
    """Return the added tokens of tokenizer.json by their text."""
    if resolution.name != TABLES:
        return []
    return [token["content"] for token in json.loads(resolution.vocabulary.read_bytes()).get("added_tokens") or []]


def _check_tables(resolution: Resolution) -> tuple[Added, ...]:
    where = str(resolution.vocabulary)
    spec = json_tables.read_object(resolution.vocabulary)
    model = spec.get("model")
    if not isinstance(model, dict):
        raise TokenizerError(f"{where}: there is no model in it")
    kind = model.get("type", "BPE" if "merges" in model else None)
    if kind == "BPE":
        vocab = json_tables.table(model.get("vocab"), where)
        _check_reachable(model, vocab, json_tables.merge_list(model.get("merges"), vocab, where), spec, where)
    elif kind == "Unigram":
        json_tables.scored(model.get("vocab"), where)
    elif kind in ("WordPiece", "WordLevel"):
        json_tables.table(model.get("vocab"), where)
    else:
        raise TokenizerError(f"{where}: model.type is {kind!r}, which the library has no reader for")
    return json_tables.added_tokens(spec.get("added_tokens") or [], where)


def _check_reachable(
    model: JsonObject,
    vocab: Mapping[str, int],
    merges: list[tuple[str, str]],
    spec: JsonObject,
    where: str,
) -> None:
    """Raise :class:`TokenizerError` if a great part of the tokens is made by no merge: then merges are missing."""
    if model.get("ignore_merges"):
        return
    entries = spec.get("added_tokens")
    added = {str(t.get("content")) for t in entries if isinstance(t, dict)} if isinstance(entries, list) else set()
    known = {left + right for left, right in merges} | added
    lost = [token for token in vocab if len(token) > 1 and token not in known and not token.startswith("<0x")]
    if lost and len(lost) * MAX_LOST > len(vocab):
        raise TokenizerError(
            f"{where}: {len(lost)} of the {len(vocab)} tokens are made by no merge, the first is {lost[0]!r}: the "
            "merges are truncated or belong to another model"
        )


def _check_vocab_and_merges(resolution: Resolution) -> tuple[Added, ...]:
    name, path = resolution.class_name, resolution.vocabulary
    if MERGES not in resolution.files:
        raise TokenizerError(f"{path}: there is no {MERGES} beside it")
    if name not in WITHOUT_TABLES and "config.json" not in resolution.files:
        raise TokenizerError(
            f"{path}: how text is split is said by the tokenizer_class alone, and tokenizer_config.json names "
            f"{name or 'none'} (known: {', '.join(WITHOUT_TABLES)}); add the checkpoint's {TABLES}"
        )
    vocab = json_tables.table(json_tables.read_object(path), str(path))
    merges = json_tables.read_merges(resolution.files[MERGES], vocab)
    spec = {"added_tokens": [{"content": text} for text in resolution.declared.values()]}
    _check_reachable({}, vocab, merges, spec, str(path))
    return ()


FAMILY = TokenizerFamily(
    name="tokenizer-json",
    convert=convert,
    reference=reference,
    # The file's own NFC is what its library did in training; Python's newer tables would give other ids.
    normalize=None,
    end_of_text=("<|endoftext|>", "</s>"),
    chats={},
    by_transformers=True,
)
