"""Added tokens that the embedding has no row for: left out and said, unless a text needs one."""

from __future__ import annotations

import json

import pytest

from stagegraph.stage import StageError
from stages.runtime.tokenizer import BundleTokenizer
from tests.support import sentencepiece_models
from tests.support.tokenizer_folders import FOLDERS, SIZE, added, build, tables

PAD = "<|pad|>"
NAMES = ("<|endoftext|>", "<|user|>")
ROWS = SIZE + len(NAMES)
TEXTS = ("Hello there, it's 2024!", f"a{PAD}b <|user|>", "é 你好", "")


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def folder(*names, template=None, **config):
    chat = {} if template is None else {"chat_template": template}
    return {
        "tokenizer.json": tables(added_tokens=added(*NAMES, *names), normalizer=None),
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", **config, **chat},
    }


def test_a_pad_token_without_a_row_is_left_out_of_the_tokenizer_that_transformers_loads(tmp_path):
    from transformers import AutoTokenizer

    template = "{% for m in messages %}<|user|>{{ m.content }}<|endoftext|>{% endfor %}"
    ctx, directory = build(tmp_path, folder(PAD, pad_token=PAD, template=template), "llama", SIZE, rows=ROWS)
    assert [said for said in ctx.warnings if f"T06: added tokens beyond the {ROWS:,} rows" in said]
    assert [said for said in ctx.warnings if f"pad_token '{PAD}'" in said]
    checkpoint, emitted = (AutoTokenizer.from_pretrained(path) for path in (tmp_path / "checkpoint", directory))
    assert checkpoint(PAD)["input_ids"] == [ROWS]  # where its model has no row, so that it fails there
    assert max(emitted.get_vocab().values()) == ROWS - 1
    assert json.loads((directory / "tokenizer_info.json").read_bytes())["active_vocab_size"] == ROWS
    ours = BundleTokenizer(directory)
    for text in TEXTS:
        assert emitted(text)["input_ids"] == ours.encode(text, specials=True)
        assert max(ours.encode(text, specials=True), default=0) < ROWS
        if PAD not in text:
            assert ours.encode(text, specials=True) == checkpoint(text)["input_ids"]


def of_sentencepiece():
    import sentencepiece

    model = sentencepiece_models.trained("llama")
    size = sentencepiece.SentencePieceProcessor(model_proto=model).vocab_size()
    return {"tokenizer.model": model, "added_tokens.json": {PAD: size}}, size


def with_many():
    return {"tokenizer.json": tables(added_tokens=added(*(f"<|{i}|>" for i in range(60))))}, SIZE + 5


@pytest.mark.parametrize("made", [of_sentencepiece, with_many])
def test_tokens_beyond_the_rows_are_left_out_of_every_family(tmp_path, made):
    files, rows = made()
    ctx, directory = build(tmp_path, files, "llama", 2, rows=rows)
    assert [said for said in ctx.warnings if "T06" in said and "left out" in said]
    ids = BundleTokenizer(directory).encode(f"a {PAD} <|59|>", specials=True)
    assert ids
    assert max(ids) < rows


def test_a_vocabulary_that_has_the_token_too_loses_it_there(tmp_path):
    files = folder(PAD)
    files["tokenizer.json"]["model"]["vocab"] |= {name: SIZE + i for i, name in enumerate((*NAMES, PAD))}
    _, directory = build(tmp_path, files, "llama", SIZE, rows=ROWS)
    written = json.loads((directory / "tokenizer.json").read_bytes())
    assert PAD not in json.dumps(written)


@pytest.mark.parametrize(
    ("files", "rows", "says"),
    [
        (folder(PAD), SIZE - 1, "T06: the largest id is"),  # an ordinary token, which any text may hold
        (folder(template=f"{{{{ '{PAD}' }}}}"), SIZE, "T15: generation_config.json names no eos_token_id"),
        (folder(PAD, template=f"{{{{ '{PAD}' }}}}"), ROWS, "T23: chat template default"),
        (FOLDERS["llama3 tables"][0], SIZE, f"T06: every text is preceded by the ids [{SIZE}]"),
    ],
)
def test_what_a_text_or_a_chat_cannot_do_without_is_refused(tmp_path, files, rows, says):
    with pytest.raises(StageError) as caught:
        build(tmp_path, files, "llama", 2 if rows == ROWS else None, rows=rows)
    assert says in " ".join(caught.value.problems)


def test_a_vocabulary_without_added_tokens_is_another_models(tmp_path):
    with pytest.raises(StageError) as caught:
        build(tmp_path, *FOLDERS["rwkv world"], rows=SIZE - 1)
    assert "T06: the largest id is" in " ".join(caught.value.problems)
