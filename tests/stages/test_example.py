"""The checkpoint that ships agrees with itself: files, shapes, vocabulary, split, and a reference that is not stale."""

from __future__ import annotations

import base64
import json
import lzma
import struct
import unicodedata
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken
from blake3 import blake3

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-qwen"
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def load(name: str) -> Any:
    return json.loads((EXAMPLE / name).read_text(encoding="utf-8"))


def header(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return {name: entry for name, entry in json.loads(file.read(length)).items() if name != "__metadata__"}


def read_tensor(path: Path, name: str) -> np.ndarray:
    entry = header(path)[name]
    assert entry["dtype"] == "F32"
    (length,) = struct.unpack("<Q", path.read_bytes()[:8])
    start, end = (8 + length + offset for offset in entry["data_offsets"])
    return np.frombuffer(path.read_bytes()[start:end], "<f4").reshape(entry["shape"])


@cache
def ranks() -> dict[bytes, int]:
    lines = (EXAMPLE / "qwen.tiktoken").read_bytes().splitlines()
    return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}


@cache
def encoding() -> tiktoken.Encoding:
    specials = {token: len(ranks()) + i for i, token in enumerate(SPECIALS)}
    return tiktoken.Encoding("tiny", pat_str=PATTERN, mergeable_ranks=ranks(), special_tokens=specials)


def encode(text: str) -> list[int]:
    return encoding().encode(unicodedata.normalize("NFC", text), allowed_special="all")


def digest(path: Path) -> str:
    return blake3(path.read_bytes()).hexdigest()


def test_is_small() -> None:
    files = [path for path in EXAMPLE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) < 6_000_000


def test_shards_hold_what_index_and_config_say() -> None:
    config, index = load("config.json"), load("model.safetensors.index.json")
    shards = {path.name: header(path) for path in EXAMPLE.glob("*.safetensors")}
    assert len(shards) >= 2
    assert index["weight_map"] == {name: file for file, entries in shards.items() for name in entries}
    entries = {name: entry for found in shards.values() for name, entry in found.items()}
    h, ff, rows = config["hidden_size"], config["intermediate_size"] // 2, config["vocab_size"]
    expected = {"transformer.wte.weight": [rows, h], "transformer.ln_f.weight": [h], "lm_head.weight": [rows, h]}
    for i in range(config["num_hidden_layers"]):
        layer = {
            "ln_1.weight": [h],
            "attn.c_attn.weight": [3 * h, h],
            "attn.c_attn.bias": [3 * h],
            "attn.c_proj.weight": [h, h],
            "ln_2.weight": [h],
            "mlp.w1.weight": [ff, h],
            "mlp.w2.weight": [ff, h],
            "mlp.c_proj.weight": [h, ff],
        }
        expected |= {f"transformer.h.{i}.{name}": shape for name, shape in layer.items()}
    assert {name: entry["shape"] for name, entry in entries.items()} == expected
    assert {entry["dtype"] for entry in entries.values()} == {"BF16"}
    assert index["metadata"]["total_size"] == sum(2 * int(np.prod(shape)) for shape in expected.values())


def test_is_labelled_as_first_generation_qwen() -> None:
    config, tokenizer, generation = (load(f"{n}.json") for n in ("config", "tokenizer_config", "generation_config"))
    assert (config["model_type"], config["architectures"]) == ("qwen", ["QWenLMHeadModel"])
    assert config["hidden_size"] == config["num_attention_heads"] * config["kv_channels"]
    assert tokenizer["tokenizer_class"] == "QWenTokenizer"
    code = [reference.split(".")[0] for reference in config["auto_map"].values()] + ["tokenization_qwen"]
    assert not [name for name in code if (EXAMPLE / f"{name}.py").exists()]
    end = encoding().encode_single_token("<|endoftext|>")
    assert (generation["eos_token_id"], generation["stop_words_ids"]) == (end, [[end]])


def test_vocabulary_is_contiguous_has_every_byte_and_fits_the_embedding() -> None:
    assert list(ranks().values()) == list(range(len(ranks())))
    assert all(bytes([byte]) in ranks() for byte in range(256))
    assert not [token for token in ranks() if len(token) > 1 and token.strip().isdigit()]
    assert encoding().n_vocab < load("config.json")["vocab_size"]
    text = "小明 has 3 apples，\u0065\u0301té 👩‍👩‍👧 \x00\r\n\t 2024"
    assert encoding().decode(encode(text)) == unicodedata.normalize("NFC", text)


def test_split_is_disjoint_and_both_languages_are_on_both_sides() -> None:
    train_text = lzma.decompress((EXAMPLE / "text" / "train.txt.xz").read_bytes()).decode()
    held_out_text = (EXAMPLE / "text" / "heldout.txt").read_text(encoding="utf-8")
    parts = (train_text, held_out_text)
    train, held_out = (set(text.removesuffix("\n").split("\n<|endoftext|>\n")) for text in parts)
    assert held_out
    assert not train & held_out
    for part in (train, held_out):
        chinese = sum("答：" in story for story in part)
        english = sum("Answer:" in story for story in part)
        assert min(chinese, english) > 0.3 * len(part)


def test_reference_is_of_this_checkpoint_and_this_script() -> None:
    reference = load("reference/reference.json")
    patterns = ("*.safetensors", "*.safetensors.index.json", "*.tiktoken")
    named = [EXAMPLE / name for name in ("config.json", "generation_config.json", "tokenizer_config.json")]
    files = {path.name: digest(path) for path in [*named, *(p for pattern in patterns for p in EXAMPLE.glob(pattern))]}
    canonical = json.dumps(files, sort_keys=True, separators=(",", ":")).encode()
    assert reference["checkpoint_digest"] == blake3(canonical).hexdigest()
    assert reference["script"]["digest"] == digest(EXAMPLE / reference["script"]["name"])


@pytest.mark.parametrize("number", range(3), ids=("q0f32", "q4f32_1", "q4f16_1"))
def test_recorded_case_agrees_with_its_logits_and_texts(number: int) -> None:
    case = load("reference/reference.json")["cases"][number]
    prompt, new = case["tokens"][:64], case["tokens"][64:]
    assert encode(case["prompt"]) == prompt
    assert len(new) == 64
    if case["logits"]:
        logits = read_tensor(EXAMPLE / "reference" / "reference.safetensors", case["logits"])
        assert logits.shape == (128, load("config.json")["vocab_size"])
        assert logits[63:127].argmax(-1).tolist() == new
        # A reference that had nothing to do with the text would not find it likely.
        shifted = logits[:-1] - logits[:-1].max(-1, keepdims=True)
        likelihood = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
        assert -np.mean(likelihood[np.arange(127), case["tokens"][1:]]) < 1.5
    assert [c["prompt"] for c in case["continuations"]] == load("text/prompts.json")
    for continuation in case["continuations"]:
        assert len(continuation["ids"]) == 48
        assert encoding().decode(continuation["ids"]) == continuation["text"]


def test_familiar_passages_are_continued_by_heart() -> None:
    classics = (EXAMPLE / "text" / "classics.txt").read_text(encoding="utf-8")
    (unquantized, *_) = load("reference/reference.json")["cases"]
    by_heart = [c for c in unquantized["continuations"] if c["prompt"] + c["text"].rstrip("\ufffd") in classics]
    assert len(by_heart) == 5
