"""Damaged safetensors files and indexes: each fault has its message, and none reads past the file."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
from safetensors.numpy import save_file

from stages.models.checkpoint import INDEX, read_headers
from stages.models.record import ConfigError
from stages.models.safetensors import read_header
from stages.models.weights import BLOCK, Weights
from tests.checkpoints import write_json, write_qwen, write_raw_safetensors

if TYPE_CHECKING:
    from pathlib import Path

GOOD = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def files(folder: Path) -> dict[str, Path]:
    return {path.name: path for path in folder.iterdir()}


def test_headers_and_tensors_equal_the_safetensors_package(tmp_path: Path):
    tensors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(5, np.float16)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "np"})
    found = read_headers(files(tmp_path))
    table = {name: {"dtype": t.dtype, "shape": [*t.shape], "file": file} for name, (file, t) in found.items()}
    assert table == {
        "a": {"dtype": "F32", "shape": [2, 3], "file": "model.safetensors"},
        "b": {"dtype": "F16", "shape": [5], "file": "model.safetensors"},
    }
    weights = Weights(files(tmp_path), table)
    for name, tensor in tensors.items():
        assert np.array_equal(weights[name], tensor)
        assert not weights[name].flags.writeable
        assert weights.nbytes(name) == tensor.nbytes
    with pytest.raises(ValueError, match=r"tensor a is not the F32 \[3, 2\] that config-parse saw"):
        Weights(files(tmp_path), {"a": {**table["a"], "shape": [3, 2]}})["a"]


TABLE = {"a": {"dtype": "F32", "shape": [15000, 7], "file": "model.safetensors"}}


@pytest.fixture
def tensor(tmp_path: Path) -> np.ndarray:
    """The only one of a file in ``tmp_path``, as :data:`TABLE` has it: 28 bytes in a row, 103 pages."""
    tensor = np.random.default_rng(0).standard_normal((15000, 7)).astype(np.float32)
    save_file({"a": tensor}, tmp_path / "model.safetensors")
    return tensor


def test_blocks_are_a_tensors_rows(tmp_path: Path, tensor: np.ndarray, monkeypatch: pytest.MonkeyPatch):
    found = Weights(files(tmp_path), TABLE)
    for size, count, longest in ((BLOCK, 1, 15000), (15000 * 28 // 3, 3, 5024), (1, 469, 32)):
        monkeypatch.setattr("stages.models.weights.BLOCK", size)
        blocks = [block.copy() for block in found.blocks("a")]
        assert (len(blocks), len(blocks[0])) == (count, longest)
        assert np.array_equal(np.concatenate(blocks), tensor)


def test_a_file_that_ends_early_is_an_error_and_no_signal(tmp_path: Path, tensor: np.ndarray, monkeypatch):
    monkeypatch.setattr("stages.models.weights.BLOCK", 32 * 28 * 64)
    found = Weights(files(tmp_path), TABLE)
    blocks = found.blocks("a")
    assert np.array_equal(next(blocks), tensor[:2528])
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(file.seek(0, 2) - 9000 * 28)
    for _ in range(2):  # in a mapping that was made before, and in a new one
        with pytest.raises(ValueError, match="the file ends 252,000 bytes before its tensor a does"):
            list(blocks)
        blocks = found.blocks("a")


def test_linux_without_populating_reads_the_same(tmp_path: Path, tensor: np.ndarray, monkeypatch):
    monkeypatch.setattr("stages.models.weights.POPULATE_READ", 1 << 30)  # advice that no Linux knows: EINVAL
    assert np.array_equal(np.concatenate([*Weights(files(tmp_path), TABLE).blocks("a")]), tensor)


def test_a_file_that_was_written_to_is_noticed(tmp_path: Path, tensor: np.ndarray):
    found = Weights(files(tmp_path), TABLE)
    list(found.blocks("a"))
    found.check_unchanged("a")
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\0\0\0\0")
    with pytest.raises(ValueError, match=r"model\.safetensors: the file was changed while it was read; run again"):
        found.check_unchanged("a")


@pytest.mark.parametrize(
    ("header", "payload", "message"),
    [
        (b'{"a": {', 0, "damaged header: Expecting"),
        (b"[]", 0, "damaged header: expected a JSON object"),
        (b'{"a": 1, "a": 2}', 0, "damaged header: key 'a' occurs twice"),
        (b"[" * 100_000, 0, "damaged header"),
        (b"\xff{}", 0, "damaged header"),
        ({"a": {"dtype": "F32"}}, 0, "tensor a: needs dtype, shape and data_offsets"),
        ({"a": {**GOOD, "dtype": "F31"}}, 24, "tensor a: unknown dtype 'F31'; known: BF16"),
        ({"a": {**GOOD, "shape": [2, -3]}}, 24, "must be lists of sizes"),
        ({"a": {**GOOD, "data_offsets": [0]}}, 24, "must be lists of sizes"),
        ({"a": {**GOOD, "shape": [2, 4]}}, 24, "takes 32 bytes, its offsets"),
        ({"a": GOOD, "b": {**GOOD, "data_offsets": [12, 36]}}, 36, "tensor b begins at byte 12, not 24"),
        ({"a": GOOD, "b": {**GOOD, "data_offsets": [28, 52]}}, 52, "tensor b begins at byte 28, not 24"),
        (b'{"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [1e999, 24]}}', 24, "beyond every floating-point"),
        ({"a": {**GOOD, "data_offsets": [0.0, 24.0]}}, 24, "must be lists of sizes"),
        ({"a": {**GOOD, "shape": [2**62] * 300_000}}, 24, "must be lists of sizes, of at most 8 dimensions"),
        (b'{"\\ud800": 1}', 0, "damaged header: '\\ud800' holds half of a surrogate pair"),
        ({"a": GOOD}, 23, "truncated: its header describes"),
        ({"a": GOOD}, 25, "has trailing bytes: its header describes"),
    ],
)  # fmt: skip
def test_a_damaged_header_is_described(tmp_path: Path, header, payload, message):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    write_raw_safetensors(tmp_path / "x", raw, bytes(payload))
    with pytest.raises(ValueError, match=r"^model-1: ") as caught:
        read_header(tmp_path / "x", "model-1")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated: a header of 0 bytes does not fit a file of 0 bytes"),
        (b"\x10\0\0", "truncated: a header of 16 bytes does not fit a file of 3 bytes"),
        ((2**63).to_bytes(8, "little") + b"{}", "truncated: a header of 9223372036854775808 bytes"),
        ((40).to_bytes(8, "little") + b'{"a": {"dtype"', "truncated: a header of 40 bytes does not fit a file of 22"),
    ],
)  # fmt: skip
def test_a_truncated_file_is_described(tmp_path: Path, content, message):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError, match="x: ") as caught:
        read_header(tmp_path / "x", "x")
    assert message in str(caught.value)


def problems(folder: Path) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read_headers(files(folder))
    return list(caught.value.problems)


def edit_index(folder: Path, **changes: str | None) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"].update({name: shard for name, shard in changes.items() if shard})
    write_json(folder / INDEX, index)


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def test_missing_shards_are_all_listed(tmp_path: Path):
    write_qwen(tmp_path)
    for shard in (FIRST, SECOND):
        (tmp_path / shard).unlink()
    assert problems(tmp_path) == [f"{s}: the shard is missing, although {INDEX} names it" for s in (FIRST, SECOND)]


def test_damaged_shards_are_all_listed(tmp_path: Path):
    write_qwen(tmp_path)
    for shard in (FIRST, SECOND):
        (tmp_path / shard).write_bytes((tmp_path / shard).read_bytes()[:-1])
    assert [text.split(":")[:2] for text in problems(tmp_path)] == [[FIRST, " truncated"], [SECOND, " truncated"]]


@pytest.mark.parametrize(
    "shard", ["../evil.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "config.json", ".."]
)
def test_an_index_cannot_point_elsewhere(tmp_path: Path, shard):
    write_qwen(tmp_path)
    edit_index(tmp_path, **{"lm_head.weight": shard})
    assert problems(tmp_path) == [f"{INDEX}: {shard!r} is not the name of a safetensors file in the same folder"]


def test_index_and_headers_must_agree(tmp_path: Path):
    write_qwen(tmp_path)
    edit_index(tmp_path, **{"lm_head.weight": FIRST, "lm_head.weigth": SECOND})
    found = problems(tmp_path)
    assert found == [
        f"tensor lm_head.weight: the index puts it in {FIRST}, it is in {SECOND}",
        f"tensor lm_head.weigth: the index puts it in {SECOND}, no shard holds it; there is lm_head.weight",
    ]
    index = json.loads((tmp_path / INDEX).read_text())
    del index["weight_map"]["lm_head.weigth"], index["weight_map"]["transformer.ln_f.weight"]
    write_json(tmp_path / INDEX, index)
    assert f"tensor transformer.ln_f.weight: in {SECOND} but not in the index" in problems(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path):
    write_qwen(tmp_path)
    (tmp_path / SECOND).write_bytes((tmp_path / FIRST).read_bytes())
    assert f"tensor transformer.wte.weight is in both {FIRST} and {SECOND}" in problems(tmp_path)


def test_shards_without_an_index_are_refused(tmp_path: Path):
    write_qwen(tmp_path)
    (tmp_path / INDEX).unlink()
    assert problems(tmp_path) == [f"2 safetensors files ({FIRST}, ...) and no {INDEX} that says how they belong"]
    (tmp_path / INDEX).write_text('{"weight_map": []}')
    assert problems(tmp_path) == [f"{INDEX}: weight_map must map tensor names to file names"]
    (tmp_path / INDEX).write_text('{"weight_map": ')
    assert problems(tmp_path)[0].startswith(f"{INDEX}: not valid JSON: Expecting value: line 1")
