"""Faults injected between conversion and proof: each is caught by the check that is named for it."""

from __future__ import annotations

import dataclasses
import json

import pytest

from stagegraph.stage import StageError
from stages.tokenizer_bundle import TokenizerBundle
from stages.tokenizers import load_tokenizer_family
from stages.tokenizers.emission import emit
from stages.tokenizers.errors import TokenizerError
from stages.tokenizers.proof.checks import ERROR, NOTE, WARNING, examine
from stages.tokenizers.proof.equality import prove
from stages.tokenizers.tokenizer_family import ModelFacts
from tests.support.local_context import run_stage
from tests.support.tiny_tokenizers import (
    EMBEDDING,
    SPECIALS,
    resolved,
    tiktoken_text,
    tiny_ranks,
    write_checkpoint,
    write_inputs,
)

RANKS = len(tiny_ranks())
FACTS = ModelFacts(
    embedding=EMBEDDING,
    rows=RANKS + SPECIALS + 16,
    vocab_size=RANKS + SPECIALS + 16,
    context_window=512,
    bos=None,
    eos=(RANKS,),
    pad=RANKS,
    stop=(RANKS,),
    chat_format="chatml",
)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "qwen.tiktoken"
    path.write_bytes(tiktoken_text(tiny_ranks()))
    return path


@pytest.fixture(scope="module")
def family():
    return load_tokenizer_family("tiktoken-qwen")


@pytest.fixture(scope="module")
def reference(family, source):
    return family.reference(resolved(source))


@pytest.fixture
def emitted(tmp_path, family, source):
    return emit_with(FACTS, tmp_path / "tokenizer", family, source)


def emit_with(facts, directory, family, source, *, chat_template=None):
    resolution = resolved(source)
    if chat_template:
        resolution = dataclasses.replace(resolution, chat_templates={"default": chat_template})
    emit(
        directory,
        family.convert(resolution),
        family=family,
        facts=facts,
        resolution=resolution,
        fingerprint="",
    )
    return directory


def edit(directory, change, name="tokenizer.json"):
    value = json.loads((directory / name).read_bytes())
    change(value)
    (directory / name).write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def findings(directory, reference, facts=FACTS, declared=None, level=ERROR):
    subject, found = examine(directory, facts, declared or {})
    found += prove(subject, reference, lambda done, total: None)
    return {finding.check: finding.message for finding in found if finding.level == level}


def test_the_unharmed_emission_passes_every_check(emitted, reference):
    assert findings(emitted, reference) == {}
    assert findings(emitted, reference, level=WARNING) == {}
    assert set(findings(emitted, reference, level=NOTE)) == {"T08"}


