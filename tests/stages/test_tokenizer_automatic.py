"""What transformers makes of all files is what the bundle has; what it changes of tokenizer.json is said."""

from __future__ import annotations

import json

import pytest

from stagegraph.stage import StageError
from stages.runtime.tokenizer import BundleTokenizer
from tests.support import sentencepiece_models
from tests.support.tokenizer_folders import (
    GPT2_PRE,
    PLAIN,
    SIZE,
    added,
    build,
    merges,
    split,
    tables,
    vocab,
    with_class,
)

BODY = (
    "Hello there,  it's 2024!",
    " lead",
    "a<|user|>\n b <tool> <|end|>  c",
    "x\n\ny",
    "12345",
    "é 你好 ｆｕｌｌ",
    "",
)
OWN = r"\p{L}+|\p{N}{1,2}|[^\p{L}\p{N}]"
NAMES = ("<|endoftext|>", "<|user|>", "<|end|>", "<tool>")


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def plain(**changes):
    return tables(added_tokens=added(*NAMES[:3]), normalizer=None, **changes)


def decoder(**flags):
    stated = {"special": True, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
    return {str(SIZE + i): {"content": name, **stated, **flags} for i, name in enumerate(NAMES[:3])}


def around(*texts, after=()):
    ids = {name: SIZE + i for i, name in enumerate(NAMES[:3])}
    return {
        "type": "TemplateProcessing",
        "single": [
            *({"SpecialToken": {"id": text, "type_id": 0}} for text in texts),
            {"Sequence": {"id": "A", "type_id": 0}},
            *({"SpecialToken": {"id": text, "type_id": 0}} for text in after),
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {text: {"id": text, "ids": [ids[text]], "tokens": [text]} for text in (*texts, *after)},
    }


def two_ids():
    value = around("<|user|>")
    value["special_tokens"]["<|user|>"] = {"id": "<|user|>", "ids": [SIZE + 1, SIZE + 2], "tokens": list(NAMES[1:3])}
    return value


def unigram(**normalizer):
    """A Unigram model as XLM-R and T5 have it: pieces with scores, U+2581 for the space, no bytes."""
    pieces = ["▁", "▁he", "llo", "▁there", "▁a", "x", "y", "e", "l", "o", "h", "1", "2", "ab", "▁lead", "!"]
    scored = [["<unk>", 0.0], ["</s>", 0.0], *([piece, -1.0 - i / 7] for i, piece in enumerate(pieces))]
    space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    return {
        "version": "1.0",
        "added_tokens": [
            *added("<unk>", "</s>", start=0),
        ],
        "normalizer": normalizer or None,
        "pre_tokenizer": space,
        "post_processor": None,
        "decoder": space,
        "model": {"type": "Unigram", "unk_id": 0, "vocab": scored, "byte_fallback": False},
    }  # fmt: skip


GPT2 = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}
FAST = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
# Name -> (files, eos id, what a warning says or None).
CASES = {
    "a space before a text": (
        {"tokenizer.json": plain(), "tokenizer_config.json": {**GPT2, "add_prefix_space": True}},
        SIZE,
        "change what tokenizer.json says",
    ),
    "a space before a text, without tables": (
        {
            "vocab.json": vocab(),
            "merges.txt": b"#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges()).encode(),
            "tokenizer_config.json": {**GPT2, "add_prefix_space": True, "added_tokens_decoder": decoder()},
        },
        SIZE,
        None,
    ),
    "flags of added tokens": (
        {"tokenizer.json": plain(), "tokenizer_config.json": {**FAST, "added_tokens_decoder": decoder(rstrip=True)}},
        SIZE,
        "change what tokenizer.json says",
    ),
    "additional special tokens": (
        {"tokenizer.json": plain(), "tokenizer_config.json": {**FAST, "additional_special_tokens": ["<tool>"]}},
        SIZE,
        "the vocabulary lacks: '<tool>'",
    ),
    "one token of several ids": ({"tokenizer.json": plain(post_processor=two_ids())}, SIZE, None),
    "something after a text": (
        {"tokenizer.json": plain(post_processor=around("<|user|>", after=["<|endoftext|>"]))},
        SIZE,
        f"ends every text with the ids [{SIZE}]",
    ),
    "add_bos_token": (
        {"tokenizer.json": plain(), "tokenizer_config.json": {**FAST, "bos_token": "<|user|>", "add_bos_token": True}},
        SIZE,
        "add_bos_token is true in tokenizer_config.json, which transformers 4 goes by",
    ),
    "a pattern of its own": ({"tokenizer.json": plain(pre_tokenizer=split(OWN))}, SIZE, None),
    "a normalizer of its own": ({"tokenizer.json": plain() | {"normalizer": {"type": "NFKC"}}}, SIZE, None),
    "Unigram": ({"tokenizer.json": unigram()}, 1, "without byte fallback"),
    "Unigram, lower case": ({"tokenizer.json": unigram(type="Lowercase")}, 1, "without byte fallback"),
    "a class of another model": (
        with_class("LlamaTokenizer", sentencepiece_models.tables()),
        2,
        "change what tokenizer.json says",
    ),
    "code of its own": (
        {
            "tokenizer.json": plain(),
            "tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["tokenization_x.XTokenizer", None]}},
        },
        SIZE,
        "transformers does not take the checkpoint's own class",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_bundle_has_the_ids_that_transformers_has(tmp_path, name):
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    files, eos, says = CASES[name]
    ctx, directory = build(tmp_path, files, "llama", eos)
    reader = PreTrainedTokenizerFast if name == "code of its own" else AutoTokenizer
    loaded, ours = reader.from_pretrained(tmp_path / "checkpoint"), BundleTokenizer(directory)
    for text in BODY:
        ids = loaded(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text, specials=True) == ids
        assert ours.encode(text) == loaded(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert ours.decode(ids) == loaded.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        stream = ours.stream()
        assert "".join(map(stream.step, ids)) + stream.finish() == ours.decode(ids)
        whole = loaded(text)["input_ids"]
        assert whole[: len(ours.prefix) + len(ids)] == [*ours.prefix, *ids]
    if says is None:
        assert not [warning for warning in ctx.warnings if "T22" in warning]
    else:
        assert [warning for warning in ctx.warnings if says in warning], ctx.warnings


def test_a_control_token_that_is_a_piece_too_is_read_as_transformers_reads_it_and_stays_text_in_chats(tmp_path):
    """transformers takes no chat in which a user spells it; here the spelling is taken apart."""
    from transformers import AutoTokenizer

    template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    files = {"tokenizer.json": unigram(), "tokenizer_config.json": {"eos_token": "</s>", "chat_template": template}}
    ctx, directory = build(tmp_path, files, "llama", 1)
    assert [said for said in ctx.warnings if "a prompt that spells '<unk>', '</s>' becomes the control token" in said]
    loaded, ours = AutoTokenizer.from_pretrained(tmp_path / "checkpoint"), BundleTokenizer(directory)
    for text in ("</s>", "a</s>b", "<unk>x"):
        expected = loaded(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert ours.encode(text) == expected
        assert {0, 1} & {*expected}
    assert ours.chat("hello") == loaded.apply_chat_template([{"role": "user", "content": "hello"}], return_dict=False)
    with pytest.raises(ValueError, match="Can't sanitize"):
        loaded.apply_chat_template([{"role": "user", "content": "a</s>"}], sanitize_control_tokens=True)
    assert ours.chat("a</s>b").count(1) == 1


def test_what_differs_is_refused_whatever_is_at_fault(tmp_path, monkeypatch):
    """A conversion that went wrong after transformers had read the files."""
    from stages.tokenizers import emission

    def faulty(directory, tokenizer, **arguments):
        emit(directory, tokenizer, **arguments)
        path = directory / "tokenizer.json"
        path.write_text(json.dumps(json.loads(path.read_bytes()) | {"pre_tokenizer": GPT2_PRE}), encoding="utf-8")

    emit = emission.emit
    monkeypatch.setattr(emission, "emit", faulty)
    with pytest.raises(StageError, match="ids differ from position"):
        build(tmp_path, {"tokenizer.json": plain(pre_tokenizer=split(OWN))}, "llama", SIZE)
    assert PLAIN != GPT2_PRE
