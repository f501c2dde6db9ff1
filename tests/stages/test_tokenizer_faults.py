"""Faults of a checkpoint's tokenizer folder: each fails the build with its check or its reason named."""

from __future__ import annotations

import resource

import pytest

from stagegraph.stage import StageError
from stages.tokenizers import load_tokenizer_family
from stages.tokenizers.errors import TokenizerError
from stages.tokenizers.resolution import resolve
from tests.support.tiny_tokenizers import QWEN_CONFIG, tiktoken_text, tiny_ranks
from tests.support.tokenizer_folders import FOLDERS, SIZE, added, build, merges, tables, tekken, vocab, world_text

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
MERGES = ("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges())).encode()
HALF = b"\n".join(MERGES.split(b"\n")[:500])
QWEN2 = FOLDERS["qwen2 vocab"][0]
LLAMA3 = FOLDERS["llama3 model"][0]
QWEN = {"qwen.tiktoken": tiktoken_text(tiny_ranks()), "tokenizer_config.json": QWEN_CONFIG}
SPECIALS = 208


def config(files, **changes):
    return {**files, "tokenizer_config.json": {**files.get("tokenizer_config.json", {}), **changes}}


def neox(**changes):
    return {"tokenizer.json": tables(**changes)}


def halved():
    return {token: index for token, index in vocab().items() if index < 600}


# Name -> (files, model family, what the refusal says). The end of text is where an unharmed vocabulary has it.
FAULTS = {
    "vocabulary truncated": ({**QWEN2, "vocab.json": halved()}, "qwen2", "the vocabulary is truncated"),
    "merges cut in a line": ({**QWEN2, "merges.txt": MERGES[:-3]}, "qwen2", "and not two tokens"),
    "merges truncated": ({**QWEN2, "merges.txt": HALF}, "qwen2", "made by no merge"),
    "merges of another model": ({**QWEN2, "merges.txt": MERGES + b"zz qq\n"}, "qwen2", "not in the vocabulary"),
    "CRLF line endings": ({**QWEN2, "merges.txt": MERGES.replace(b"\n", b"\r\n")}, "qwen2", "CRLF line endings"),
    "merges missing": ({k: v for k, v in QWEN2.items() if k != "merges.txt"}, "qwen2", "no merges.txt beside it"),
    "class missing": ({k: v for k, v in QWEN2.items() if "config" not in k}, "qwen2", "tokenizer_class alone"),
    "duplicate id": (neox(model={"vocab": {**vocab(), "again": 7}}), "gpt_neox", "id 7 has the tokens"),
    "duplicate key": (
        {"tokenizer.json": b'{"model": {}, "model": {"a": "ByteLevel"}, "x": "ByteLevel"}'},
        "llama",
        "twice",
    ),
    "duplicate ranks": (
        {**QWEN, "qwen.tiktoken": tiktoken_text(tiny_ranks()) + b"YQ== 7\n"},
        "qwen",
        "token b'a' again",
    ),
    "ranks truncated": ({**QWEN, "qwen.tiktoken": tiktoken_text(tiny_ranks()[:700])}, "qwen", "T14"),
    "added token twice": (neox(added_tokens=[*added("<|endoftext|>", "<|endoftext|>")]), "gpt_neox", "T03"),
    "added ids leave a gap": (neox(added_tokens=added("<|endoftext|>", start=SIZE + 5)), "gpt_neox", "leave a gap"),
    "huge list of added tokens": (
        neox(added_tokens=added(*(f"<|{i}|>" for i in range(70_000)))),
        "gpt_neox",
        "70,000 added",
    ),
    "wrong byte lengths": ({"rwkv_vocab_x.txt": world_text().replace(b"' 2\n", b"' 3\n")}, "rwkv", "the line says 3"),
    "world lines missing": (
        {"rwkv_vocab_x.txt": b"".join(world_text().splitlines(True)[:-9:2])},
        "rwkv",
        "lines are missing",
    ),
    "world code": ({"rwkv_vocab_x.txt": b"1 __import__('os').getpid() 3\n"}, "rwkv", "is no Python literal"),
    "bos of Llama 3 missing": (config(LLAMA3, bos_token="<s>"), "llama", "T14"),  # noqa: S106
    "specials missing": (
        {"tokenizer.model": tiktoken_text(tiny_ranks())},
        "llama",
        "special tokens are not in tokenizer.model",
    ),
    "stated ids of another model": (config(QWEN, added_tokens_decoder={"5": {"content": "<|im_end|>"}}), "qwen", "T05"),
    "extra_vocab_file": (config(QWEN, extra_vocab_file="more.tiktoken"), "qwen", "extra_vocab_file is set"),
    "pointer": ({"tokenizer.json": POINTER}, "gpt_neox", "Git LFS pointer"),
    "pointer for tokenizer_config": ({**neox(), "tokenizer_config.json": POINTER}, "gpt_neox", "T02"),
    "JSON is not UTF-8": (
        {"tokenizer.json": b'{"ByteLevel": "\xff"}', "tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer"}},
        "llama",
        "not UTF-8",
    ),
    "decoder removed": (neox(decoder=None), "gpt_neox", "T09"),
    "sentencepiece decoder": (
        neox(decoder={"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always"}),
        "gpt_neox",
        "T09",
    ),
    "pattern of tekken": ({"tekken.json": tekken(config={"pattern": "(a|a)*$"})}, "mistral", "is not Tekken's"),
    "tekken truncated": ({"tekken.json": tekken(vocab=tekken()["vocab"][:-60])}, "mistral", "it is truncated"),
    "tekken reordered": ({"tekken.json": tekken(vocab=tekken()["vocab"][::-1])}, "mistral", "not the token of rank 0"),
    "tekken token twice": (
        {"tekken.json": tekken(vocab=[{**t, "token_bytes": "YQ=="} for t in tekken()["vocab"]])},
        "mistral",
        "token b'a' has the ranks 0 and 1",
    ),
    "tekken without specials": ({"tekken.json": tekken(special_tokens=None)}, "mistral", "no list of special tokens"),
    "tekken special twice": (
        {"tekken.json": tekken(special_tokens=[{"rank": i, "token_str": "<s>"} for i in range(2)])},
        "mistral",
        "T03",
    ),
    "tekken special beyond": (
        {"tekken.json": tekken(special_tokens=[{"rank": 10, "token_str": "<s>"}])},
        "mistral",
        "has no id of its own below 10",
    ),
    "tekken bos missing": (
        {"tekken.json": tekken(), "tokenizer_config.json": {"bos_token": "<bos>"}},
        "mistral",
        "T14",
    ),
}


