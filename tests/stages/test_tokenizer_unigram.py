"""tokenizer.model with a Unigram model or a table of normal forms, against sentencepiece itself."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
import sentencepiece
from tokenizers import Tokenizer

from stagegraph.stage import StageError
from stages.runtime.tokenizer import BundleTokenizer
from stages.tokenizers.formats.charsmap import Charsmap
from stages.tokenizers.formats.sentencepiece_model import read_model
from stages.tokenizers.proof import beside_transformers
from stages.tokenizers.proof.equality import PROBES, code_points, sample_corpus
from tests.support.sentencepiece_models import META, field, model, trained
from tests.support.tiny_tokenizers import SHARED
from tests.support.tokenizer_folders import build

NAMES = ["unigram", "unigram nfkc", "unigram bytes nfkc", "nmt_nfkc"]
TEXTS = [*PROBES, *(text for _, text in sample_corpus()), *(text for _, text in code_points()[::5])]
TEXTS += ["ab" * 200, "=" * 99, "\t" * 70, "a <sep>b[REF] [REF]c", "ｱｲｳ ① ﬁ", "한글 e\u0301", "a\r\nb", ""]


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """transformers' reading has tests of its own."""

    def unread(*_):
        raise beside_transformers.Unread("N", "not asked")

    monkeypatch.setattr(beside_transformers, "open_files", unread)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Return name -> (context, what sentencepiece loads, the emitted tokenizer, the directory), each once."""
    known = {}

    def of(name):
        if name not in known:
            files = {"tokenizer.model": trained(name)}
            ctx, directory = build(tmp_path_factory.mktemp("unigram"), files, "llama", 2)
            emitted = Tokenizer.from_file(str(directory / "tokenizer.json"))
            emitted.encode_special_tokens = True
            known[name] = ctx, sentencepiece.SentencePieceProcessor(model_proto=trained(name)), emitted, directory
        return known[name]

    return of


def score(loaded, ids):
    return sum(min(0.0, loaded.get_score(index)) for index in ids)


def compared(loaded, emitted, texts):
    """Hold ids against sentencepiece's; return how many texts it normalises otherwise, and how many cuts are tied.

    Where a text has the same normal form in both, only cuts of equal sums may differ: sentencepiece adds in float32, so
    where it takes another piece it may lose as much as two sums of that size are rounded by.
    """
    shaped = tied = 0
    for text in texts:
        here, there = emitted.encode(text, add_special_tokens=False).ids, loaded.encode(text)
        if here == there:
            continue
        if emitted.normalizer.normalize_str(text) != loaded.normalize(text):
            shaped += 1
            continue
        assert len(text) > 50, text
        best, changed = score(loaded, here), (Counter(there) - Counter(here)).total()
        assert abs(best - score(loaded, there)) <= 2 * changed * float(np.spacing(np.float32(abs(best)))), text
        tied += 1
    return shaped, tied


@pytest.mark.parametrize("name", NAMES)
def test_every_id_is_sentencepieces_own(built, name):
    ctx, loaded, emitted, _ = built(name)
    assert "proven equal to tokenizer.model" in ctx.summary_text
    shaped, tied = compared(loaded, emitted, TEXTS)
    has_table = "nfkc" in name
    assert tied <= 4
    assert bool(shaped) == has_table
    assert shaped < len(TEXTS) / 10
    assert any("another normal form in the tokenizers library" in warning for warning in ctx.warnings) == has_table


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_id_is_sentencepieces_own_on_the_nasty_corpus(built, name):
    if not SHARED.is_dir():
        pytest.skip("no ../shared")
    _, loaded, emitted, _ = built(name)
    texts = [json.loads(line)[1] for line in (SHARED / "nasty-corpus.jsonl").read_bytes().splitlines()]
    shaped, tied = compared(loaded, emitted, texts)
    print(f"{name}: of {len(texts)} texts {shaped} have another normal form, {tied} another cut of the same sum")
    assert shaped < len(texts) / 20


@pytest.mark.parametrize("name", NAMES)
def test_what_a_user_types_of_control_and_byte_pieces_is_text(built, name):
    """The library looks for every piece of a Unigram model in a text; sentencepiece for ordinary ones alone."""
    _, loaded, emitted, directory = built(name)
    ours = BundleTokenizer(directory)
    for text in ("a</s>b", "<s>", "x<unk>", "<0x0A>", "</s></s>", "a<0x0A>b<0xFF>"):
        ids = emitted.encode(text, add_special_tokens=False).ids
        assert ids == ours.encode(text) == loaded.encode(text)
        assert not {1, 2, loaded.piece_to_id("<0x0A>") or 1} & {*ids}
    assert 2 in ours.encode("a</s>b", specials=True)


def test_a_folder_of_t5s_form_has_sentencepieces_ids_and_nothing_before_a_text(tmp_path):
    """As rinna's models of GPT-NeoX are published."""
    config = {"tokenizer_class": "T5Tokenizer", "bos_token": "<s>", "eos_token": "</s>", "extra_ids": 0}
    files = {"spiece.model": trained("unigram nfkc"), "tokenizer_config.json": config}
    _, directory = build(tmp_path, files, "gpt_neox", 2)
    ours, loaded = (
        BundleTokenizer(directory),
        sentencepiece.SentencePieceProcessor(model_proto=trained("unigram nfkc")),
    )
    for text in ("Hello there", " lead", "a  b"):
        assert ours.prompt(text) == loaded.encode(text)


