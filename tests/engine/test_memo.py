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
from typing import Any

import pytest

from stagegraph.digest import digest_file, stat_id
from stagegraph.store import objects as store
from stagegraph.store.index import Index
from stagegraph.store.memo import Memo, PartCode
from stagegraph.store.objects import Store
from tests.engine.test_faults import start, wait_for
from tests.support.demo import Demo, provide

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
        parts = {"word": "fakes.parts"}

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
CODES = {"part": PartCode("code", {})}
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
    provide(monkeypatch, {"parts": "fakes.parts:Parts"})
    return demo


def counted(result) -> dict[str, int]:
    counts = result.json["nodes"][0]["parts"]["word"]
    assert len(counts.pop("code")) == 64
    return counts


def object_of(demo: Demo, text: str) -> Path:
    found = demo.folder.joinpath("artifacts", ".stagegraph", "objects").rglob("*")
    return next(p for p in found if p.is_file() and p.read_text() == text)


def test_only_changed_parts_are_made_and_counted(parts: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # of the table below
    assert counted(parts.run()) == {"made": 3, "reused": 0}
    assert parts.counts == ["here", "some", "words"]
    parts.source.write_text("some other words")
    assert counted(parts.run()) == {"made": 1, "reused": 2}
    assert parts.counts == ["other"]
    assert [p.read_text() for p in sorted(parts.path("parts", "out").iterdir())] == ["some", "other", "words"]
    table = parts("run", str(parts.pipeline), "--force", "-v").out
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


def test_parts_are_good_for_the_code_that_made_them(parts: Demo) -> None:
    assert counted(parts.run()) == {"made": 3, "reused": 0}
    module = parts.package / "parts.py"
    text = module.read_text()
    module.write_text(
        text.replace("target.write_text(word)", "target.write_text(word.upper())").replace(" == word", "")
    )
    assert counted(parts.run()) == {"made": 3, "reused": 0}
    assert parts.path("parts", "out", "0.txt").read_text() == "SOME"
    assert counted(parts.run("--force")) == {"made": 3, "reused": 0}
    module.write_text(text)
    parts.source.write_text("some more words")
    assert counted(parts.run()) == {"made": 1, "reused": 2}
    assert parts.path("parts", "out", "0.txt").read_text() == "some"


def test_a_kind_that_no_module_is_declared_to_make_is_the_stages_bug(parts: Demo) -> None:
    module = parts.package / "parts.py"
    text = module.read_text()
    module.write_text(text.replace('parts = {"word": "fakes.parts"}', "parts = {}"))
    result = parts.run()
    assert result.code == 1
    assert "'word' is no kind of part that the stage declares (Stage.parts)" in result.json["nodes"][0]["problems"][0]


def test_parts_are_made_by_a_module_of_the_stage(parts: Demo) -> None:
    """An edit of any other would leave the node a hit."""
    module = parts.package / "parts.py"
    module.write_text(module.read_text().replace('"word": "fakes.parts"', '"word": "fakes." + "other"'))
    result = parts("run", str(parts.pipeline))
    assert result.code == 2
    assert "stage 'parts': fakes.other makes its parts 'word', but it uses no such module" in result.err


def test_what_is_not_deterministic_is_said_and_kept_apart(parts: Demo) -> None:
    """A clock in a part: made again under its name, it differs, and another key still gets the first one."""
    module = parts.package / "parts.py"
    text = module.read_text().replace("target.write_text(word)", "target.write_text(f'{word} {time.time_ns()}')")
    module.write_text(text.replace(" == word", ""))
    parts.run()
    first = parts.path("parts", "out", "0.txt").read_text()
    node = parts.run("--force").json["nodes"][0]
    assert node["reason"] == "forced; the result differs"
    forced = parts.path("parts", "out", "0.txt").read_text()
    assert forced != first
    said = parts("show", "parts", str(parts.pipeline)).out
    assert "made again, word 0.txt, word 1.txt, word 2.txt differ from what is kept" in said
    assert "made again from the same key, the result differs: the stage is not deterministic" in said
    parts.source.write_text("some more words")
    assert counted(parts.run()) == {"made": 1, "reused": 2}
    assert parts.path("parts", "out", "0.txt").read_text() == first
    assert "not deterministic" not in parts("show", "parts", str(parts.pipeline)).out
    assert parts("fsck", str(parts.pipeline)).code == 0


def test_what_edited_code_made_is_kept_for_its_run_alone(tmp_path: Path) -> None:
    """The code was edited after it was digested: nobody knows which of both was imported."""
    source = tmp_path / "module.py"
    source.write_text("x = 1")
    index = Index(tmp_path / "index")
    code = PartCode("code", {str(source): stat_id(source)})
    memo = Memo(Store(tmp_path, index), {"part": code})
    (tmp_path / "one").write_text("one")
    memo.remember("part", {"n": 1}, tmp_path / "one")
    source.write_text("x = 2")
    (tmp_path / "two").write_text("two")
    assert memo.remember("part", {"n": 2}, tmp_path / "two").path.read_text() == "two"
    assert memo.recall("part", {"n": 1}) is not None
    assert memo.recall("part", {"n": 2}) is None
    index.close()


def test_a_part_that_was_lost_may_be_made_otherwise(memo: Memo, tmp_path: Path) -> None:
    for text in ("one", "two", "three"):
        (tmp_path / text).write_text(text)
        path = memo.remember("part", {"n": 1}, tmp_path / text).path
        if text == "one":
            path.unlink()
    found = memo.recall("part", {"n": 1})
    assert found is not None
    assert found.path.read_text() == "two"
    (said,) = memo.warnings()
    assert said.startswith("made again, part three differ from what is kept for the same code and inputs")


def test_fsck_names_a_lost_part(parts: Demo) -> None:
    parts.run()
    object_of(parts, "some").unlink()
    result = parts("fsck", str(parts.pipeline))
    assert result.code == 3
    assert "memoised word" in result.out


@pytest.fixture
def memo(tmp_path: Path) -> Iterator[Memo]:
    index = Index(tmp_path / "index")
    yield Memo(Store(tmp_path, index), CODES)
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


@pytest.mark.parametrize(
    "odd", [{"digest": "./../mine"}, {"digest": None}, {"size": "3"}, {"facts": []}, {"schema": 2}]
)
def test_an_entry_that_names_no_object_is_no_part(memo: Memo, tmp_path: Path, odd: dict[str, Any]) -> None:
    """The file that it leads to would be moved to quarantine, as its content has another digest."""
    mine = tmp_path / "mine"
    mine.write_text("mine")
    (tmp_path / "part").write_text("part")
    memo.remember("part", {"n": 1}, tmp_path / "part")
    (name,) = memo._store.index.names("part:")
    memo._store.index.set(name, memo._store.index.get(name) | odd)
    assert memo.recall("part", {"n": 1}) is None
    assert mine.read_text() == "mine"


def test_several_parts_are_remembered_at_once(memo: Memo, tmp_path: Path) -> None:
    files = [tmp_path / f"{i}" for i in range(3)]
    for number, file in enumerate(files):
        file.write_text(f"part {number}")
    parts = [({"n": number}, file, digest_file(file), {"is": number}) for number, file in enumerate(files)]
    memo.remember_all("part", parts)
    elsewhere = Memo(Store(tmp_path, Index(tmp_path / "index")), CODES)
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
