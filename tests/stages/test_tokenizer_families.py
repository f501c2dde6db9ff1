"""Every family through the stage: it builds, equals an independent reader, and refuses what is not sound."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from stages.runtime.tokenizer import BundleTokenizer
from stages.tokenizers import load_tokenizer_family
from stages.tokenizers.formats.byte_level import spell
from stages.tokenizers.formats.patterns import GPT2
from stages.tokenizers.formats.world_vocabulary import WorldTokenizer
from stages.tokenizers.proof.equality import GENERATED_CORPUS, code_points, generated_corpus, sample_corpus
from stages.tokenizers.reference.merge_loop import MergeLoop
from stages.tokenizers.reference.unicode9_nfc import nfc
from stages.tokenizers.resolution import resolve
from tests.support.tiny_tokenizers import SHARED, tiny_ranks
from tests.support.tokenizer_folders import (
    FOLDERS,
    PREFIXES,
    SIZE,
    build,
    merges,
    tables,
    vocab,
    with_class,
    world_text,
)

ROOT = Path(__file__).resolve().parents[2]
NEOX = SHARED / "tokenizers" / "gpt-neox-20b.tokenizer.json"
WORLD = SHARED / "tokenizers" / "rwkv_vocab_v20230424.txt"
needs_shared = pytest.mark.skipif(not NEOX.is_file(), reason="the published vocabularies are not beside the repository")


@pytest.mark.parametrize("name", FOLDERS)
def test_every_family_builds_and_is_proven(built, name):
    ctx, directory = built(name)
    assert "proven equal" in ctx.summary_text
    info = json.loads((directory / "tokenizer_info.json").read_bytes())
    vocabulary = "rwkv_vocab.txt" if name == "rwkv world" else "tokenizer.json"
    assert sorted(p.name for p in directory.iterdir()) == sorted(
        [vocabulary, "tokenizer_config.json", "tokenizer_info.json"]
    )
    assert info["normalize"] is None
    assert info["prefix"] == PREFIXES.get(name, [])
    assert FOLDERS[name][2] in info["stop"]


@pytest.mark.parametrize("name", ["neox", "qwen2 tables", "llama3 tables", "metaspace first"])
def test_the_emitted_file_is_the_checkpoints_own_for_the_library(built, name, tmp_path):
    """The proof is against our reader; this is against the library on the file as the checkpoint has it."""
    from tokenizers import Tokenizer

    source = tmp_path / "tokenizer.json"
    source.write_text(json.dumps(FOLDERS[name][0]["tokenizer.json"]), encoding="utf-8")
    original = Tokenizer.from_file(str(source))
    emitted = Tokenizer.from_file(str(built(name)[1] / "tokenizer.json"))
    for _, text in (*sample_corpus(), *code_points()[::50]):
        for tokenizer in (original, emitted):
            tokenizer.encode_special_tokens = len(text) % 2 == 0
        assert original.encode(text).ids == emitted.encode(text).ids


@pytest.mark.parametrize("name", [name for name in FOLDERS if name != "rwkv world"])
def test_transformers_loads_what_is_emitted_and_agrees(built, name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from transformers import AutoTokenizer

    files, directory = FOLDERS[name][0], built(name)[1]
    checkpoint = directory.parents[1] / "checkpoint"
    resolution = resolve(checkpoint, {n: checkpoint / n for n in files})
    reference = load_tokenizer_family(resolution.family).reference(resolution)
    loaded = AutoTokenizer.from_pretrained(directory)
    for _, text in sample_corpus():
        assert loaded(text)["input_ids"] == [*reference.prefix, *reference.encode(text, specials=True)]


def test_a_vocabulary_that_lacks_bytes_gives_the_librarys_ids_and_says_which(tmp_path):
    """As SmolLM2's: control characters and lead bytes that its training text did not have."""
    from tokenizers import Tokenizer

    lacking = [spell(byte) for byte in (b"\x04", b"\x1d", b"\xf1")]
    table = {f"<unused{index}>" if token in lacking else token: index for token, index in vocab().items()}
    value = tables(model={"vocab": table}, normalizer=None)
    ctx, directory = build(tmp_path, with_class("GPT2Tokenizer", value), "llama", SIZE)
    assert [warning for warning in ctx.warnings if "04 1D F1" in warning]
    original, emitted = Tokenizer.from_str(json.dumps(value)), Tokenizer.from_file(str(directory / "tokenizer.json"))
    for text in ("a\x04b", "\x1d", "th\x04e", "\U00050000x", "plain"):
        assert original.encode(text).ids == emitted.encode(text).ids
    assert BundleTokenizer(directory).encode("a\x04b") == [97, 98]


def test_both_ways_to_store_llama_3_give_one_tokenizer(built):
    from tokenizers import Tokenizer

    first, second = (
        Tokenizer.from_file(str(built(name)[1] / "tokenizer.json")) for name in ("llama3 tables", "llama3 model")
    )
    for _, text in sample_corpus():
        assert first.encode(text).ids == second.encode(text).ids


