"""Memoisation below a node's grain: parts outlive a kill and a failure, are verified, shared and counted."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from stagegraph import registry, store
from stagegraph.digest import digest_file
from stagegraph.index import Index
from stagegraph.memo import Memo
from stagegraph.store import Store
from tests.engine.conftest import Demo
from tests.engine.test_faults import start, wait_for

PARTS = '''
    """Makes one line of output for each word, each a part of its own."""
    from __future__ import annotations
    import os, time
    from dataclasses import dataclass
    from fakes.counting import count
    from stagegraph.stage import Context, In, Out, Source, Stage, StageError, param, source

    class Parts(Stage):
        """Memoises by word."""
        id = "parts"

        @dataclass(frozen=True)
        class Params:
            """Parameters."""
            text: Source = source("words", include=("*.txt",))

        outputs = {"out": Out("out", "a file for each word")}

        def run(self, ctx: Context) -> None:
            (ctx.out / "out").mkdir()
            for i, word in enumerate(next(iter(ctx.source("text").files.values())).read_text().split()):
                target = ctx.out / "out" / f"{i}.txt"
                part = ctx.recall("word", {"word": word})
                if part is not None:
                    os.link(part.path, target)
                    assert part.facts == {"letters": len(word)}
                    continue
                if word == "FAIL":
                    raise StageError("FAIL")
                if word == "sleep" and "LINGER" in os.environ:
                    count("sleeping")
                    time.sleep(60)
                target.write_text(word)
                assert ctx.remember("word", {"word": word}, target, letters=len(word)).path.read_text() == word
                count(word)
'''
PIPELINE = """\
version: 1
name: demo
stages:
  parts: {with: {text: words}}
"""


@pytest.fixture
def parts(demo: Demo, monkeypatch: pytest.MonkeyPatch) -> Demo:
    (demo.package / "parts.py").write_text(textwrap.dedent(PARTS).lstrip())
    demo.pipeline.write_text(PIPELINE)
    monkeypatch.setattr(registry, "SHIPPED", {"parts": "fakes.parts:Parts"})
    return demo


def counted(result) -> dict[str, int]:
    return result.json["nodes"][0]["parts"]["word"]


def object_of(demo: Demo, text: str) -> Path:
    found = demo.folder.joinpath("artifacts", ".stagegraph", "objects").rglob("*")
    return next(p for p in found if p.is_file() and p.read_text() == text)


def test_only_changed_parts_are_made_and_counted(parts: Demo) -> None:
    assert counted(parts.run()) == {"made": 3, "reused": 0}
    assert parts.counts == ["here", "some", "words"]
    parts.source.write_text("some other words")
    assert counted(parts.run()) == {"made": 1, "reused": 2}
    assert parts.counts == ["other"]
    assert [p.read_text() for p in sorted(parts.path("parts", "out").iterdir())] == ["some", "other", "words"]
    table = parts("run", str(parts.pipeline), "--force").out
    assert "word: 3 made, 0 reused" in table  # --force says whether the result is the same: it must not be looked up
    assert parts.counts == ["other", "some", "words"]
    assert "parts  word: 3 made, 0 reused" in parts("show", "parts", str(parts.pipeline)).out
    assert parts("fsck", str(parts.pipeline)).code == 0


def test_parts_outlive_a_failure_and_a_kill(parts: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    parts.source.write_text("one two FAIL")
    assert parts.run().code == 1
    assert parts.counts == ["one", "two"]
    parts.source.write_text("one two three sleep four")
    monkeypatch.setenv("LINGER", "1")
    process = start(parts)
    wait_for(parts, "sleeping")
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert parts.counts == ["sleeping", "three"]
    monkeypatch.delenv("LINGER")
    assert counted(parts.run()) == {"made": 2, "reused": 3}
    assert parts.counts == ["four", "sleep"]
    assert parts("fsck", str(parts.pipeline)).code == 0


@pytest.mark.parametrize("how", ["damaged", "removed"])
def test_a_part_that_is_not_intact_is_made_again(parts: Demo, how: str) -> None:
    parts.run()
    _ = parts.counts
    path = object_of(parts, "some")
    path.chmod(0o644)
    if how == "damaged":
        path.write_text("SOME")
    else:
        path.unlink()
    parts.source.write_text("some more words")
    result = parts.run()
    assert counted(result) == {"made": 2, "reused": 1}
    assert len(result.json["damaged"]) == (how == "damaged")
    assert parts.path("parts", "out", "0.txt").read_text() == "some"
    assert parts("fsck", str(parts.pipeline)).code == 0


def test_fsck_names_a_lost_part(parts: Demo) -> None:
    parts.run()
    object_of(parts, "some").unlink()
    result = parts("fsck", str(parts.pipeline))
    assert result.code == 3
    assert "memoised word" in result.out


@pytest.fixture
def memo(tmp_path: Path) -> Iterator[Memo]:
    index = Index(tmp_path / "index")
    yield Memo(Store(tmp_path, index))
    index.close()


def test_a_part_on_another_file_system_is_copied(memo: Memo) -> None:
    beside = Path(tempfile.mkdtemp(dir="/dev/shm"))
    try:
        (beside / "part").write_text("some")
        if beside.stat().st_dev == memo.remember("part", {"n": 0}, beside / "part").path.stat().st_dev:
            pytest.skip("/dev/shm is no file system of its own here")
    finally:
        shutil.rmtree(beside)
    found = memo.recall("part", {"n": 0})
    assert found is not None
    assert found.path.read_text() == "some"
    assert list(found.path.parent.iterdir()) == [found.path]


def test_several_parts_are_remembered_at_once(memo: Memo, tmp_path: Path) -> None:
    files = [tmp_path / f"{i}" for i in range(3)]
    for number, file in enumerate(files):
        file.write_text(f"part {number}")
    parts = [({"n": number}, file, digest_file(file), {"is": number}) for number, file in enumerate(files)]
    memo.remember_all("part", parts)
    elsewhere = Memo(Store(tmp_path, Index(tmp_path / "index")))
    for number in range(3):
        found = elsewhere.recall("part", {"n": number})
        assert found is not None
        assert (found.path.read_text(), found.facts) == (f"part {number}", {"is": number})
    assert memo.counts["part"] == {"made": 3, "reused": 0}
    memo.remember_all("part", [])
    assert elsewhere.counts["part"] == {"made": 0, "reused": 3}


@pytest.mark.parametrize("links", [True, False], ids=["linked", "copied"])
def test_rivals_that_remember_the_same_part(memo: Memo, tmp_path: Path, links: bool, monkeypatch) -> None:
    """Threads stand for runs: every one keeps a whole file, and one intact object remains."""
    if not links:
        monkeypatch.setattr(store, "_hardlink", lambda source, target: False)
    files = [tmp_path / f"{i}" for i in range(8)]
    for file in files:
        file.write_bytes(b"x" * 100_000)
    threads = [threading.Thread(target=memo.remember, args=("part", {"n": 1}, file)) for file in files]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = memo.recall("part", {"n": 1})
    assert found is not None
    assert found.path.read_bytes() == b"x" * 100_000
    assert [file.read_bytes() for file in files] == [b"x" * 100_000] * 8
    assert memo.recall("part", {"n": 2}) is None
    assert memo.counts["part"] == {"made": 8, "reused": 1}
