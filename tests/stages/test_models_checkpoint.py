"""Damaged safetensors files and indexes: each fault has its message, and none reads past the file."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from stages.checkpoint import strict_json
from stages.checkpoint.errors import ConfigError
from stages.checkpoint.gguf import container
from stages.checkpoint.headers import INDEX, SINGLE, read_headers
from stages.checkpoint.safetensors import read_header
from stages.checkpoint.tensors import BLOCK, Weights
from tests.support.checkpoints import write_json, write_qwen, write_raw_safetensors

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

GOOD = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def files(folder: Path) -> dict[str, Path]:
    return {path.name: path for path in folder.iterdir()}


def test_headers_and_tensors_equal_the_safetensors_package(tmp_path: Path):
    tensors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(5, np.float16)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "np"})
    found = read_headers(files(tmp_path))
    table = found.table()
    assert not found.notes
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
        monkeypatch.setattr("stages.checkpoint.tensors.BLOCK", size)
        blocks = [block.copy() for block in found.blocks("a")]
        assert (len(blocks), len(blocks[0])) == (count, longest)
        assert np.array_equal(np.concatenate(blocks), tensor)


def test_a_file_that_ends_early_is_an_error_and_no_signal(tmp_path: Path, tensor: np.ndarray, monkeypatch):
    monkeypatch.setattr("stages.checkpoint.tensors.BLOCK", 32 * 28 * 64)
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
    monkeypatch.setattr("stages.checkpoint.tensors.POPULATE_READ", 1 << 30)  # advice that no Linux knows: EINVAL
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
    (problem,) = problems(tmp_path)
    assert problem.startswith(f"{INDEX}: {shard!r} is not the name of a safetensors file in the same folder; write")


def test_what_shards_hold_counts_and_not_what_the_index_says(tmp_path: Path):
    write_qwen(tmp_path)
    right = read_headers(files(tmp_path)).tensors
    edit_index(tmp_path, **{"lm_head.weight": FIRST, "model.rotary_emb.inv_freq": SECOND})
    index = json.loads((tmp_path / INDEX).read_text())
    del index["weight_map"]["transformer.ln_f.weight"]
    write_json(tmp_path / INDEX, index)
    found = read_headers(files(tmp_path))
    assert found.tensors == right
    said = f"{INDEX} is out of date, the shards' headers count: it names 1 tensors"
    assert found.notes == [
        f"{said} that no shard holds (model.rotary_emb.inv_freq)",
        f"{said} in other shards than they are in (lm_head.weight)",
        f"{said} too few: the shards hold them (transformer.ln_f.weight)",
    ]


def test_a_tensor_in_two_shards_must_be_the_same(tmp_path: Path):
    write_qwen(tmp_path)
    right = read_headers(files(tmp_path)).tensors
    doubled = load_file(tmp_path / FIRST) | load_file(tmp_path / SECOND)
    save_file(doubled, tmp_path / SECOND)
    found = read_headers(files(tmp_path))
    assert {name: info.shape for name, (_, info) in found.tensors.items()} == {
        name: info.shape for name, (_, info) in right.items()
    }
    first = len(load_file(tmp_path / FIRST))
    assert found.notes[0].startswith(f"{first} tensors are in several files, the same in each: ")
    doubled["transformer.wte.weight"] = -doubled["transformer.wte.weight"]
    save_file(doubled, tmp_path / SECOND)
    assert problems(tmp_path) == [
        f"tensor transformer.wte.weight is in both {FIRST} and {SECOND}, and not the same; remove the wrong one"
    ]


def test_shards_without_an_index_are_read_for_what_they_hold(tmp_path: Path):
    write_qwen(tmp_path)
    right = read_headers(files(tmp_path)).tensors
    (tmp_path / INDEX).unlink()
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    found = read_headers(files(tmp_path))
    assert found.tensors == right
    read = f"the 2 files {FIRST}, {SECOND} are read for what they hold"
    assert found.notes == [f"no {INDEX} is there: {read}; not read: adapter_model.safetensors"]
    (tmp_path / FIRST).rename(tmp_path / "other-00001-of-00002.safetensors")
    assert "3 safetensors files of 2 numberings" in problems(tmp_path)[0]
    (tmp_path / "other-00001-of-00002.safetensors").unlink()
    assert problems(tmp_path) == [f"{FIRST} is missing of 2 shards; fetch the checkpoint again"]
    (tmp_path / "adapter_model.safetensors").unlink()
    (tmp_path / SECOND).rename(tmp_path / "b.safetensors")
    save_file({"a": np.ones(1, np.float32)}, tmp_path / "a.safetensors")
    assert {file for file, _ in read_headers(files(tmp_path)).tensors.values()} == {"a.safetensors", "b.safetensors"}


def test_names_of_shards_may_begin_with_the_folder_itself(tmp_path: Path):
    write_qwen(tmp_path)
    before = read_headers(files(tmp_path)).tensors
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"] = {name: f"./{shard}" for name, shard in index["weight_map"].items()}
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert read_headers(files(tmp_path)).tensors == before


def test_what_macos_keeps_beside_files_is_not_read(tmp_path: Path):
    write_qwen(tmp_path)
    before = read_headers(files(tmp_path)).tensors
    (tmp_path / INDEX).unlink()
    (tmp_path / f"._{FIRST}").write_bytes(b"\0\5\x16\7")
    assert read_headers(files(tmp_path)).tensors == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 4578760\n", "a Git LFS pointer"),
        (b"<!DOCTYPE html>\n<html>Not found</html>", "a web page and not the file itself"),
        (b"\n<html>Not found</html>", "a web page and not the file itself"),
    ],
)
def test_what_only_stands_for_a_file_is_named(tmp_path: Path, content: bytes, message: str):
    (tmp_path / "x").write_bytes(content)
    for read in (read_header, strict_json.read_object, container.read):
        with pytest.raises(ValueError, match=f"^x.json: {message}"):
            read(tmp_path / "x", "x.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b'\xef\xbb\xbf{"a": 1}', "begins with a byte order mark"),
        ('{"a": 1}'.encode("utf-16"), "begins with a byte order mark"),
    ],
)
def test_a_file_that_is_no_json_in_utf_8_is_described(tmp_path: Path, content: bytes, message: str):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError, match=f"^x.json: {message}.*; "):
        strict_json.read_object(tmp_path / "x", "x.json")


def test_links_that_lead_nowhere_are_named_with_the_missing_shard(tmp_path: Path):
    write_qwen(tmp_path)
    (tmp_path / FIRST).unlink()
    (tmp_path / FIRST).symlink_to("../../blobs/0")
    (tmp_path / "README.md").symlink_to("../../blobs/1")  # nothing of it is missed
    with pytest.raises(ConfigError) as caught:
        read_headers({name: path for name, path in files(tmp_path).items() if path.exists()})
    assert f"{FIRST} is a link to a file that is not there; copy" in caught.value.problems[1]


def test_a_damaged_index_is_described(tmp_path: Path):
    write_qwen(tmp_path)
    (tmp_path / INDEX).write_text('{"weight_map": []}')
    assert problems(tmp_path) == [f"{INDEX}: weight_map must map tensor names to file names"]
    (tmp_path / INDEX).write_text('{"weight_map": ')
    assert problems(tmp_path)[0].startswith(f"{INDEX}: not valid JSON: Expecting value: line 1")


def test_a_whole_file_comes_before_an_index(tmp_path: Path):
    """As transformers takes them: an index that its shards have left is no checkpoint beside one that is."""
    write_qwen(tmp_path)
    whole = load_file(tmp_path / FIRST) | load_file(tmp_path / SECOND)
    save_file(whole, tmp_path / SINGLE)
    found = read_headers(files(tmp_path))
    assert {file for file, _ in found.tensors.values()} == {SINGLE}
    assert found.notes == [f"{SINGLE} is read, as transformers does; the shards of {INDEX} hold the same"]
    save_file({**whole, "lm_head.weight": -whole["lm_head.weight"]}, tmp_path / SINGLE)
    (problem,) = problems(tmp_path)
    assert "there are two checkpoints" in problem
    assert f"tensor lm_head.weight in {SINGLE} is not that in {SECOND}" in problem
    save_file({**whole, "more": np.ones(1, np.float32)}, tmp_path / SINGLE)
    assert f"tensor more is in {SINGLE} alone" in problems(tmp_path)[0]
    (tmp_path / FIRST).unlink()
    found = read_headers(files(tmp_path))
    assert "more" in found.tensors
    gone = f"{FIRST}: the shard is missing, although {INDEX} names it"
    assert found.notes == [f"{SINGLE} is read, as transformers does, and not what {INDEX} names: {gone}"]


def test_no_header_whatever_it_says_is_a_traceback(tmp_path: Path):
    """Every change of a value of a header, and random bytes over it: read as it stands, or refused by name."""
    random = np.random.default_rng(0)
    values = [None, True, -1, 0, 1, 2**31, 2**63, 2**80, 1.5, "", "F32", "\u0000", [], [[]], {}, {"a": 1}, [0, 2**64]]
    raw = {"__metadata__": {"format": "pt"}, "a": GOOD, "b": {"dtype": "I8", "shape": [], "data_offsets": [24, 25]}}
    headers = [json.dumps(changed).encode() for changed in mutations(raw, values)]
    text = json.dumps(raw).encode()
    for _ in range(300):
        damaged = bytearray(text)
        for place in random.integers(0, len(text), 3):
            damaged[place] = random.integers(0, 256)
        headers.append(bytes(damaged[: random.integers(1, len(text) + 1)]))
    sizes, refused = [], []
    for header in headers:
        write_raw_safetensors(tmp_path / SINGLE, header, bytes(25))
        try:
            found = read_headers({SINGLE: tmp_path / SINGLE})
            sizes.append(sum(info.nbytes for _, info in found.tensors.values()))
        except ConfigError as error:
            refused.append(str(error))
    assert set(sizes) == {25}
    assert all(problem.startswith(f"{SINGLE}: ") for problem in refused)
    assert len(sizes) > 10
    assert len(refused) > 300


def mutations(value: Any, others: Sequence[Any]) -> Iterator[Any]:
    """Yield ``value`` with each part of it replaced by each of ``others``."""
    yield from others
    if isinstance(value, dict):
        for key, item in value.items():
            yield from ({**value, key: changed} for changed in mutations(item, others))
            yield {name: kept for name, kept in value.items() if name != key}
    elif isinstance(value, list):
        for place, item in enumerate(value):
            yield from ([*value[:place], changed, *value[place + 1 :]] for changed in mutations(item, others))
