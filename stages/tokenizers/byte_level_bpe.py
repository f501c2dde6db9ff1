"""Byte-level byte-pair encodings: tokenizer.json, or vocab.json with merges.txt (GPT-2, GPT-NeoX, Qwen2, Llama 3)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

from stages.tokenizers import json_tables
from stages.tokenizers.byte_pairs import Added, BytePairs, build
from stages.tokenizers.errors import TokenizerError
from stages.tokenizers.merge_loop import MergeLoop
from stages.tokenizers.patterns import GPT2, KNOWN, QWEN
from stages.tokenizers.record import TokenizerFamily

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from stages.tokenizers.resolution import Resolution

TABLES = "tokenizer.json"
MERGES = "merges.txt"
END_OF_TEXT = "<|endoftext|>"
# Class -> (NFC or not, split patterns): what its code does with vocab.json and merges.txt, which do not say.
PIPELINES: dict[str, tuple[bool, tuple[str, ...]]] = {
    "GPT2Tokenizer": (False, (GPT2,)),
    "GPTNeoXTokenizer": (True, (GPT2,)),
    "Qwen2Tokenizer": (True, (QWEN,)),
}
# These classes rebuild their pipeline whatever tokenizer.json says. GPT2Tokenizer does too, but has become the name of
# many files that are not GPT-2's, and what those were trained with is in the file.
BINDING = ("GPTNeoXTokenizer", "Qwen2Tokenizer")


def convert(resolution: Resolution) -> Tokenizer:
    """Build the tokenizer that the files describe; :class:`TokenizerError` for what cannot be followed exactly."""
    if resolution.name == TABLES:
        return build(_from_tables(resolution))
    return build(_from_vocab_and_merges(resolution))


def _from_tables(resolution: Resolution) -> BytePairs:
    path = resolution.vocabulary
    where = str(path)
    spec = json_tables.read_object(path)
    model = spec.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        kind = model.get("type") if isinstance(model, dict) else None
        raise TokenizerError(f"{where}: the model is {kind} and not BPE")
    for key in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(key):
            raise TokenizerError(f"{where}: model.{key} is {model[key]!r}; a byte-level vocabulary has none")
    vocab = json_tables.vocabulary(model.get("vocab"), where)
    nfc, splits = json_tables.pipeline(spec, where)
    _agree(resolution, nfc, splits)
    added = json_tables.added_tokens(spec.get("added_tokens") or [], where)
    before = json_tables.prefix(spec, where)
    unknown = [text for text in before if text not in {token.content for token in added}]
    if unknown:
        raise TokenizerError(f"{where}: post_processor puts {unknown[0]!r} before a text, which is no added token")
    return BytePairs(
        vocab=vocab,
        merges=json_tables.merge_list(model.get("merges"), vocab, where),
        added=added,
        nfc=nfc,
        splits=splits,
        ignore_merges=bool(model.get("ignore_merges")),
        prefix=before,
    )


def _agree(resolution: Resolution, nfc: bool, splits: tuple[str, ...]) -> None:
    name = resolution.class_name
    if name in BINDING and PIPELINES[name] != (nfc, splits):
        raise TokenizerError(
            f"{resolution.vocabulary}: its {_say(nfc, splits)} is not the {_say(*PIPELINES[name])} of {name}, which "
            "tokenizer_config.json names: one of the two files belongs to another model"
        )


def _from_vocab_and_merges(resolution: Resolution) -> BytePairs:
    name, path = resolution.class_name, resolution.vocabulary
    if name not in PIPELINES:
        raise TokenizerError(
            f"{path}: how text is split is said by the tokenizer_class alone, and tokenizer_config.json names "
            f"{name or 'none'} (known: {', '.join(PIPELINES)}); add the checkpoint's {TABLES}"
        )
    if MERGES not in resolution.files:
        raise TokenizerError(f"{path}: there is no {MERGES} beside it")
    nfc, splits = PIPELINES[name]
    vocab = json_tables.vocabulary(json_tables.read_object(path), str(path))
    return BytePairs(
        vocab=vocab,
        merges=json_tables.read_merges(resolution.files[MERGES], vocab),
        added=declared_tokens(resolution, vocab),
        nfc=nfc,
        splits=splits,
        ignore_merges=False,
        prefix=(),
    )


def declared_tokens(resolution: Resolution, vocab: Mapping[str, int]) -> tuple[Added, ...]:
    """Return the added tokens that the checkpoint states beside a vocabulary that has none; its roles are special."""
    decoder = resolution.config.get("added_tokens_decoder")
    if isinstance(decoder, dict) and decoder:
        entries = [{**entry, "id": int(index)} for index, entry in decoder.items()]
        return json_tables.added_tokens(entries, "tokenizer_config.json: added_tokens_decoder")
    stated = {text: index for index, text in resolution.declared.items()}
    special = {name: vocab[name] for name in (*resolution.roles.values(), END_OF_TEXT) if name in vocab}
    return json_tables.added_tokens(
        [{"content": text, "id": index, "special": True} for text, index in {**stated, **special}.items()],
        "added_tokens.json",
    )


def reference(resolution: Resolution) -> MergeLoop:
    """Open the same files in a plain merge loop, which reads their JSON itself."""
    if resolution.name != TABLES:
        vocab = json.loads(resolution.vocabulary.read_bytes())
        lines = [line for line in resolution.files[MERGES].read_bytes().decode().split("\n") if line]
        normalize, splits = PIPELINES[str(resolution.class_name)]
        added = [vars(token) for token in declared_tokens(resolution, vocab)]
        pairs = [(left, right) for left, right in map(str.split, lines[lines[0].startswith("#version") :])]
        return MergeLoop(vocab, pairs, added=added, normalize=normalize, splits=splits)
    spec = json.loads(resolution.vocabulary.read_bytes())
    model, added = spec["model"], spec["added_tokens"]
    merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
    ids = {token["content"]: token["id"] for token in added}
    normalize, splits = json_tables.pipeline(spec, str(resolution.vocabulary))
    return MergeLoop(
        model["vocab"],
        merges,
        added=added,
        normalize=normalize,
        splits=splits,
        ignore_merges=bool(model.get("ignore_merges")),
        prefix=[ids[text] for text in json_tables.prefix(spec, "")],
    )


def _say(nfc: bool, splits: tuple[str, ...]) -> str:
    patterns = ", then ".join(KNOWN.get(pattern, pattern) for pattern in splits)
    return f"splitting by {patterns} {'after NFC' if nfc else 'without NFC'}"


FAMILY = TokenizerFamily(
    name="byte-level-bpe",
    convert=convert,
    reference=reference,
    # The file's own NFC is what its library did in training; Python's newer tables would give other ids.
    normalize=None,
    end_of_text=END_OF_TEXT,
    chats={},
)
