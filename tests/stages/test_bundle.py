"""The bundle stage: equal bytes for equal inputs, nothing of this machine in them, contradictions refused."""

from __future__ import annotations

import json
import os

import pytest

from stagegraph.stage import StageError
from stages.bundle import Bundle
from stages.packing import assemble
from tests.support.local_context import run_stage


def inputs(built):
    return {
        "library": built.folder / "compile" / "model.so",
        "metadata": built.folder / "compile" / "metadata.json",
        "weights": built.folder / "quantize" / "weights",
        "tokenizer": built.folder / "tokenizer" / "tokenizer",
        "config": built.config,
        "generation": built.folder / "config" / "generation.json",
    }


def edited(path, folder, change):
    document = json.loads(path.read_text())
    change(document)
    copy = folder / path.name
    copy.write_text(json.dumps(document))
    return copy


def test_the_same_inputs_give_the_same_bytes(recorded, tmp_path):
    context = run_stage(Bundle(), tmp_path, {"target": "llvm", "name": "tiny"}, inputs(recorded))
    first, second = (
        {path.name: path.read_bytes() for path in root.iterdir()} for root in (recorded.bundle, tmp_path / "bundle")
    )
    assert first == second
    text = b"".join(content for name, content in first.items() if name != "model.so")
    assert str(recorded.folder).encode() not in text
    assert context.summary_text.startswith(f"{len(first) - 1} files, ")


def test_every_file_but_bundle_json_is_listed_with_its_digest(recorded):
    listed = json.loads((recorded.bundle / "bundle.json").read_text())["files"]
    assert set(listed) == {path.name for path in recorded.bundle.iterdir()} - {"bundle.json"}


def test_the_chat_config_has_what_mlc_reads(recorded):
    config = json.loads((recorded.bundle / "mlc-chat-config.json").read_text())
    assert (config["model_type"], config["quantization"]) == ("qwen", "q0f32")
    assert config["vocab_size"] == 512 > config["active_vocab_size"] == 508
    assert config["sliding_window_size"] == -1
    assert config["context_window_size"] == config["prefill_chunk_size"] == 512
    assert config["tokenizer_files"] == ["tokenizer.json", "tokenizer_config.json"]
    assert set(config["eos_token_id"]) == {300, 301, 302}
    assert config["top_p"] == 0.8


def test_the_card_names_what_it_takes_to_run(recorded):
    card = (recorded.bundle / "README.md").read_text()
    assert "pip install apache-tvm==0.27.0.post1 apache-tvm-ffi==0.1.14.post1 numpy tokenizers" in card
    assert "python -m stages.runtime" in card
    assert "q0f32" in card
    assert "verified" not in card.lower()


def test_parts_that_contradict_one_another_are_all_named(recorded, tmp_path):
    def other_sizes(document):
        document["model"]["vocab_size"] = 500
        document["params"].pop()

    def other_stop(document):
        document["stop"] = [7]

    spoilt = inputs(recorded) | {
        "metadata": edited(recorded.folder / "compile" / "metadata.json", tmp_path, other_sizes),
        "generation": edited(recorded.folder / "config" / "generation.json", tmp_path, other_stop),
    }
    with pytest.raises(StageError) as caught:
        run_stage(Bundle(), tmp_path / "out", {"target": "llvm"}, spoilt)
    message = str(caught.value)
    assert "lm_head.weight: the library takes None, the weights hold" in message
    assert "vocab_size: the library was built for 500" in message
    assert "508 ids and the model 500 rows" in message
    assert "stop ids [7]" in message


def test_a_library_for_another_target_is_refused(recorded, tmp_path):
    with pytest.raises(StageError, match="the library was built for llvm and the bundle is for cuda"):
        run_stage(Bundle(), tmp_path, {"target": "cuda"}, inputs(recorded))


def test_a_copy_that_copies_nothing_falls_back(tmp_path, monkeypatch):
    source = tmp_path / "source"
    source.write_bytes(b"content")
    monkeypatch.setattr(os, "copy_file_range", lambda *_: 0)
    assemble.copy(source, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"content"


def test_copies_do_not_touch_their_source(tmp_path, monkeypatch):
    source = tmp_path / "source"
    source.write_bytes(os.urandom(300_000))
    before = source.stat()
    assemble.copy(source, tmp_path / "copy")

    def refuse(*_):
        raise OSError(18, "cross-device")

    monkeypatch.setattr(os, "copy_file_range", refuse)
    assemble.copy(source, tmp_path / "fallback")
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "fallback").read_bytes() == source.read_bytes()
    after = source.stat()
    assert (after.st_ctime_ns, after.st_nlink) == (before.st_ctime_ns, 1)
