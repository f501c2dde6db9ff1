"""Damaged documents: one flipped bit, a lost index, a journal of another shape; nothing wrong reaches a result."""

from __future__ import annotations

import functools
import json
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from random import Random
from typing import Any

import diskcache
import pytest

from stagegraph import Pipeline
from stagegraph.store.documents import DamagedError, seal, unseal
from stagegraph.store.index import Index
from stagegraph.store.journal import Journal
from stagegraph.store.record import artifact_digest, is_record_of
from stagegraph.store.workspace import Workspace
from tests.support.demo import Demo


@pytest.fixture
def built(demo: Demo) -> Demo:
    assert demo.run().code == 0
    assert demo.counts == ["join", "read", "shape[column]", "shape[line]"]
    return demo


def root(demo: Demo) -> Path:
    return demo.folder / "artifacts" / ".stagegraph"


def store_of(demo: Demo) -> closing[Workspace]:
    return closing(Workspace(demo.folder / "artifacts"))


def shown(demo: Demo) -> dict[str, bytes]:
    return {p.relative_to(demo.path()).as_posix(): p.read_bytes() for p in demo.path().rglob("*") if p.is_file()}


def flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@pytest.mark.parametrize("document", [{"a": [1, "#é\ud800"], "b": None}, [[1, 2], "0" * 64], "#" * 40, 7])
def test_a_sealed_text_with_one_bit_flipped_is_not_believed(document: object) -> None:
    text = seal("rec:1", document)
    assert unseal("rec:1", text) == document
    with pytest.raises(DamagedError):
        unseal("rec:2", text)
    content = text.encode()
    for bit in range(len(content) * 8):
        with pytest.raises(DamagedError):
            unseal("rec:1", flipped(content, bit).decode(errors="replace"))


def test_a_text_from_before_there_were_seals_is_read() -> None:
    assert unseal("last:a/b", '{"key": "#1"}') == {"key": "#1"}
    for odd in ("", "{", "[" * 100_000, b"{}", None, 5):
        with pytest.raises(DamagedError):
            unseal("last:a/b", odd)


def leaving(digest: str, size: int) -> Iterator[dict[str, list[Any]]]:
    """Files that are not below where they are put, and objects that are not in the store."""
    yield from ({name: [digest, size]} for name in ("../x", "/x", "a/../../x", "a\0b"))
    yield from ({"x": [odd, size]} for odd in ("../x", f"../../{digest}", digest.upper(), digest[:-1], ""))


def test_a_record_that_is_not_what_its_key_says_is_not_believed(built: Demo) -> None:
    with store_of(built) as workspace:
        for record in list(workspace.records()):
            key = record["key"]
            assert is_record_of(record, key)
            port, output = next(iter(record["outputs"].items()))
            name, (digest, size) = next(iter(output["files"].items()))
            other = digest[:-1] + ("0" if digest[-1] != "0" else "1")
            for change in (
                {"document": record["document"] | {"version": 99}},
                {"outputs": record["outputs"] | {port: output | {"files": {f"{name}x": [digest, size]}}}},
                {"outputs": record["outputs"] | {port: output | {"files": {name: [other, size]}}}},
                {"outputs": {port: None}},
                {"outputs": {port: {"files": {name: 5}, "digest": ""}}},
                *({"outputs": {port: {"files": odd, "digest": artifact_digest(odd)}}} for odd in leaving(digest, size)),
                {"views": {"../x": [digest, size]}},
                {"outputs": 3},
                {"schema": 2},
                {"key": other},
            ):
                assert not is_record_of(record | change, key), change
            for field in record:
                assert not is_record_of({n: v for n, v in record.items() if n != field}, key), field


def test_any_bit_of_any_record_may_flip(built: Demo) -> None:
    rng, before = Random(1), shown(built)  # noqa: S311
    files = sorted(p for p in (root(built) / "records").rglob("*") if p.is_file())
    assert len(files) == 4
    for path in files:
        content = path.read_bytes()
        for bit in [*rng.sample(range(len(content) * 8), 40), 0, len(content) * 8 - 1]:
            path.write_bytes(flipped(content, bit))
            with store_of(built) as workspace:
                assert workspace.record(path.name) is None
                assert workspace.is_damaged(path.name)
        result = built.run()
        assert [n["reason"] for n in result.json["nodes"] if n["outcome"] != "HIT"] == ["its record was damaged"]
        assert len(built.counts) == 1
        assert shown(built) == before
    assert set(built.run().outcomes.values()) == {"HIT"}


@pytest.mark.parametrize("odd", ["directory", "fifo", "empty", "link"])
def test_whatever_is_in_a_records_place_is_replaced(built: Demo, odd: str) -> None:
    for path in sorted(p for p in (root(built) / "records").rglob("*") if p.is_file()):
        path.unlink()
        if odd == "directory":
            (path / "x").mkdir(parents=True)
        elif odd == "fifo":
            os.mkfifo(path)
        elif odd == "link":
            path.symlink_to("/dev/zero")
        else:
            path.touch()
    assert built("status", str(built.pipeline)).code == 0
    assert built.run().code == 0
    assert len(built.counts) == 4
    assert set(built.run().outcomes.values()) == {"HIT"}


@pytest.mark.parametrize("how", ["deleted", "garbage", "empty", "a page", "settings", "table", "keys", "blobs"])
def test_no_result_is_lost_with_the_index(built: Demo, how: str, caplog) -> None:
    before, folder = shown(built), root(built) / "index"
    database = folder / "cache.db"
    damage: dict[str, Callable[[], object]] = {
        "deleted": lambda: shutil.rmtree(folder),
        "garbage": lambda: database.write_bytes(b"garbage" * 1000),
        "empty": lambda: database.write_bytes(b""),
        "a page": lambda: database.write_bytes(database.read_bytes()[:4096] + b"\x55" * 40960),
        "settings": lambda: sql(database, "UPDATE Settings SET key = 'disk_odd' WHERE key = 'disk_min_file_size'"),
        "table": lambda: sql(database, "ALTER TABLE Cache RENAME TO Cachf"),
        "keys": lambda: sql(database, "UPDATE Cache SET key = CAST(x'ff' || key AS TEXT)"),
        "blobs": lambda: sql(database, "UPDATE Cache SET value = x'00'"),
    }
    damage[how]()
    assert built("show", "join", str(built.pipeline)).code == 0
    assert set(built.run().outcomes.values()) == {"HIT"}
    assert built.counts == []
    assert shown(built) == before
    if how == "blobs":
        assert "fsck --repair" in built("gc", str(built.pipeline)).err
        built("fsck", str(built.pipeline), "--repair")
    swept = built("gc", str(built.pipeline), "--json")
    assert {item["kind"] for item in swept.json["removed"]} <= {"leftover"}
    assert built.run("--force").code == 0
    assert ("set aside" in caplog.text) is (how in {"garbage", "a page", "settings"})
    assert set(built.run().outcomes.values()) == {"HIT"}


def sql(database: Path, statement: str) -> None:
    connection = sqlite3.connect(database)
    connection.execute(statement)
    connection.commit()
    connection.close()


def test_any_bit_of_the_index_may_flip(built: Demo) -> None:
    rng, before = Random(2), shown(built)  # noqa: S311
    database = root(built) / "index" / "cache.db"
    for extra in database.parent.glob("cache.db-*"):
        extra.unlink()
    content = database.read_bytes()
    for _ in range(25):
        database.write_bytes(flipped(content, rng.randrange(len(content) * 8)))
        result = built.run()
        assert (result.code, set(result.outcomes.values())) == (0, {"HIT"})
        assert shown(built) == before
        for extra in database.parent.glob("cache.db-*"):
            extra.unlink()
    assert built.counts == []


def test_the_store_of_an_earlier_version_is_read_and_kept(built: Demo) -> None:
    """There all documents were rows of the index, without seals."""
    before = shown(built)
    with store_of(built) as workspace:
        documents = {
            name: workspace.index.get(name) for name in [*workspace.index.names("rec:"), *workspace.index._names("")]
        }
    for folder in ("records", "parts", "index"):
        shutil.rmtree(root(built) / folder, ignore_errors=True)
    with diskcache.Cache(str(root(built) / "index"), disk_min_file_size=1 << 30, eviction_policy="none") as cache:
        for name, document in documents.items():
            cache.set(name, json.dumps(document))
    assert "all 4 nodes are up to date" in built("status", str(built.pipeline)).out
    assert set(built.run().outcomes.values()) == {"HIT"}
    assert not (root(built) / "records").exists()  # looking moves nothing
    assert built.run("--stage", "join", "--force").code == 0
    assert built.counts == ["join"]
    shutil.rmtree(root(built) / "index")
    assert set(built.run().outcomes.values()) == {"HIT"}
    assert (built.counts, shown(built)) == ([], before)


def test_a_part_outlives_the_index(tmp_path: Path) -> None:
    index = Index(tmp_path / "index")
    name = f"part:{'ab' * 32}"
    index.set_all({name: {"digest": "x"}, "memo:a": 1})
    index.close()
    shutil.rmtree(tmp_path / "index")
    index = Index(tmp_path / "index")
    assert (index.get(name), index.get("memo:a")) == ({"digest": "x"}, None)
    assert list(index.names("part:")) == [name]
    index.delete(name)
    assert (index.get(name), list(index.names("part:"))) == (None, [])
    index.close()


def test_a_locked_index_costs_no_result(tmp_path: Path, monkeypatch, caplog) -> None:
    monkeypatch.setattr("stagegraph.store.index.BUSY_SECONDS", 0.1)
    index, part = Index(tmp_path / "index"), f"part:{'ab' * 32}"
    index.set("memo:a", 1)
    locker = sqlite3.connect(tmp_path / "index" / "cache.db", isolation_level=None)
    locker.execute("BEGIN IMMEDIATE")
    index.set_all({"memo:a": 2, part: 3})
    assert "could not be written (it was locked for 0.1 s)" in caplog.text
    assert (index.get("memo:a"), index.get(part)) == (1, 3)
    locker.close()
    index.close()


def test_a_commit_that_fails_locks_nobody_else_out(tmp_path: Path, monkeypatch, caplog) -> None:
    class Failing(sqlite3.Connection):
        def execute(self, sql: str, *args: Any) -> sqlite3.Cursor:
            if sql == "COMMIT":
                error = sqlite3.OperationalError("disk I/O error")
                error.sqlite_errorcode = sqlite3.SQLITE_IOERR
                raise error
            return super().execute(sql, *args)

    monkeypatch.setattr("stagegraph.store.index.BUSY_SECONDS", 0.1)
    index, other = Index(tmp_path / "index"), Index(tmp_path / "index")
    other.set("memo:a", 1)
    with monkeypatch.context() as patch:
        patch.setattr(sqlite3, "connect", functools.partial(sqlite3.connect, factory=Failing))
        index.set("memo:a", 2)
    assert "could not be written (disk I/O error)" in caplog.text
    other.set("memo:a", 3)
    assert "locked" not in caplog.text
    assert index.get("memo:a") == other.get("memo:a") == 3
    for each in (index, other):
        each.close()


LINE = {
    "pipeline": "demo", "started": "2026-01-01T00:00:00Z", "seconds": 1.0, "state": "ok", "command": ["run"],
    "nodes": [{
        "node": "join", "outcome": "BUILT", "reason": "r", "reasons": [], "key": "k", "seconds": 1.0, "bytes": 1,
        "peak_bytes": 1, "summary": "", "parts": {}, "warnings": [], "problems": [], "log": None, "stage": "join",
    }],
}  # fmt: skip


def test_a_line_of_the_journal_with_one_bit_flipped_is_skipped(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    journal.append(LINE)
    content = (tmp_path / "journal").read_bytes()
    assert list(journal.entries()) == [LINE]
    for bit in range(0, (len(content) - 1) * 8, 5):
        (tmp_path / "journal").write_bytes(flipped(content, bit))
        assert list(journal.entries()) in ([], [LINE]), bit


def odd_lines() -> dict[str, bytes]:
    node = LINE["nodes"][0]
    changes: dict[str, object] = {f"no {name}": {n: v for n, v in LINE.items() if n != name} for name in LINE}
    changes |= {f"{name} null": LINE | {name: None} for name in LINE}
    changes |= {f"node {name} null": LINE | {"nodes": [node | {name: None}]} for name in node if name != "log"}
    changes |= {
        f"node no {name}": LINE | {"nodes": [{n: v for n, v in node.items() if n != name}]} for name in ("key", "bytes")
    }
    changes |= {
        "list": [], "ints": LINE | {"nodes": [1, 2]}, "dict": LINE | {"nodes": {}}, "when": LINE | {"started": ""},
        "NaN": LINE | {"seconds": float("nan")}, "text": LINE | {"seconds": "x"}, "words": LINE | {"command": [1]},
    }  # fmt: skip
    lines = {name: json.dumps(document).encode() for name, document in changes.items()}
    return lines | {"deep": b"[" * 100_000, "huge": b'{"seconds":' + b"9" * 5000 + b"}", "binary": bytes(range(256))}


def test_a_journal_of_any_shape_breaks_no_verb(built: Demo) -> None:
    path = root(built) / "journal.jsonl"
    good = path.read_bytes()
    entry = json.loads(good)
    entry.pop("seal")
    for name, line in odd_lines().items():
        path.write_bytes(line + b"\n")
        assert list(Journal(path).entries()) == [], name
    path.write_bytes(b"\n".join(odd_lines().values()) + b"\n" + json.dumps(entry).encode() + b"\n")
    assert list(Journal(path).entries()) == [entry]  # a line of an earlier version has no seal
    for verb in (["runs"], ["gc", "--dry-run"], ["du"], ["show", "join@~0"], ["status"]):
        assert built(*verb, str(built.pipeline)).code == 0, verb


def test_looking_at_a_pipeline_that_never_ran_writes_nothing(demo: Demo) -> None:
    for verb in (
        ["status"],
        ["explain", "join"],
        ["runs"],
        ["graph"],
        ["du"],
        ["log", "join"],
        ["show", "join"],
        ["fsck"],
    ):
        demo(*verb, str(demo.pipeline))
        assert not (demo.folder / "artifacts").exists(), verb
    with Pipeline(demo.pipeline) as pipeline:
        pipeline.plan()
    assert not (demo.folder / "artifacts").exists()


def test_what_took_the_place_of_the_journal_is_named_with_what_to_do(built: Demo) -> None:
    journal = root(built) / "journal.jsonl"
    journal.unlink()
    journal.mkdir()
    refused = built.run("--force")
    assert (refused.code, f"{journal}: Is a directory; no store makes that: remove it" in refused.err) == (3, True)
    journal.rmdir()
    assert built.run().code == 0


@pytest.mark.parametrize("name", ["objects", "records", "parts", "work", "locks"])
def test_a_file_in_the_place_of_a_folder_of_the_store_is_named(demo: Demo, name: str) -> None:
    demo.run()
    folder = demo.folder / "artifacts" / ".stagegraph" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.write_text("x")
    demo.source.write_text("other words\n")
    for verb in ("run", "fsck"):
        refused = demo(verb, str(demo.pipeline))
        assert refused.code == 3, refused.err
        assert f"error: {folder}: " in refused.err
        assert "no store makes that: remove it" in refused.err
    folder.unlink()
    assert set(demo.run().outcomes.values()) == {"BUILT"}


def test_a_link_in_the_place_of_a_lock_is_named_and_nobody_waits_for_it(built: Demo) -> None:
    lock = root(built) / "locks" / "store"
    lock.unlink()
    lock.symlink_to(built.source)
    refused = built.run("--force")
    assert (refused.code, f"error: {lock}: " in refused.err) == (3, True)
    assert "no store makes that: remove it" in refused.err
    lock.unlink()
    assert built.run("--force").code == 0


@pytest.mark.parametrize("name", ["objects", "work"])
def test_a_folder_of_the_store_may_be_a_link_to_another_disk(demo: Demo, name: str) -> None:
    demo.run()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
        if Path(other).stat().st_dev == demo.folder.stat().st_dev:
            pytest.skip("/dev/shm is no file system of its own here")
        folder = root(demo) / name
        moved = Path(other) / name
        shutil.copytree(folder, moved) if folder.exists() else moved.mkdir()
        shutil.rmtree(folder, ignore_errors=True)
        folder.symlink_to(moved)
        demo.source.write_text("other words\n")
        assert set(demo.run().outcomes.values()) == {"BUILT"}
        assert set(demo.run().outcomes.values()) == {"HIT"}
        damaged = next(path for path in (root(demo) / "objects").glob("*/*") if path.read_bytes() == b"other words\n")
        damaged.chmod(0o644)
        damaged.write_bytes(b"OTHER words\n")
        assert "damaged" in demo("fsck", str(demo.pipeline)).out
        assert not damaged.exists()
        assert demo.run().outcomes["read"] == "UNCHANGED"
        assert damaged.read_bytes() == b"other words\n"
        assert demo("fsck", str(demo.pipeline)).code == 0
        folder.unlink()


def test_a_working_directory_that_is_gone_is_said(built: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = built.folder / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    refused = built("status")
    assert (refused.code, "the folder that this was called in is gone; `cd` to one that is there" in refused.err) == (
        3,
        True,
    )
