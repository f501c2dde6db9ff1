"""The stage as a whole: what it emits, that it equals tiktoken and what transformers loads, and how it refuses."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import unicodedata

import pytest

from stagegraph.stage import StageError
from stages.tokenizer_bundle import TokenizerBundle
from stages.tokenizers import load_tokenizer_family
from stages.tokenizers.proof.equality import PROBES, code_points, sample_corpus
from tests.support.local_context import run_stage
from tests.support.tiny_tokenizers import (
    QWEN_CONFIG,
    SHARED,
    SPECIALS,
    resolved,
    tiktoken_text,
    tiny_ranks,
    write_checkpoint,
    write_inputs,
)

RANKS = len(tiny_ranks())
REAL = SHARED / "tokenizers" / "qwen.tiktoken"
REAL_RANKS = 151_643
needs_shared = pytest.mark.skipif(not REAL.is_file(), reason="the published vocabularies are not beside the repository")


def build(tmp_path, checkpoint, inputs=None, out="out"):
    inputs = inputs or write_inputs(tmp_path / "inputs", RANKS)
    ctx = run_stage(TokenizerBundle(), tmp_path / out, {"checkpoint": str(checkpoint)}, inputs)
    return ctx, tmp_path / out / "tokenizer"


def refusal(tmp_path, checkpoint, inputs=None):
    with pytest.raises(StageError) as caught:
        build(tmp_path, checkpoint, inputs)
    return caught.value.problems


def load(directory, name):
    return json.loads((directory / name).read_bytes())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    return build(root, write_checkpoint(root / "checkpoint"))


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    root = tmp_path_factory.mktemp("real")
    inputs = write_inputs(root / "inputs", REAL_RANKS, rows=151_936)
    return build(root, write_checkpoint(root / "checkpoint", REAL), inputs)


def test_the_directory_holds_one_vocabulary_and_what_a_runtime_needs(tiny):
    ctx, directory = tiny
    assert sorted(path.name for path in directory.iterdir()) == [
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer_info.json",
    ]
    info = load(directory, "tokenizer_info.json")
    assert info.pop("fingerprint").count("/") == 1
    assert info == {
        "schema": 1,
        "family": "tiktoken-qwen",
        "bos": None,
        "eos": [RANKS],
        "pad": RANKS,
        "stop": [RANKS, RANKS + 2, RANKS + 1],
        "prefix": [],
        "active_vocab_size": RANKS + SPECIALS,
        "rows": RANKS + SPECIALS + 16,
        "normalize": "NFC",
        "chat": {"format": "chatml", "piecewise": True, "system": "You are a helpful assistant."},
    }
    config = load(directory, "tokenizer_config.json")
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["model_max_length"] == 512
    assert config["clean_up_tokenization_spaces"] is False
    assert [config.get(f"{role}_token") for role in ("bos", "eos", "pad")] == [None, "<|endoftext|>", "<|endoftext|>"]
    assert "present and not executed" in ctx.views["trace"]
    assert "T08 (N)" in ctx.views["checks"]
    assert ctx.warnings == []
    assert "proven equal" in ctx.summary_text


def test_equal_inputs_give_equal_bytes_in_another_process(tiny, tmp_path):
    _, directory = tiny
    script = (
        "import sys; from pathlib import Path; from tests.stages.test_tokenizer_bundle import build, write_checkpoint\n"
        "root = Path(sys.argv[1]); build(root, write_checkpoint(root / 'checkpoint'))"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, env={**os.environ, "PYTHONHASHSEED": "7"})
    for path in directory.iterdir():
        assert path.read_bytes() == (tmp_path / "out" / "tokenizer" / path.name).read_bytes(), path.name


def test_transformers_loads_the_directory_offline_and_agrees(tiny, monkeypatch):
    _, directory = tiny
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(directory)
    reference = load_tokenizer_family("tiktoken-qwen").reference(
        resolved(directory.parents[1] / "checkpoint" / "qwen.tiktoken")
    )
    for text in (*PROBES, *(text for _, text in sample_corpus())):
        normal = unicodedata.normalize("NFC", text)
        ids = loaded(normal, add_special_tokens=False)["input_ids"]
        assert ids == reference.encode(text, specials=True)
        assert loaded.decode(ids) == normal
    assert len(loaded) == RANKS + SPECIALS
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (None, RANKS, RANKS)
    assert loaded.model_max_length == 512


def test_the_chat_template_writes_chatml(tiny):
    from jinja2.sandbox import SandboxedEnvironment

    template = SandboxedEnvironment().from_string(load(tiny[1], "tokenizer_config.json")["chat_template"])
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yo"},
        {"role": "user", "content": "bye"},
    ]
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    expected = (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>\n"
        "<|im_start|>user\nbye<|im_end|>\n<|im_start|>assistant\n"
    )
    assert template.render(messages=turns, add_generation_prompt=True) == system + expected
    terse = [{"role": "system", "content": "Be brief."}]
    assert template.render(messages=terse) == "<|im_start|>system\nBe brief.<|im_end|>\n"


def test_a_base_model_has_no_template_and_stops_at_its_eos(tmp_path):
    inputs = write_inputs(tmp_path / "inputs", RANKS, chat_format="raw", stop=[])
    _, directory = build(tmp_path, write_checkpoint(tmp_path / "checkpoint"), inputs)
    assert "chat_template" not in load(directory, "tokenizer_config.json")
    assert load(directory, "tokenizer_info.json")["stop"] == [RANKS]
    assert load(directory, "tokenizer_info.json")["chat"] == {"format": "raw"}


def test_doubts_are_warnings_and_do_not_fail(tmp_path):
    inputs = write_inputs(tmp_path / "inputs", RANKS, eos=[])
    ctx, directory = build(tmp_path, write_checkpoint(tmp_path / "checkpoint"), inputs)
    assert len(ctx.warnings) == 1
    assert "names no eos_token_id" in ctx.warnings[0]
    assert load(directory, "tokenizer_info.json")["eos"] == [RANKS]


@pytest.mark.parametrize(
    ("generation", "says"),
    [({"eos": [152_000]}, "T14"), ({"chat_format": "alpaca"}, "chat_format 'alpaca' is not one of tiktoken-qwen")],
)
def test_a_generation_config_of_another_model_is_refused(tmp_path, generation, says):
    inputs = write_inputs(tmp_path / "inputs", RANKS, **generation)
    assert says in refusal(tmp_path, write_checkpoint(tmp_path / "checkpoint"), inputs)[0]


def test_a_vocabulary_larger_than_the_embedding_is_refused(tmp_path):
    inputs = write_inputs(tmp_path / "inputs", 7, rows=RANKS - 1)
    (problem,) = refusal(tmp_path, write_checkpoint(tmp_path / "checkpoint"), inputs)
    assert problem.startswith(
        f"T06: the largest id is {RANKS + SPECIALS - 1}, but transformer.wte.weight has only {RANKS - 1} rows"
    )


def test_a_chat_format_whose_tokens_have_no_rows_is_refused(tmp_path):
    inputs = write_inputs(tmp_path / "inputs", 7, rows=RANKS, chat_format="chatml")
    (problem,) = refusal(tmp_path, write_checkpoint(tmp_path / "checkpoint"), inputs)
    assert problem.startswith("T14: generation_config.json: chat_format 'chatml' ends a turn with <|im_end|>")


def test_a_truncated_vocabulary_is_refused(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", tiktoken_text(tiny_ranks()[:300]))
    inputs = write_inputs(tmp_path / "inputs", RANKS, rows=2048)
    problems = refusal(tmp_path, checkpoint, inputs)
    assert any(problem.startswith("T14: ") for problem in problems)


def test_special_tokens_among_the_ranks_are_refused(tmp_path):
    text = b"<|endoftext|>"
    prefixes = [text[:size] for size in range(2, len(text) + 1)]
    checkpoint = write_checkpoint(tmp_path / "checkpoint", tiktoken_text([*tiny_ranks()[:256], *prefixes]))
    assert "does the file hold special tokens among its ranks?" in refusal(tmp_path, checkpoint)[0]


def test_a_missing_embedding_and_an_unknown_model_family_are_refused(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    inputs = write_inputs(tmp_path / "inputs", RANKS)
    inputs["tensors"].write_text('{"schema": 1, "tensors": {"a": {}}, "names": {}}')
    assert "has no tensor of that name among its 1" in refusal(tmp_path, checkpoint, inputs)[0]
    inputs["config"].write_text('{"family": "novel", "config": {}}')
    assert "model family 'novel'" in refusal(tmp_path, checkpoint, inputs)[0]


def test_every_problem_of_a_vocabulary_reaches_the_user(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", b"broken\nYQ== 0\n")
    problems = refusal(tmp_path, checkpoint)
    assert f"{checkpoint}/qwen.tiktoken:1: expected" in problems[0]
    assert "255 of the 256 single bytes" in problems[1]


def test_planning_names_the_rows_without_the_libraries(tmp_path):
    write_checkpoint(tmp_path / "checkpoint")
    script = (
        "import sys; from stages.tokenizer_bundle import TokenizerBundle\n"
        "stage = TokenizerBundle(); params = stage.Params(sys.argv[1])\n"
        "print(sorted(stage.rows(params, {'family': 'qwen'}).items()), sorted(stage.tools(params)))\n"
        "assert not {'tokenizers', 'tiktoken', 'transformers', 'numpy', 'regex'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "checkpoint")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == (
        "[('stages.tokenizers.resolution:RULES', 'tiktoken-qwen'), ('stages.tokenizers:EMBEDDINGS', 'qwen'), "
        "('stages.tokenizers:TOKENIZERS', 'tiktoken-qwen')] "
        "['jinja2', 'protobuf', 'python', 'regex', 'sentencepiece', 'tiktoken', 'tokenizers', 'transformers', "
        "'unicode']"
    )
    stage = TokenizerBundle()
    assert stage.rows(stage.Params(str(tmp_path / "nowhere")), {}) == {}


def test_the_sample_corpus_covers_what_it_claims():
    kinds = {kind for kind, _ in sample_corpus()}
    assert {
        "english",
        "chinese",
        "python",
        "emoji",
        "nfd",
        "control",
        "whitespace",
        "specials",
        "contractions",
    } <= kinds
    texts = [text for _, text in sample_corpus()]
    assert any(unicodedata.normalize("NFC", text) != text for text in texts)
    assert sum(len(text) for _, text in code_points()) > 3 * 140_000


@needs_shared
def test_the_published_vocabulary_gives_the_documented_ids(real):
    """Ids from the documentation of the published tokenizer, and the prompt its chat code builds."""
    from tokenizers import Tokenizer

    _, directory = real
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    assert tokenizer.encode('print("<|endoftext|>")').ids == [1350, 445, 151643, 899]
    tokenizer.encode_special_tokens = True
    assert tokenizer.encode('print("<|endoftext|>")').ids == [1350, 9639, 91, 8691, 723, 427, 91, 82598]
    tokenizer.encode_special_tokens = False
    prompt = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n"
    )
    system = [151644, 8948, 198, 2610, 525, 264, 10950, 17847, 13, 151645, 198]
    assert tokenizer.encode(prompt).ids == [*system, 151644, 872, 198, 108386, 151645, 198, 151644, 77091, 198]
    info = load(directory, "tokenizer_info.json")
    assert info["stop"] == [151643, 151645, 151644]
    assert (info["active_vocab_size"], info["rows"]) == (151_851, 151_936)


def differences(directory, documents):
    """Return the documents whose ids or decoded text differ from tiktoken's, specials allowed and not."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    reference = load_tokenizer_family("tiktoken-qwen").reference(resolved(REAL))
    found = []
    for kind, text in documents:
        normal = unicodedata.normalize("NFC", text)
        for specials in (True, False):
            tokenizer.encode_special_tokens = not specials
            ids = tokenizer.encode(normal, add_special_tokens=False).ids
            if ids != reference.encode(text, specials=specials):
                found.append((kind, specials, text))
            if not tokenizer.decode(ids, skip_special_tokens=False) == reference.decode(ids) == normal:
                found.append((kind, "decode", text))
    return found


