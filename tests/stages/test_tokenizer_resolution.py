"""Which family a checkpoint's files are, and the trace of that decision."""

from __future__ import annotations

import json

import pytest

from stages.tokenizer_bundle import FILES
from stages.tokenizers import EMBEDDINGS, TOKENIZERS, load_tokenizer_family
from stages.tokenizers.errors import TokenizerError
from stages.tokenizers.resolution import RULES, resolve
from stages.verify import _FILES
from tests.support import sentencepiece_models
from tests.support.tiny_tokenizers import QWEN_CONFIG


def folder(tmp_path, **files):
    """Write files by name, a dict as JSON; ``__`` in a keyword stands for a dot."""
    found = {}
    for key, value in files.items():
        name = key.replace("__", ".")
        found[name] = tmp_path / name
        found[name].write_bytes(value if isinstance(value, bytes) else json.dumps(value).encode())
    return found


def error_of(tmp_path, **files):
    with pytest.raises(TokenizerError) as caught:
        resolve(tmp_path, folder(tmp_path, **files))
    return str(caught.value)


def test_every_rule_has_a_family_and_every_family_a_rule():
    assert set(RULES) == set(TOKENIZERS)
    assert {load_tokenizer_family(name).name for name in TOKENIZERS} == set(TOKENIZERS)
    assert EMBEDDINGS["qwen"] == "transformer.wte.weight"


def test_the_trace_tells_the_whole_decision(tmp_path):
    found = resolve(
        tmp_path,
        folder(tmp_path, qwen__tiktoken=b"x", other__tiktoken=b"y", tokenizer_config__json=QWEN_CONFIG, vocab__json={}),
    )
    assert (found.family, found.vocabulary.name) == ("tiktoken-qwen", "qwen.tiktoken")
    assert "other.tiktoken (1 bytes), qwen.tiktoken (1 bytes)" in found.trace
    assert "auto_map names tokenization_qwen.QWenTokenizer: present and not executed" in found.trace
    assert "family                tiktoken-qwen: tokenizer_class names QWenTokenizer" in found.trace
    assert "qwen.tiktoken: the usual name, preferred to other.tiktoken" in found.trace
    assert "not read              other.tiktoken, vocab.json" in found.trace


@pytest.mark.parametrize(
    "config",
    [
        {"tokenizer_class": "QWenTokenizer"},
        {"auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]}},
        {"auto_map": ["tokenization_qwen.QWenTokenizer", None]},
        {"auto_map": {"AutoTokenizer": [None, "tokenization_qwen.QWenTokenizerFast"]}},
        {},
    ],
)
def test_class_then_auto_map_then_files_name_the_family(tmp_path, config):
    found = resolve(tmp_path, folder(tmp_path, my__tiktoken=b"x", tokenizer_config__json=config))
    assert (found.family, found.vocabulary.name) == ("tiktoken-qwen", "my.tiktoken")


def test_without_tokenizer_config_the_files_decide(tmp_path):
    found = resolve(tmp_path, folder(tmp_path, qwen__tiktoken=b"x"))
    assert found.family == "tiktoken-qwen"
    assert "tokenizer_config.json absent" in found.trace


@pytest.mark.parametrize("name", ["NovelTokenizerFast", "BaichuanTokenizer", "InternLMTokenizer", "YiTokenizer"])
def test_a_class_that_is_not_known_leaves_it_to_the_files_and_is_said(tmp_path, name):
    config = {"tokenizer_class": name, "auto_map": {"AutoTokenizer": [f"tokenization_novel.{name}", None]}}
    files = folder(tmp_path, tokenizer__model=sentencepiece_models.trained("llama"), tokenizer_config__json=config)
    found = resolve(tmp_path, files)
    assert found.family == "sentencepiece"
    assert f"{name.removesuffix('Fast')} does not decide" in found.trace
    assert f"the tokenizer class {name.removesuffix('Fast')} is not known here" in found.warnings[0]
    files = folder(
        tmp_path,
        tokenizer__model=sentencepiece_models.trained("llama"),
        tokenizer_config__json={"tokenizer_class": "CodeLlamaTokenizer"},
    )
    assert resolve(tmp_path, files).warnings == []


def test_no_files_no_vocabulary_and_ambiguity_are_each_said(tmp_path):
    assert "no tokenizer files there; known families" in error_of(tmp_path)
    (tmp_path / "README.md").symlink_to("../../blobs/1")  # nothing of it is missed
    assert "no tokenizer files there; known families" in error_of(tmp_path)
    (tmp_path / "tokenizer.json").symlink_to("../../blobs/2")
    assert "no tokenizer files there; tokenizer.json is a link to a file that is not there" in error_of(tmp_path)
    assert "no vocabulary of a known family among tokenizer.model" in error_of(tmp_path, tokenizer__model=b"x")
    config = {"tokenizer_config__json": QWEN_CONFIG}
    assert "needs its vocabulary, *.tiktoken; it is not among" in error_of(tmp_path, **config)
    assert "there are 2 (a.tiktoken, b.tiktoken) and none is qwen.tiktoken" in error_of(
        tmp_path, a__tiktoken=b"x", b__tiktoken=b"x", **config
    )


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (b"{", "not JSON in UTF-8"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b"[" * 100_000, "not JSON in UTF-8"),
        (b"[1]", "expected a JSON object, found list"),
        (b'{"tokenizer_class": "QWenTokenizer", "extra_vocab_file": "more.tiktoken"}', "extra_vocab_file is set"),
        (b'{"added_tokens_decoder": {"x": {"content": "a"}}}', "added_tokens_decoder['x']"),
        (b'{"added_tokens_decoder": {"1": "a"}}', "added_tokens_decoder['1']"),
        (b'{"added_tokens_decoder": {"' + b"1" * 5000 + b'": {"content": "a"}}}', "added_tokens_decoder['111"),
        (b'{"chat_template": "\\ud800"}', "surrogates not allowed"),
        (b'{"added_tokens_decoder": {"1": {"content": "\\udfff"}}}', "surrogates not allowed"),
    ],
)
def test_bad_configurations_are_one_clear_error(tmp_path, config, says):
    message = error_of(tmp_path, qwen__tiktoken=b"x", tokenizer_config__json=config)
    assert says in message
    assert len(message) < 2 * len(str(tmp_path)) + 500  # the names of all families among them
    assert message.encode()