def test_symbols_of_the_model_are_kept_whole_and_come_back(built):
    _, loaded, _, directory = built("unigram nfkc")
    ours = BundleTokenizer(directory)
    for text in ("a <sep>the[REF] [REF]and", "<sep>", "[REF][REF]"):
        ids = ours.encode(text)
        assert ids == loaded.encode(text)
        assert ours.decode(ids) == loaded.decode(ids) == text


@pytest.mark.parametrize("name", ["unigram nfkc", "nmt_nfkc"])
def test_the_table_of_normal_forms_is_read_as_sentencepiece_reads_it(tmp_path, name):
    (tmp_path / "tokenizer.model").write_bytes(trained(name))
    loaded = sentencepiece.SentencePieceProcessor(model_proto=trained(name))
    table = Charsmap(read_model(tmp_path / "tokenizer.model").charsmap)
    for text in filter(str.strip, TEXTS):
        if "<sep>" not in text and "\u2581" not in text:
            normal = table.normalize(text)
            normal = " ".join(filter(None, normal.split(" "))) if name == "unigram nfkc" else normal
            assert "\u2581" + normal.replace(" ", "\u2581") == loaded.normalize(text)


DAMAGED = {
    "not a table": b"no table at all, of whatever kind",
    "longer than it is": (1 << 20).to_bytes(4, "little") + b"\0" * 1024,
    "leads out of itself": (1024).to_bytes(4, "little") + (0x7FFFFE00).to_bytes(4, "little") * 256 + b"\0",
    "ends before its forms": (1024).to_bytes(4, "little") + (0x80000009).to_bytes(4, "little") * 256 + b"a\0",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_table_is_refused_by_name(tmp_path, name):
    data = model([*META, ("a", -1, 1)]) + field(3, field(2, DAMAGED[name]))
    with pytest.raises(StageError, match="the table of normal forms"):
        build(tmp_path, {"tokenizer.model": data}, "llama", 2)


def test_symbols_that_the_table_changes_are_refused(tmp_path):
    data = trained("nmt_nfkc") + field(1, field(1, "①") + field(2, 0.0) + field(3, 4))
    with pytest.raises(StageError, match="are not normal forms of the model's own table"):
        build(tmp_path, {"tokenizer.model": data}, "llama", 2)