def use_gpt2_pattern(spec):
    spec["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def add_prefix_space(spec):
    spec["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = True


def swap_two_ids(spec):
    vocab = spec["model"]["vocab"]
    rare = [token for token, index in vocab.items() if index in {0xC0, 0xC1}]  # bytes that no UTF-8 text has
    vocab[rare[0]], vocab[rare[1]] = vocab[rare[1]], vocab[rare[0]]


def shift_specials(spec):
    for token in spec["added_tokens"]:
        token["id"] += 1


def sentencepiece_decoder(spec):
    spec["decoder"] = {
        "type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True
    }  # fmt: skip


def drop_byte(spec):
    vocab = spec["model"]["vocab"]
    spec["model"]["merges"] = []
    del vocab["!"]


MUTATIONS = {
    "GPT-2 pattern": (use_gpt2_pattern, {"T20", "T21"}),
    "NFC dropped": (lambda spec: spec.update(normalizer=None), {"T20"}),
    "two ids swapped": (swap_two_ids, {"T20"}),
    "merges truncated": (lambda spec: spec["model"].update(merges=spec["model"]["merges"][:400]), {"T20", "T21"}),
    "merges reordered": (lambda spec: spec["model"]["merges"].reverse(), {"T20", "T21"}),
    "special ids shifted": (shift_specials, {"T05"}),
    "special tokens dropped": (lambda spec: spec.update(added_tokens=[]), {"T14"}),
    "special token not special": (lambda spec: spec["added_tokens"][0].update(special=False), {"T21"}),
    "special token eats spaces": (lambda spec: spec["added_tokens"][0].update(lstrip=True), {"T20"}),
    "decoder removed": (lambda spec: spec.update(decoder=None), {"T09", "T19"}),
    "sentencepiece decoder": (sentencepiece_decoder, {"T09", "T19"}),
    "prefix space": (add_prefix_space, {"T20"}),
    "duplicate added token": (lambda spec: spec["added_tokens"].append(spec["added_tokens"][0]), {"T03"}),
    "byte without token": (drop_byte, {"T20"}),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_fault_of_tokenizer_json_is_caught_by_its_check(emitted, reference, name):
    change, expected = MUTATIONS[name]
    edit(emitted, change)
    found = findings(emitted, reference)
    assert expected <= set(found), found


def test_two_swapped_ids_show_in_the_map_whatever_the_texts(emitted, reference):
    edit(emitted, swap_two_ids)
    assert "id 192 is b'\\xc1' in the emitted file and b'\\xc0' in the source" in findings(emitted, reference)["T20"]


def test_a_difference_shows_text_and_both_id_lists(emitted, reference):
    edit(emitted, use_gpt2_pattern)
    message = findings(emitted, reference)["T21"]
    assert "ids differ from position" in message
    assert "emitted [" in message
    assert "reference [" in message
    assert "must not ship" in message


@pytest.mark.parametrize(
    ("change", "check"),
    [
        ({"rows": RANKS + SPECIALS - 1, "vocab_size": RANKS + SPECIALS - 1}, "T06"),
        ({"vocab_size": RANKS}, "T06"),
        ({"eos": (RANKS + SPECIALS,)}, "T14"),
        ({"stop": (151643,)}, "T14"),
        ({"pad": 10**9}, "T14"),
        ({"bos": RANKS + SPECIALS}, "T14"),
    ],
)
def test_a_model_that_contradicts_the_vocabulary_is_caught(tmp_path, family, source, reference, change, check):
    facts = dataclasses.replace(FACTS, **change)
    assert check in findings(emit_with(facts, tmp_path / "t", family, source), reference, facts)


def test_spare_rows_and_template_text_that_is_no_token_are_said_and_fail_nothing(tmp_path, family, source, reference):
    """DeepSeek has 2,385 spare rows; TinyLlama and Zephyr were trained on <|user|> as plain text."""
    rows = {"rows": RANKS + 2000, "vocab_size": RANKS + 2000}
    facts = dataclasses.replace(FACTS, **rows)
    directory = emit_with(facts, tmp_path / "t", family, source, chat_template="{{ '<|user|>' }}")
    assert findings(directory, reference, facts) == {}
    assert "far more than padding" in findings(directory, reference, facts, level=WARNING)["T07"]
    assert "<|user|> is no token here but text" in findings(directory, reference, facts, level=NOTE)["T16"]


def test_stated_ids_that_contradict_the_vocabulary_are_caught(emitted, reference):
    assert not findings(emitted, reference, declared={RANKS: "<|endoftext|>"})
    assert "'<|im_end|>' has id 5" in findings(emitted, reference, declared={5: "<|im_end|>"})["T05"]


def test_lost_stop_ids_and_wrong_names_are_caught(emitted, reference):
    edit(emitted, lambda info: info.update(stop=[]), "tokenizer_info.json")
    assert "not in tokenizer_info.json" in findings(emitted, reference)["T14"]
    edit(emitted, lambda info: info.update(stop=[RANKS]), "tokenizer_info.json")
    edit(emitted, lambda config: config.update({"eos_token": "<|im_end|>"}), "tokenizer_config.json")
    assert "eos_token '<|im_end|>'" in findings(emitted, reference)["T14"]


def test_a_wrong_mask_is_caught(emitted, reference):
    edit(emitted, lambda info: info.update(active_vocab_size=RANKS), "tokenizer_info.json")
    assert f"the largest id is {RANKS + SPECIALS - 1}" in findings(emitted, reference)["T08"]


def test_doubtful_settings_are_warnings(tmp_path, family, source, reference):
    facts = dataclasses.replace(FACTS, eos=(), stop=(65,))
    directory = emit_with(facts, tmp_path / "t", family, source)
    edit(directory, lambda config: config.update(clean_up_tokenization_spaces=True), "tokenizer_config.json")
    warnings = findings(directory, reference, facts, level=WARNING)
    assert set(warnings) == {"T15", "T18"}
    assert json.loads((directory / "tokenizer_info.json").read_bytes())["eos"] == [RANKS]


@pytest.mark.parametrize(
    ("data", "check"),
    [
        (None, "T01"),
        (b"{}", "T01"),
        (b"\xff", "T01"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "T02"),
    ],
)
def test_an_unreadable_tokenizer_json_is_caught_first(emitted, data, check):
    path = emitted / "tokenizer.json"
    path.unlink()
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(TokenizerError, match=f"^{check}: "):
        examine(emitted, FACTS, {})


def test_a_finding_fails_the_stage_with_one_error(tmp_path, monkeypatch):
    def faulty(directory, tokenizer, **arguments):
        emit(directory, tokenizer, **arguments)
        edit(directory, use_gpt2_pattern)

    monkeypatch.setattr("stages.tokenizers.emission.emit", faulty)
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    with pytest.raises(StageError) as caught:
        run_stage(
            TokenizerBundle(), tmp_path / "out", {"checkpoint": str(checkpoint)}, write_inputs(tmp_path / "in", RANKS)
        )
    assert [problem.partition(":")[0] for problem in caught.value.problems] == ["T20", "T21"]