def test_the_reference_is_no_echo_of_the_library():
    """Worked by hand: pairs in the order of rank, the leftmost first, and no pair across a split."""
    table = {c: i for i, c in enumerate("abc")} | {"ab": 3, "bc": 4, "abc": 5, "ca": 6, "Ġ": 7}
    loop = MergeLoop(table, [("b", "c"), ("a", "b"), ("a", "bc"), ("c", "a")], splits=[GPT2])
    assert loop.encode("abc", specials=True) == [5]
    assert loop.encode("abab", specials=True) == [3, 3]
    assert loop.encode("cab", specials=True) == [2, 3]
    assert loop.encode("ca b", specials=True) == [6, 7, 1]
    assert loop.decode([6, 7, 1]) == "ca b"
    added = [{"id": 8, "content": "<s>", "special": True, "rstrip": True}, {"id": 9, "content": "cc", "special": False}]
    loop = MergeLoop(table | {"<": 10, "s": 11, ">": 12}, [], added=added, splits=[GPT2])
    assert loop.encode("a<s>  b", specials=True) == [0, 8, 1]
    assert loop.encode("a<s>ccb", specials=False) == [0, 10, 11, 12, 9, 1]


def test_old_nfc_is_nfc_except_for_marks_that_came_later():
    assert nfc("e\u0301") == "\xe9"
    assert nfc("q\u0301\u0323") == "q\u0323\u0301"
    assert nfc("q\u0301\u0d3b") == "q\u0301\u0d3b"
    from tokenizers import normalizers

    library = normalizers.NFC()
    for _, text in code_points():
        assert nfc(text) == library.normalize_str(text)


def test_the_world_vocabulary_is_written_as_documented(built, tmp_path):
    path = built("rwkv world")[1] / "rwkv_vocab.txt"
    lines = path.read_bytes().splitlines()
    assert lines[:2] == [b"1 AA==", b"2 AQ=="]
    assert len(lines) == SIZE
    again = WorldTokenizer.load(path)
    again.save(str(tmp_path / "again"))
    assert (tmp_path / "again").read_bytes() == path.read_bytes()
    assert world_text().startswith(b"1 '\\x00' 1\n2 '\\x01' 1\n")
    assert again.decode(again.encode("héllo <|endoftext|>").ids, skip_special_tokens=False) == "héllo <|endoftext|>"


def test_the_corpora_that_ship_are_200_kilobytes_as_their_script_draws_them():
    script = ROOT / "benchmarks" / "corpus.py"
    drawn = subprocess.run([sys.executable, script], check=True, capture_output=True).stdout
    assert drawn == GENERATED_CORPUS.read_bytes()
    assert sum(len(text.encode()) for _, text in (*sample_corpus(), *generated_corpus())) > 200_000
    assert len({kind for kind, _ in generated_corpus()}) > 15


def test_a_merge_is_found_whatever_the_piece(built):
    """Tokens that no merge reaches exist in published vocabularies; ignore_merges finds them and nothing else does."""
    from tokenizers import Tokenizer

    loop = MergeLoop(vocab(), merges(), splits=[GPT2], ignore_merges=True)
    tokenizer = Tokenizer.from_file(str(built("llama3 tables")[1] / "tokenizer.json"))
    for token in tiny_ranks()[256::9]:
        text = token.decode(errors="replace")
        if text.strip() == text and "\ufffd" not in text and text.isalpha():
            assert loop.encode(text, specials=True) == tokenizer.encode(text, add_special_tokens=False).ids


def nasty(step):
    with (SHARED / "nasty-corpus.jsonl").open(encoding="utf-8") as lines:
        return [tuple(json.loads(line)) for line in lines][::step]


def published(tmp_path, name):
    if name == "neox":
        files = {"tokenizer.json": NEOX, "tokenizer_config.json": {"tokenizer_class": "GPTNeoXTokenizer"}}
        return (*build(tmp_path, files, "gpt_neox", 0, rows=50_432), files)
    files = {WORLD.name: WORLD}
    return (*build(tmp_path, files, "rwkv", 0, rows=65_536), files)


def differences(directory, files, documents, sequences):
    from tokenizers import Tokenizer

    path = directory / "rwkv_vocab.txt"
    tokenizer = WorldTokenizer.load(path) if path.is_file() else Tokenizer.from_file(str(directory / "tokenizer.json"))
    checkpoint = directory.parents[1] / "checkpoint"
    resolution = resolve(checkpoint, {name: checkpoint / name for name in files})
    reference = load_tokenizer_family(resolution.family).reference(resolution)
    found = []
    for kind, text in documents:
        for specials in (True, False):
            tokenizer.encode_special_tokens = not specials
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            if ids != reference.encode(text, specials=specials):
                found.append((kind, specials, text))
            if tokenizer.decode(ids, skip_special_tokens=False) != reference.decode(ids):
                found.append((kind, "decode", text))
    known, generator = sorted(reference.tokens()), random.Random(20_000)  # noqa: S311 - the same ids on every run
    for _ in range(sequences):
        ids = [generator.choice(known) for _ in range(generator.randrange(1, 40))]
        if tokenizer.decode(ids, skip_special_tokens=False) != reference.decode(ids):
            found.append(("ids", "decode", ids))
    return found


@needs_shared
@pytest.mark.parametrize("name", ["neox", "rwkv world"])
def test_the_published_vocabularies_equal_their_references_on_a_sample(tmp_path, name):
    _, directory, files = published(tmp_path, name)
    assert differences(directory, files, nasty(40), 500) == []


@needs_shared
@pytest.mark.slow
@pytest.mark.parametrize("name", ["neox", "rwkv world"])
def test_the_published_vocabularies_equal_their_references_on_the_whole_nasty_corpus(tmp_path, name):
    _, directory, files = published(tmp_path, name)
    documents = nasty(1)
    assert len(documents) == 9_804
    assert differences(directory, files, documents, 20_000) == []
