"""Faults between conversion and proof, in the families beside first-generation Qwen: each is caught by its check."""

from __future__ import annotations

import json
import shutil

import pytest

from stages.tokenizers import EMBEDDINGS, load_tokenizer_family
from stages.tokenizers.formats.patterns import LLAMA3, QWEN
from stages.tokenizers.proof.checks import ERROR, examine
from stages.tokenizers.proof.equality import prove
from stages.tokenizers.resolution import resolve
from stages.tokenizers.tokenizer_family import ModelFacts
from tests.support.tokenizer_folders import FOLDERS, split


def findings(directory, name):
    """Examine a spoilt directory as the stage would, against the reference of the unspoilt checkpoint."""
    root, (files, family, _) = directory.parent, FOLDERS[name]
    checkpoint = root / "checkpoint"
    facts = [json.loads((root / "facts" / f"{port}.json").read_bytes()) for port in ("config", "generation", "tensors")]
    resolution = resolve(checkpoint, {file: checkpoint / file for file in files})
    reference = load_tokenizer_family(resolution.family).reference(resolution)
    model = ModelFacts.read(facts[0], facts[1], facts[2]["tensors"], EMBEDDINGS[family])
    subject, found = examine(directory, model, resolution.declared, resolution.roles)
    found += prove(subject, reference, lambda done, total: None)
    return {finding.check for finding in found if finding.level == ERROR}


def spoil(emitted, name, tmp_path):
    shutil.copytree(emitted(name).parents[1], tmp_path / "copy", symlinks=True)
    (tmp_path / "copy" / "out" / "tokenizer").rename(tmp_path / "copy" / "tokenizer")
    return tmp_path / "copy" / "tokenizer"


def swap(spec):
    vocab = spec["model"]["vocab"]
    first, second = (token for token, index in vocab.items() if index in {0xC0, 0xC1})
    vocab[first], vocab[second] = vocab[second], vocab[first]


def use_qwen_pattern(spec):
    spec["pre_tokenizer"] = split(QWEN)


def runs_become_special(spec):
    for token in spec["added_tokens"]:
        token["special"] = True


def eat_spaces(spec):
    spec["added_tokens"][0]["rstrip"] = True


def swap_characters(spec):
    vocab = spec["model"]["vocab"]
    first, second = list(vocab)[300:302]
    vocab[first], vocab[second] = vocab[second], vocab[first]


def part(key, name, index):
    """Drop one step of a component of tokenizer.json."""
    return lambda spec: spec[key][name].pop(index)


def bytes_off(spec):
    spec["model"]["byte_fallback"] = False


FAULTS = {
    "two pieces swapped": ("sentencepiece", swap_characters, {"T20"}),
    "no space before a text": ("sentencepiece", part("normalizer", "normalizers", 0), {"T20", "T21"}),
    "spaces not replaced": ("sentencepiece", part("normalizer", "normalizers", 1), {"T20", "T21"}),
    "byte decoder removed": ("sentencepiece", part("decoder", "decoders", 1), {"T19"}),
    "bytes not used": ("sentencepiece", bytes_off, {"T20", "T21"}),
    "space not stripped": ("sentencepiece", part("decoder", "decoders", 3), {"T19"}),
    "scores reversed": ("sentencepiece", lambda spec: spec["model"]["merges"].reverse(), {"T20", "T21"}),
    "pieces cut off": (
        "sentencepiece",
        lambda spec: spec["model"].update(merges=spec["model"]["merges"][:50]),
        {"T20", "T21"},
    ),
    "space before each part": (
        "sentencepiece modern",
        lambda spec: spec["pre_tokenizer"]["pretokenizers"][0].update(prepend_scheme="always"),
        {"T21"},
    ),
    "space left out before a space": ("sentencepiece modern", part("pre_tokenizer", "pretokenizers", 0), {"T20"}),
    "Metaspace splits": ("metaspace first", lambda spec: spec["pre_tokenizer"].update(split=True), {"T20", "T21"}),
    "Llama 3's pattern": ("tekken", lambda spec: spec.update(pre_tokenizer=split(LLAMA3)), {"T21"}),
    "nothing before a Tekken text": ("tekken", lambda spec: spec.update(post_processor=None), {"T21"}),
    "two ids swapped": ("neox", swap, {"T20"}),
    "Qwen's pattern": ("neox", use_qwen_pattern, {"T20", "T21"}),
    "NFC dropped": ("neox", lambda spec: spec.update(normalizer=None), {"T20"}),
    "NFC added": ("digits", lambda spec: spec.update(normalizer={"type": "NFC"}), {"T20"}),
    "digits not split": (
        "digits",
        lambda spec: spec.update(pre_tokenizer=spec["pre_tokenizer"]["pretokenizers"][1]),
        {"T21"},
    ),
    "runs of spaces dropped": ("neox", lambda spec: spec.update(added_tokens=spec["added_tokens"][:2]), {"T20", "T21"}),
    "runs of spaces special": ("neox", runs_become_special, {"T21"}),
    "special token eats spaces": ("neox", eat_spaces, {"T21"}),
    "merges truncated": (
        "qwen2 vocab",
        lambda spec: spec["model"].update(merges=spec["model"]["merges"][:300]),
        {"T20", "T21"},
    ),
    "merges reordered": ("qwen2 vocab", lambda spec: spec["model"]["merges"].reverse(), {"T20", "T21"}),
    "decoder removed": ("qwen2 tables", lambda spec: spec.update(decoder=None), {"T09", "T19"}),
    "nothing before a text": ("llama3 model", lambda spec: spec.update(post_processor=None), {"T21"}),
    "special tokens dropped": ("llama3 model", lambda spec: spec.update(added_tokens=[]), {"T14"}),
}


def test_an_unspoilt_copy_has_no_findings(emitted, tmp_path):
    assert findings(spoil(emitted, "neox", tmp_path), "neox") == set()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_tokenizer_json_is_caught(emitted, tmp_path, fault):
    name, change, expected = FAULTS[fault]
    directory = spoil(emitted, name, tmp_path)
    spec = json.loads((directory / "tokenizer.json").read_bytes())
    change(spec)
    (directory / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False), encoding="utf-8")
    assert expected <= findings(directory, name)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda lines: [lines[1].replace(b"2 ", b"1 "), lines[0].replace(b"1 ", b"2 "), *lines[2:]], {"T20"}),
        (lambda lines: lines[:-1], {"T08", "T20"}),
        (lambda lines: lines[:200], {"T20"}),
        (lambda lines: [*lines, b"1231 enp6eno="], {"T20"}),
    ],
    ids=["two ids swapped", "last token lost", "bytes lost", "token added"],
)
def test_a_fault_of_the_world_vocabulary_is_caught(emitted, tmp_path, change, expected):
    directory = spoil(emitted, "rwkv world", tmp_path)
    path = directory / "rwkv_vocab.txt"
    path.write_bytes(b"\n".join(change(path.read_bytes().splitlines())) + b"\n")
    try:
        assert expected <= findings(directory, "rwkv world")
    except ValueError as error:
        assert "no token begins with byte" in str(error)  # noqa: PT017 - a vocabulary without it may say so at once