@pytest.mark.parametrize("index", [-1, 10**4000, True, "8", None])
def test_an_added_token_needs_an_id(tmp_path, index):
    message = error_of(tmp_path, qwen__tiktoken=b"x", added_tokens__json={"<|eight|>": index})
    assert "'<|eight|>' has" in message
    assert len(message) < len(str(tmp_path)) + 200


def test_a_vocab_file_elsewhere_is_never_followed(tmp_path):
    config = {**QWEN_CONFIG, "vocab_file": "../../etc/passwd"}
    assert (
        resolve(tmp_path, folder(tmp_path, qwen__tiktoken=b"x", tokenizer_config__json=config)).vocabulary.name
        == "qwen.tiktoken"
    )


def test_files_in_subfolders_are_not_the_checkpoints_tokenizer(tmp_path):
    files = folder(tmp_path, x__tiktoken=b"x")
    assert resolve(tmp_path, {**files, "old/qwen.tiktoken": tmp_path}).vocabulary.name == "x.tiktoken"


def test_stated_ids_and_the_checkpoints_own_template_are_carried_on(tmp_path):
    config = {"chat_template": [{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}]}
    config["added_tokens_decoder"] = {"7": {"content": "<|seven|>"}}
    files = folder(tmp_path, qwen__tiktoken=b"x", tokenizer_config__json=config, added_tokens__json={"<|eight|>": 8})
    found = resolve(tmp_path, files)
    assert found.declared == {7: "<|seven|>", 8: "<|eight|>"}
    assert found.chat_templates == {"tool": "t", "default": "d"}
    files |= folder(tmp_path, chat_template__jinja=b"file wins")
    assert resolve(tmp_path, files).chat_templates == {"default": "file wins"}
    (tmp_path / "rag.jinja").write_text("r")
    more = files | {"additional_chat_templates/rag.jinja": tmp_path / "rag.jinja"}
    assert resolve(tmp_path, more).chat_templates == {"default": "file wins", "rag": "r"}
    files |= folder(tmp_path, chat_template__jinja=b"\xff")
    with pytest.raises(TokenizerError, match="not UTF-8"):
        resolve(tmp_path, files)


@pytest.mark.parametrize("decoder", [False, True])
def test_an_older_map_of_special_tokens_names_the_roles_as_in_transformers(tmp_path, decoder, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from transformers import AutoTokenizer

    config = {"tokenizer_class": "LlamaTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    if decoder:
        config["added_tokens_decoder"] = {"1": {"content": "<s>", "special": True}}
    older = {"bos_token": {"content": "</s>"}, "unk_token": "<unk>"}
    found = resolve(
        tmp_path,
        folder(
            tmp_path,
            tokenizer__json=sentencepiece_models.tables(),
            tokenizer_config__json=config,
            special_tokens_map__json=older,
        ),
    )
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert found.roles["bos"] == loaded.bos_token == ("<s>" if decoder else "</s>")
    assert found.roles["eos"] == loaded.eos_token == "</s>"
    assert ("names the roles" in found.trace) is not decoder
    assert ("not read              special_tokens_map.json" in found.trace) is decoder


def test_verify_reads_what_the_tokenizer_is_made_of():
    assert {name for name in FILES if "template" not in name} <= set(_FILES)
