"""Wrong weights: each is one message, and nothing half-written is taken for a result."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from stagegraph.stage import StageError
from stages.config_parse import ConfigParse
from stages.conversion import model
from tests.stages.test_quantize import quantize, register
from tests.support.checkpoints import qwen_tensors, write_json, write_qwen, write_raw_safetensors, write_safetensors
from tests.support.local_context import run_stage


def parse(checkpoint: Path, work: Path) -> str:
    with pytest.raises(StageError) as caught:
        run_stage(ConfigParse(), work / "parsed", {"checkpoint": str(checkpoint)})
    return str(caught.value)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_qwen(tmp_path / "checkpoint")


def single(checkpoint: Path, tensors: dict[str, np.ndarray], dtype: str = "float32") -> None:
    for path in checkpoint.glob("*.safetensors*"):
        path.unlink()
    write_safetensors(checkpoint / "model.safetensors", tensors, dtype)


@pytest.mark.parametrize("scheme", ["q0f32", "q3f16_1", "q4f16_1", "q8f32_1", "e4m3_f16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kernels", [0, 1 << 40], ids=["kernels", "numpy"])
def test_a_value_that_is_not_finite_is_named_with_its_index(
    tmp_path: Path, checkpoint: Path, scheme: str, value: float, kernels: int, monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    monkeypatch.setattr(model, "KERNELS_FROM", kernels)
    tensors = qwen_tensors(hidden=64, layers=2, ff=96, rows=512, seed=0)
    tensors["transformer.h.0.attn.c_proj.weight"][11, 3] = value
    single(checkpoint, tensors)
    inputs = register(checkpoint, tmp_path, scheme)
    memo = tmp_path_factory.getbasetemp() / "kernels of wrong values"  # compiled once
    with pytest.raises(StageError) as caught:
        quantize(checkpoint, tmp_path / "out", scheme, inputs, memo)
    name = "transformer.h.0.attn.c_proj.weight"
    assert caught.value.problems == (f"model.safetensors: tensor {name}: the value at [11, 3] is {value}",)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_part_of_a_wrong_run_is_not_taken_for_the_right_one(tmp_path: Path, checkpoint: Path) -> None:
    tensors = qwen_tensors(hidden=64, layers=2, ff=96, rows=512, seed=0)
    good = {name: array.copy() for name, array in tensors.items()}
    tensors["transformer.h.1.mlp.c_proj.weight"][0, 0] = np.nan
    single(checkpoint, tensors)
    memo = tmp_path / "memo"
    inputs = register(checkpoint, tmp_path, "q4f16_1")
    with pytest.raises(StageError, match="is nan"):
        quantize(checkpoint, tmp_path / "wrong", "q4f16_1", inputs, memo)
    single(checkpoint, good)
    inputs = register(checkpoint, tmp_path, "q4f16_1")
    mended = quantize(checkpoint, tmp_path / "mended", "q4f16_1", inputs, memo)
    fresh = quantize(checkpoint, tmp_path / "fresh", "q4f16_1", inputs)
    shard = "weights/params_shard_0.bin"
    assert (mended.out / shard).read_bytes() == (fresh.out / shard).read_bytes()


def header(offsets: list[int], dtype: str = "BF16") -> bytes:
    entries = {"a": {"dtype": "BF16", "shape": [4], "data_offsets": [0, 8]}}
    entries["b"] = {"dtype": dtype, "shape": [4], "data_offsets": offsets}
    return json.dumps(entries).encode()


@pytest.mark.parametrize(
    ("offsets", "dtype", "said"),
    [
        ([4, 12], "BF16", "tensor b begins at byte 4, not 8"),
        ([8, 4000], "BF16", "its offsets"),
        ([16, 24], "BF16", "begins at byte 16, not 8"),
        ([8, 12], "F5", "unknown dtype"),
    ],
    ids=["overlap", "out of range", "gap", "dtype"],
)
def test_wrong_headers_are_refused(tmp_path: Path, checkpoint: Path, offsets, dtype, said) -> None:
    for path in checkpoint.glob("*.safetensors*"):
        path.unlink()
    write_raw_safetensors(checkpoint / "model.safetensors", header(offsets, dtype), bytes(16))
    assert said in parse(checkpoint, tmp_path)


def test_a_truncated_shard_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    shard = sorted(checkpoint.glob("*.safetensors"))[0]
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size - 10)
    message = parse(checkpoint, tmp_path)
    assert shard.name in message
    assert "truncated" in message


def test_a_missing_shard_is_named(tmp_path: Path, checkpoint: Path) -> None:
    shard = sorted(checkpoint.glob("*.safetensors"))[1]
    shard.unlink()
    assert shard.name in parse(checkpoint, tmp_path)


def test_an_index_that_points_outside_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    index = checkpoint / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    document["weight_map"]["transformer.wte.weight"] = "../other/model.safetensors"
    write_json(index, document)
    assert "../other/model.safetensors" in parse(checkpoint, tmp_path)


def test_a_tensor_in_two_shards_is_named(tmp_path: Path, checkpoint: Path) -> None:
    shards = sorted(checkpoint.glob("*.safetensors"))
    tensors = qwen_tensors(hidden=64, layers=2, ff=96, rows=512, seed=0)
    first = {name: array for name, array in tensors.items() if "h.1" not in name}
    second = {name: array for name, array in tensors.items() if "h.1" in name or name == "transformer.wte.weight"}
    second["transformer.wte.weight"] = second["transformer.wte.weight"] + 1
    for shard, part in zip(shards, (first, second), strict=True):
        write_safetensors(shard, part, "bfloat16")
    message = parse(checkpoint, tmp_path)
    assert f"tensor transformer.wte.weight is in both {shards[0].name} and {shards[1].name}, and not" in message


def test_pickled_weights_are_refused_with_what_converts_them(tmp_path: Path, checkpoint: Path) -> None:
    for path in checkpoint.glob("*.safetensors*"):
        path.unlink()
    (checkpoint / "pytorch_model.bin").write_bytes(b"")
    message = parse(checkpoint, tmp_path)
    assert "pytorch_model.bin" in message
    assert "save_pretrained(NEW_DIR, safe_serialization=True)" in message


def test_of_a_folder_of_gguf_one_file_is_asked_for(tmp_path: Path, checkpoint: Path) -> None:
    for path in checkpoint.glob("*.safetensors*"):
        path.unlink()
    (checkpoint / "model-Q4_0.gguf").write_bytes(b"GGUF")
    message = parse(checkpoint, tmp_path)
    assert "model-Q4_0.gguf" in message
    assert "name the file, not the folder" in message