def nasty_corpus():
    with (SHARED / "nasty-corpus.jsonl").open(encoding="utf-8") as lines:
        return [tuple(json.loads(line)) for line in lines]


@needs_shared
def test_the_published_vocabulary_equals_tiktoken_on_a_sample_of_the_nasty_corpus(real):
    assert differences(real[1], nasty_corpus()[::40]) == []


@needs_shared
@pytest.mark.slow
def test_the_published_vocabulary_equals_tiktoken_on_the_whole_nasty_corpus(real):
    from tokenizers import Tokenizer

    documents = nasty_corpus()
    assert len(documents) == 9_804
    assert differences(real[1], documents) == []
    tokenizer = Tokenizer.from_file(str(real[1] / "tokenizer.json"))
    reference = load_tokenizer_family("tiktoken-qwen").reference(resolved(REAL))
    generator = random.Random(20_000)  # noqa: S311 - the same ids on every run
    for _ in range(20_000):
        ids = [generator.randrange(REAL_RANKS + SPECIALS) for _ in range(generator.randrange(1, 40))]
        assert tokenizer.decode(ids, skip_special_tokens=False) == reference.decode(ids)


@needs_shared
@pytest.mark.slow
def test_the_published_vocabulary_of_another_model_is_refused(tmp_path):
    config = {"tokenizer_class": "GPTNeoXTokenizer"}
    checkpoint = write_checkpoint(tmp_path / "checkpoint", REAL, tokenizer_config=config)
    assert "tokenizer-json needs its vocabulary, tokenizer.json or vocab.json" in refusal(tmp_path, checkpoint)[0]
    checkpoint = write_checkpoint(tmp_path / "other", REAL, tokenizer_config=QWEN_CONFIG)
    assert any("T06" in problem for problem in refusal(tmp_path, checkpoint))