def refusal(tmp_path, files, family, eos=None):
    eos = (
        {"qwen": SIZE, "qwen2": SIZE + 2, "llama": SIZE, "gpt_neox": SIZE, "rwkv": 0, "mistral": 2}[family]
        if eos is None
        else eos
    )
    rows = {"qwen": SIZE + SPECIALS + 16}.get(family, SIZE + 32)
    with pytest.raises(StageError) as caught:
        build(tmp_path, files, family, eos, rows=rows, **({"chat_format": "chatml"} if family == "qwen" else {}))
    return " ".join(caught.value.problems)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_the_folder_is_refused_by_name(tmp_path, name):
    files, family, says = FAULTS[name]
    message = refusal(tmp_path, files, family)
    assert says in message, message
    assert len(message) < 20_000


@pytest.mark.parametrize("name", FOLDERS)
def test_a_stop_id_that_is_no_token_is_refused(tmp_path, name):
    files, family, _ = FOLDERS[name]
    assert "T14" in refusal(tmp_path, files, family, eos=10**6)


def test_line_endings_of_ranks_are_harmless(tmp_path):
    """base64 ignores nothing and ranks are decimal: CRLF gives the same vocabulary, which the proof confirms."""
    files = {**QWEN, "qwen.tiktoken": tiktoken_text(tiny_ranks()).replace(b"\n", b"\r\n")}
    ctx, _ = build(tmp_path, files, "qwen", SIZE, rows=SIZE + SPECIALS + 16, chat_format="chatml")
    assert "proven equal" in ctx.summary_text


def evil(pattern):
    part = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    last = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return neox(pre_tokenizer={"type": "Sequence", "pretokenizers": [part, last]})


HOSTILE = {
    "backtracking pattern": (evil(r"(\S|\S\S|\S?)+$"), "gpt_neox", "retry-limit"),
    "nested JSON": ({"tokenizer.json": b'{"ByteLevel":' + b"[" * 500_000}, "llama", "not JSON as expected"),
    "nested configuration": ({**neox(), "tokenizer_config.json": b'{"a":' * 200_000}, "gpt_neox", "not JSON in UTF-8"),
    "long token": (
        neox(model={"vocab": {**vocab(), "a" * 5_000_000: SIZE}}),
        "gpt_neox",
        "5,000,000 characters is no token",
    ),
    "long line of ranks": (
        {**QWEN, "qwen.tiktoken": b"YWFh" * 2_000_000 + b" 0\n"},
        "qwen",
        "a token of 6000000 bytes",
    ),
    "long line of the world": ({"rwkv_vocab_x.txt": b"1 '" + b"a" * 5_000_000 + b"' 5000000\n"}, "rwkv", "is no token"),
    "nested literal": ({"rwkv_vocab_x.txt": b"1 " + b"(" * 8_000 + b" 1\n"}, "rwkv", "is no Python literal"),
    "path in the configuration": (
        config({}, tokenizer_class="QWenTokenizer", vocab_file="../../etc/passwd"),
        "qwen",
        "needs its vocabulary",
    ),
    "huge number of tekken": ({"tekken.json": tekken(config={"default_num_special_tokens": 10**9})}, "mistral", ""),
    "nested tekken": ({"tekken.json": b'{"config":' * 200_000}, "mistral", "not JSON as expected"),
    "huge id": (neox(model={"vocab": {**vocab(), "zz": 10**15}}), "gpt_neox", ""),
    "negative id": (neox(model={"vocab": {**vocab(), "zz": -1}}), "gpt_neox", "is no id"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_one_clear_error(tmp_path, name):
    files, family, says = HOSTILE[name]
    message = refusal(tmp_path, files, family)
    assert says in message, message
    assert len(message) < 20_000


@pytest.mark.parametrize(
    "name", ["qwen.tiktoken", "tokenizer.json", "rwkv_vocab_x.txt", "tokenizer.model", "tekken.json"]
)
def test_a_vocabulary_of_two_gigabytes_is_not_read(tmp_path, name):
    with (tmp_path / name).open("wb") as file:
        file.truncate(2 << 30)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(TokenizerError, match="are no file of a tokenizer"):
        load_tokenizer_family((found := resolve(tmp_path, {name: tmp_path / name})).family).convert(found)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB
