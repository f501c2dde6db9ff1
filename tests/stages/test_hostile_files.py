"""Files that were found to hang, to fill the memory or to end in a traceback: each is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stagegraph.stage import StageError
from stages.checkpoint import strict_json
from stages.config_parse import ConfigParse
from stages.runtime.errors import BundleError
from stages.tokenizers import files, library
from stages.tokenizers.errors import TokenizerError
from stages.tokenizers.families import rwkv_world
from stages.tokenizers.formats.json_tables import read_object
from stages.tokenizers.formats.ranks import derive_merges, read_ranks
from stages.tokenizers.formats.sentencepiece_model import read_model
from stages.verification import reference
from tests.stages.test_config_fuzz import BASES, SIZES
from tests.support import tokenizer_folders
from tests.support.checkpoints import write_hollow, write_json
from tests.support.local_context import run_stage
from tests.support.tiny_tokenizers import resolved
from tests.support.tokenizer_folders import tables, with_class

LISTS = b'{"a":[' + b"[]," * 4_000_001 + b"0]}"  # 12 MB of text, a gigabyte of lists


def test_json_of_millions_of_lists_is_refused_before_it_is_parsed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="values are too many for a config"):
        strict_json.parse(LISTS)
    (tmp_path / "tokenizer.json").write_bytes(LISTS)
    with pytest.raises(TokenizerError, match="values are no vocabulary"):
        read_object(tmp_path / "tokenizer.json")


def test_planning_parses_no_config_json_of_millions_of_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_bytes(b'{"model_type": "llama", ' + LISTS[1:])
    monkeypatch.setattr(json, "loads", lambda *_, **__: pytest.fail("it was parsed"))
    stage = ConfigParse()
    assert stage.rows(stage.Params(checkpoint=str(tmp_path)), {}) == {}


def test_a_head_of_a_billion_channels_has_no_frequencies_computed(tmp_path: Path) -> None:
    config = {"model_type": "llama", **SIZES, **BASES["llama"]}
    checkpoint = write_hollow(tmp_path / "checkpoint", config)
    write_json(checkpoint / "config.json", {**config, "head_dim": 2**30})
    with pytest.raises(StageError, match="a head has 1,073,741,824 channels"):
        run_stage(ConfigParse(), tmp_path / "out", {"checkpoint": str(checkpoint)})


def test_merges_of_long_tokens_are_not_replayed() -> None:
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"a" * 1000 + b"%d" % n: 256 + n for n in range(200)}
    with pytest.raises(TokenizerError, match="too many tokens of hundreds of bytes"):
        derive_merges(ranks, Path("x.tiktoken"))


@pytest.mark.parametrize("read", [read_ranks, lambda p: rwkv_world.convert(resolved(p))])
def test_a_vocabulary_of_millions_of_lines_is_not_read(read: Any, tmp_path: Path) -> None:
    path = tmp_path / "rwkv_vocab_v20230424.txt"
    path.write_bytes(b"\n" * ((1 << 20) + 1))
    with pytest.raises(TokenizerError, match="lines, which is no vocabulary"):
        read(path)


def test_a_sentencepiece_model_of_a_million_unknown_fields_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\x20\x00" * ((1 << 20) + 1))
    with pytest.raises(TokenizerError, match="more than 1,048,576 fields"):
        read_model(tmp_path / "tokenizer.model")


def test_a_tekken_size_that_is_infinite_is_refused(tmp_path: Path) -> None:
    value = tokenizer_folders.tekken(config={"default_vocab_size": float("inf")})
    with pytest.raises(StageError, match="infinity"):
        tokenizer_folders.build(tmp_path, {"tekken.json": value}, "mistral", 2)


def test_of_hundreds_of_problems_twenty_are_said() -> None:
    assert len(TokenizerError(*map(str, range(300))).problems) == 21
    assert TokenizerError(*map(str, range(300))).problems[-1] == "and 280 more problems"
    assert BundleError(*map(str, range(300))).problems[19:] == ("19", "and 280 more problems")
    assert TokenizerError("one").problems == ("one",)


class PanicException(BaseException):
    """What a panic of the library is in Python."""


def test_a_panic_of_the_library_is_a_problem_of_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    class Panics:
        @staticmethod
        def from_str(text: str) -> None:
            raise PanicException("index out of bounds")

    monkeypatch.setattr("tokenizers.Tokenizer", Panics)
    with pytest.raises(TokenizerError, match=r"^x: index out of bounds"):
        library.load("{}", "x")


def test_a_name_of_thousands_of_characters_leaves_a_message_readable() -> None:
    from stagegraph.cli.streams import hanging

    shown = hanging(f"the file {'a' * 10**6} is missing; copy it again")
    assert len(shown) < 4100
    assert shown.startswith("the file a")
    assert shown.endswith("copy it again")


LOOP = "".join(f"{{% for {name} in range(99999) %}}" for name in "ijk") + "{% endfor %}" * 3
GROW = {
    "type": "Sequence",
    "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}] * 10,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({**with_class("GPTNeoXTokenizer", tables()), "chat_template.jinja": LOOP.encode()}, "computing far longer"),
        (with_class("GPTNeoXTokenizer", tables(normalizer=GROW)), "want of memory"),
    ],
)
def test_what_transformers_would_compute_or_store_without_end_is_stopped(
    files: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(StageError, match=said):
        tokenizer_folders.build(tmp_path, files, "gpt_neox", tokenizer_folders.SIZE)


def test_no_code_of_a_checkpoint_runs(tmp_path: Path) -> None:
    """Python files, a setup and a pickle beside sound tokenizer files, named by auto_map: a canary tells."""
    canary = tmp_path / "canary"
    trap = f"open({str(canary)!r}, 'w').close()\n".encode()
    pickled = b"cposix\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR."
    names = ("tokenization_x", "modeling_x", "configuration_x", "setup", "conftest", "sitecustomize", "tokenizers")
    files = {
        **with_class("XTokenizer", tables()),
        "config.json": json.dumps({"model_type": "x", "auto_map": {"AutoConfig": "configuration_x.C"}}).encode(),
        **{f"{name}.py": trap for name in names},
        **dict.fromkeys(("pytorch_model.bin", "training_args.bin", "tokenizer.pkl"), pickled),
    }
    files["tokenizer_config.json"] = {
        "tokenizer_class": "XTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_x.XTokenizer", "tokenization_x.XTokenizer"]},
    }
    tokenizer_folders.build(tmp_path, files, "gpt_neox", tokenizer_folders.SIZE)
    assert not canary.exists()


def test_a_file_whose_size_says_nothing_is_read_no_further_than_its_bound():
    """/dev/zero has zero bytes by its stat, and a file may grow after it was asked."""
    endless = Path("/dev/zero")
    with pytest.raises(ValueError, match="more than 67,108,864 bytes"):
        strict_json.read_object(endless, "config.json")
    with pytest.raises(TokenizerError, match="more than 67,108,864 bytes"):
        files.read_bytes(endless)
    with pytest.raises(reference.RecordingError, match="more than 67,108,864 bytes"):
        reference.read_recorded({reference.RECORD: endless}, {}, "q0f32", vocab_size=8, encode=list)
