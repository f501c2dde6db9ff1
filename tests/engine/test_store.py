"""The store: what goes in comes out, or is reported."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from stagegraph.digest import digest_bytes
from stagegraph.files import remove_tree
from stagegraph.store import objects as module
from stagegraph.store.index import Index
from stagegraph.store.journal import Journal
from stagegraph.store.objects import Store
from stagegraph.store.workspace import Workspace


@pytest.fixture
def store(tmp_path: Path):
    index = Index(tmp_path / "index")
    yield Store(tmp_path, index)
    index.close()


def put(store: Store, tmp_path: Path, content: bytes) -> str:
    file = tmp_path / "incoming"
    file.write_bytes(content)
    digest = digest_bytes(content)
    store.adopt(file, digest)
    assert not file.exists()
    return digest


@pytest.mark.parametrize("limit", [0, 1 << 30], ids=["linked", "copied"])
def test_objects_are_read_only_and_placed_whole(store: Store, tmp_path: Path, limit: int, monkeypatch) -> None:
    monkeypatch.setattr(module, "HARDLINK_FROM", limit)
    digest = put(store, tmp_path, b"content")
    target = tmp_path / "shown" / "file"
    target.parent.mkdir()
    store.place(digest, target)
    assert target.read_bytes() == b"content"
    assert target.stat().st_mode & 0o777 == 0o444
    assert store.is_object(digest, target) is (limit == 0)
    assert store.verify(digest) is None
    assert sorted(p.name for p in target.parent.iterdir()) == ["file"]


def test_a_link_made_by_us_is_not_read_again(store: Store, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(module, "HARDLINK_FROM", 0)
    digest = put(store, tmp_path, b"content")
    store.place(digest, tmp_path / "link")
    monkeypatch.setattr(module, "digest_file", None)
    assert store.verify(digest) is None


def test_damage_is_quarantined(store: Store, tmp_path: Path) -> None:
    digest = put(store, tmp_path, b"content")
    path = store.path(digest)
    path.chmod(0o644)
    path.write_bytes(b"CONTENT")
    assert store.verify(digest) == "damaged"
    assert store.verify(digest) == "damaged"
    assert not path.exists()
    assert [p.read_bytes() for p in store.quarantine.iterdir()] == [b"CONTENT"]
    assert put(store, tmp_path, b"content") == digest
    assert store.verify(digest) is None


def test_an_output_that_is_a_link_to_its_object_is_taken_back(store: Store, tmp_path: Path) -> None:
    digest = put(store, tmp_path, b"content")
    link = tmp_path / "out"
    link.hardlink_to(store.path(digest))
    store.adopt(link, digest)
    assert not link.exists()
    assert store.verify(digest) is None


def test_a_torn_journal_line_is_skipped_and_closed(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    run = {"pipeline": "p", "started": "2026-01-01T00:00:00Z", "state": "ok", "command": [], "nodes": []}
    journal.append({**run, "seconds": 1})
    with (tmp_path / "journal.jsonl").open("ab") as file:
        file.write(b'{"seconds": 2, "no')
    journal.append({**run, "seconds": 3})
    assert [e["seconds"] for e in journal.entries()] == [1, 3]


def test_sweeping_leaves_work_in_progress_alone(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "artifacts")
    for name in ("busy", "left"):
        (workspace.work / name / "out").mkdir(parents=True)
    lock = workspace.try_lock("busy")
    assert lock is not None
    assert workspace.try_lock("busy") is None
    workspace.sweep()
    assert [p.name for p in workspace.work.iterdir()] == ["busy"]
    workspace.close()


def test_remove_tree_removes_read_only_trees(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c").write_text("x")
    (tmp_path / "a" / "b").chmod(0o555)
    remove_tree(tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_threads_share_an_index_that_is_not_there_yet(tmp_path: Path) -> None:
    """At the first moment there is no file, then no table: what one thread finds must not break another's reading."""
    for attempt in range(10):
        index, start, wrong = Index(tmp_path / f"{attempt}"), threading.Barrier(8), []

        def work(name: str, index: Index = index, start: threading.Barrier = start, wrong: list = wrong) -> None:
            start.wait()
            try:
                for i in range(20):
                    index.set(f"{name}{i}", i) if index.get(f"{name}{i}") is None else None
                wrong.extend(i for i in range(20) if index.get(f"{name}{i}") != i)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is told below
                wrong.append(error)

        threads = [threading.Thread(target=work, args=(name,)) for name in "abcdefgh"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        index.close()
        assert not wrong
