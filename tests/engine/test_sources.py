"""Sources: identified by content, read once, through links of a hub cache."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from stagegraph import errors
from stagegraph.digest import digest_bytes, digest_file
from stagegraph.errors import PlanError
from stagegraph.files import list_files
from stagegraph.planning import sources
from stagegraph.planning.sources import Sources
from stagegraph.store.index import Index


@pytest.fixture
def index(tmp_path: Path):
    opened = Index(tmp_path / "index")
    yield opened
    opened.close()


def settle() -> None:
    time.sleep(0.06)


@pytest.mark.parametrize("size", [0, 1, 1024, (8 << 20) - 1, (8 << 20) + 1])
def test_a_file_digests_as_its_bytes(tmp_path: Path, size: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(size))
    assert digest_file(path) == digest_bytes(path.read_bytes())


def test_only_declared_files_are_listed(tmp_path: Path) -> None:
    for name in ("config.json", "a.safetensors", "sub/b.safetensors", "reference/r.json", "c.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    _, files = list_files(tmp_path, ("config.json", "*.safetensors", "reference/*"))
    assert list(files) == ["a.safetensors", "config.json", "reference/r.json"]
    root, files = list_files(tmp_path / "c.bin", ("*.bin",))
    assert (root, list(files)) == (tmp_path, ["c.bin"])


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("a.txt", ["a.txt"]),
        ("*.txt", ["a.txt", "b.txt"]),
        ("?.txt", ["a.txt", "b.txt"]),
        ("[!a].txt", ["b.txt"]),
        ("a*t", ["a.txt"]),
        ("*", ["a.txt", "b.txt", "c.bin"]),
        ("sub/*.txt", ["sub/a.txt"]),
        (".txt", []),
    ],
)
def test_patterns_name_files(tmp_path: Path, pattern: str, found: list[str]) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("a.txt", "b.txt", "c.bin", "sub/a.txt"):
        (tmp_path / name).touch()
    assert list(list_files(tmp_path, (pattern,))[1]) == found
    assert list(list_files(tmp_path, (pattern, "c.bin"))[1]) == sorted({*found, "c.bin"})


def test_the_first_file_of_a_split_one_brings_the_others(tmp_path: Path) -> None:
    names = [f"m-0000{number}-of-00003.bin" for number in (1, 2, 3)]
    for name in (*names, "m-00004-of-00004.bin", "other-00002-of-00003.bin", "m-00002-of-00003.txt"):
        (tmp_path / name).touch()
    assert list_files(tmp_path / names[0], (), ("*.bin",)) == (tmp_path, {name: tmp_path / name for name in names})
    assert [*list_files(tmp_path / names[1], (), ("*.bin",))[1]] == [names[1]]
    assert [*list_files(tmp_path / names[0], ("*.bin",))[1]] == [names[0]]
    (tmp_path / names[2]).unlink()
    assert [*list_files(tmp_path / names[0], (), ("*.bin",))[1]] == names[:2]


def test_a_hub_snapshot_is_read_through_its_links(tmp_path: Path, index: Index) -> None:
    blob = tmp_path / "hub" / "blobs" / "0123"
    snapshot = tmp_path / "hub" / "snapshots" / "main"
    blob.parent.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    blob.write_text("weights")
    (snapshot / "w.safetensors").symlink_to("../../blobs/0123")
    (snapshot / "gone.safetensors").symlink_to("../../blobs/missing")
    state = Sources(index).state(str(snapshot), ("*.safetensors",))
    assert state.digests == {"w.safetensors": digest_bytes(b"weights")}
    settle()
    blob.write_text("weights, changed")
    assert Sources(index).state(str(snapshot), ("*.safetensors",)).digests != state.digests
    assert state.changed() == ["w.safetensors"]


def test_an_unchanged_file_is_never_read_again(tmp_path: Path, index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "w.bin"
    path.write_text("x")
    settle()
    first = Sources(index).state(str(tmp_path), ("*.bin",))
    monkeypatch.setattr(sources, "digest_file", None)
    assert Sources(index).state(str(tmp_path), ("*.bin",)).digests == first.digests


def test_same_size_and_restored_mtime_do_not_fool_the_cache(tmp_path: Path, index: Index) -> None:
    path = tmp_path / "w.bin"
    path.write_text("one")
    settle()
    before = Sources(index).state(str(tmp_path), ("*.bin",))
    times = path.stat()
    path.write_text("two")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert Sources(index).state(str(tmp_path), ("*.bin",)).digests != before.digests


def test_a_file_that_never_rests_is_refused(tmp_path: Path, index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "w.bin"
    path.write_text("x")

    def growing(file: Path, *_: object) -> str:
        with file.open("a") as out:
            out.write("x")
        return "digest"

    monkeypatch.setattr(sources, "digest_file", growing)
    with pytest.raises(PlanError, match="changes while it is read"):
        Sources(index).state(str(tmp_path), ("*.bin",))


def test_long_reading_is_said(tmp_path: Path, index: Index, monkeypatch, caplog) -> None:
    (tmp_path / "a.bin").write_bytes(bytes(20 << 20))
    settle()  # what has just been written is read again, for its time does not yet tell it from a change
    monkeypatch.setattr(errors, "FIRST_SECONDS", 0)
    Sources(index).state(str(tmp_path), ("*.bin",))
    (said,) = caplog.messages
    assert said.startswith("reading sources: 0.0 of 0.0 GB, ")
    assert not Sources(index).state(str(tmp_path), ("*.bin",)).changed()
    assert len(caplog.messages) == 1
