"""Vocabularies that readers of our own prove, compared with what transformers' AutoTokenizer makes of the folder."""

from __future__ import annotations

import pytest

from stages.runtime.tokenizer import BundleTokenizer
from stages.tokenizers.proof import beside_transformers
from stages.tokenizers.proof.equality import PROBES, sample_corpus
from tests.support.sentencepiece_models import trained
from tests.support.tokenizer_folders import FOLDERS, SIZE, build, llama3_folder, tekken

pytest.importorskip("google.protobuf")
CHAT = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'system' %}{{ bos_token + '<<SYS>>' + m.content }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>"}
TEXTS = [*PROBES, *(text for _, text in sample_corpus())]
NONE = {"add_bos_token": False}
# Name -> (files, model family, eos id): all ids of all texts are transformers', and what goes before a text.
LONG = {"sentencepiece", "a table of normal forms"}  # six seconds each
EQUAL = {
    "sentencepiece": ({"tokenizer.model": trained("llama"), "tokenizer_config.json": NONE}, "llama", 2),
    "sentencepiece, mistral": (
        {
            "tokenizer.model": trained("control tokens"),
            "tokenizer_config.json": {**LLAMA, "legacy": True},
            "config.json": {"model_type": "mistral"},
        },
        "mistral",
        2,
    ),
    "a table of normal forms": ({"tokenizer.model": trained("nmt_nfkc"), "tokenizer_config.json": NONE}, "llama", 2),
    "tekken": ({"tekken.json": tekken(), "tokenizer_config.json": NONE}, "mistral", 2),
    "llama 3 ranks": (
        {**llama3_folder(), "tokenizer_config.json": {**llama3_folder()["tokenizer_config.json"], **NONE}},
        "llama",
        SIZE + 1,
    ),
}


def levels(ctx, check):
    """Return the levels of a check's findings as the page of checks has them."""
    return [line.split("(")[1][0] for line in ctx.views["checks"].splitlines() if line.startswith(f"{check} (")]


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in LONG)) for n in EQUAL])
def test_the_ids_are_those_of_transformers(tmp_path, name):
    from transformers import AutoTokenizer

    files, family, eos = EQUAL[name]
    ctx, directory = build(tmp_path, files, family, eos)
    assert levels(ctx, "T22")[-1] == "N", ctx.views["checks"]
    assert "T17" not in "".join(ctx.warnings)
    loaded, ours = AutoTokenizer.from_pretrained(tmp_path / "checkpoint"), BundleTokenizer(directory)
    for text in TEXTS:
        ids = loaded(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text, specials=True) == ids
        assert ours.decode(ids) == loaded.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert ours.prompt(text)[: len(ours.prefix)] == loaded(text)["input_ids"][: len(ours.prefix)]


def test_the_class_of_llama_loses_a_space_before_a_text_and_all_else_is_equal(tmp_path):
    """It puts none before a text that begins with one: sentencepiece does, and the model learned with sentencepiece."""
    from transformers import AutoTokenizer

    files = {"tokenizer.model": trained("llama"), "tokenizer_config.json": LLAMA}
    ctx, directory = build(tmp_path, files, "llama", 2)
    assert levels(ctx, "T22") == ["W"]
    assert any("does not say `legacy`" in warning for warning in ctx.warnings)
    loaded, ours = AutoTokenizer.from_pretrained(tmp_path / "checkpoint"), BundleTokenizer(directory)
    for text in TEXTS:
        equal = ours.encode(text, specials=True) == loaded(text, add_special_tokens=False)["input_ids"]
        assert equal or text.startswith((" ", "\u2581")), text


@pytest.mark.parametrize(
    "stated", [{}, *(pytest.param({"legacy": value}, marks=pytest.mark.slow) for value in (True, False, None))]
)
def test_chats_have_the_ids_of_transformers_whatever_is_said_of_legacy(tmp_path, stated):
    """``legacy`` says whether a space goes before what follows a special token, as in ``<s>[INST]``."""
    config = {**LLAMA, **stated, "chat_template": CHAT}
    ctx, _ = build(tmp_path, {"tokenizer.model": trained("llama"), "tokenizer_config.json": config}, "llama", 2)
    assert levels(ctx, "T23") == ["N"], ctx.views["checks"]


def test_a_class_that_reads_the_pieces_as_another_kind_of_model_is_said_and_not_followed(tmp_path):
    config = {**LLAMA, "chat_template": CHAT}
    ctx, _ = build(tmp_path, {"tokenizer.model": trained("unigram"), "tokenizer_config.json": config}, "llama", 2)
    assert levels(ctx, "T22") == ["W"]
    assert "proven equal to tokenizer.model" in ctx.summary_text


def test_a_reading_of_another_vocabulary_is_said(tmp_path):
    files = {"tokenizer.model": trained("llama"), "config.json": {"model_type": "qwen2"}}
    ctx, _ = build(tmp_path, files, "qwen2", 2)
    assert any("are not compared with transformers" in warning for warning in ctx.warnings), ctx.views["checks"]


@pytest.mark.parametrize(
    ("name", "says"), [("rwkv world", "no reader of rwkv_vocab"), ("sentencepiece", "are installed")]
)
def test_what_transformers_cannot_read_is_noted(tmp_path, name, says, monkeypatch):
    monkeypatch.setattr(beside_transformers, "find_spec", lambda _: None)
    ctx, _ = build(tmp_path, *FOLDERS[name])
    assert levels(ctx, "T22") == ["N"]
    assert says in ctx.views["checks"]
