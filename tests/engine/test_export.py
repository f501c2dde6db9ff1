"""Exports: real files, all or none, and never a file of anybody else gone."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import sys
from pathlib import Path

import pytest

from stagegraph import Pipeline
from stagegraph.query import export as module
from tests.support.demo import Demo


@pytest.fixture
def built(demo: Demo) -> Demo:
    assert demo.run().code == 0
    return demo


def export(demo: Demo, reference: str, target: Path | str, *options: str):
    return demo("export", reference, str(target), str(demo.pipeline), *options)


def names(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_real_files_are_written_at_once_or_not_at_all(built: Demo) -> None:
    target = built.folder / "dist" / "line"
    said = export(built, "shape[line]:laid", target)
    assert said.code == 0
    assert "1 file, " in said.out
    assert (target / "deep" / "text").read_text() == "some words here"
    assert stat.S_IMODE((target / "deep" / "text").stat().st_mode) == 0o644
    refused = export(built, "shape[line]", target)
    assert (refused.code, "exists already" in refused.err) == (2, True)
    assert export(built, "read", target, "--force").code == 0
    assert names(target) == [".stagegraph-export.json", "count.txt", "words.txt"]
    assert export(built, "read:count.txt", built.folder / "one").code == 0
    assert (built.folder / "one" / "count.txt").read_text() == "3"
    assert [p.name for p in target.parent.iterdir()] == ["line"]


def test_what_no_export_wrote_is_named_and_stays(built: Demo) -> None:
    target = built.folder / "dist"
    target.mkdir()
    (target / "thesis.tex").write_text("mine")
    refused = export(built, "read", target, "--force")
    assert (refused.code, "no export wrote thesis.tex\n" in refused.err) == (2, True)
    (target / "thesis.tex").unlink()
    assert export(built, "read", target).code == 0  # an empty directory is nobody's
    (target / "notes").mkdir()
    assert "no export wrote notes\n" in export(built, "join", target, "--force").err
    (target / "notes").rmdir()
    (target / "link").symlink_to(built.folder)
    assert "no export wrote link\n" in export(built, "join", target, "--force").err
    (target / "link").unlink()
    (target / "words.txt").write_text("mine now")
    assert "no longer as exported: words.txt\n" in export(built, "join", target, "--force").err
    assert (target / "words.txt").read_text() == "mine now"
    assert built.path("read", "words.txt").read_text() == "some words here\n"
    (target / "words.txt").unlink()
    assert export(built, "join", target, "--force").code == 0
    assert names(target) == [".stagegraph-export.json", "joined.txt"]


def test_many_files_in_the_way_are_said_in_few_lines(built: Demo) -> None:
    target = built.folder / "dist"
    target.mkdir()
    for i in range(50):
        (target / f"{i}").write_text("mine")
    refused = export(built, "read", target, "--force")
    assert len(refused.err.splitlines()) == 2
    assert "no export wrote 0, 1, 10, 11 and 46 more" in refused.err
    assert len(names(target)) == 50


@pytest.mark.parametrize("name", [".", "..", "artifacts", "artifacts/demo/join", "artifacts/new", "new/../..", "words"])
def test_nothing_that_matters_is_a_target(built: Demo, name: str, monkeypatch) -> None:
    monkeypatch.chdir(built.folder)
    before = names(built.folder)
    assert export(built, "read", name, "--force").code == 2
    assert set(before) <= set(names(built.folder))
    assert not (built.folder / "artifacts" / "new").exists()


def test_a_home_and_a_repository_are_no_targets(built: Demo, monkeypatch) -> None:
    home, repository = built.folder / "users" / "me", built.folder / "repo"
    home.mkdir(parents=True)
    (repository / ".git").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    for target, why in ((home, "home"), (home.parent, "home"), (repository, "repository"), (Path("/"), "pipeline")):
        refused = export(built, "read", target, "--force")
        assert (refused.code, why in refused.err) == (2, True)


def test_a_file_or_a_link_is_no_target(built: Demo) -> None:
    (built.folder / "link").symlink_to(built.folder / "words")
    for name in ("pipeline.yaml", "link"):
        assert "is no directory" in export(built, "read", built.folder / name, "--force").err


def test_what_is_damaged_is_not_exported(built: Demo) -> None:
    for file in (built.folder / "artifacts" / ".stagegraph" / "objects").rglob("*"):
        if file.is_file() and file.read_text() == "some words here\n":
            file.chmod(0o644)
            file.write_text("some wrong here\n")
    target = built.folder / "out"
    assert export(built, "read", target).code == 3
    assert not target.exists()
    assert not [p for p in built.folder.iterdir() if "partial" in p.name]


def test_what_was_written_is_read_back(built: Demo, monkeypatch) -> None:
    monkeypatch.setattr(
        "stagegraph.query.export.shutil.copyfile", lambda _, target: Path(target).write_text("not that")
    )
    failed = export(built, "read", built.folder / "out")
    assert (failed.code, "is not what is stored; nothing was exported" in failed.err) == (3, True)
    assert not (built.folder / "out").exists()


@pytest.mark.parametrize("exchange", [True, False], ids=["exchanged", "renamed"])
def test_a_kill_anywhere_leaves_the_old_or_the_new(built: Demo, exchange: bool, monkeypatch) -> None:
    """Killed at every call that changes a directory, in a process of its own; the next export clears what is left."""
    if not exchange:
        monkeypatch.setattr(module.ctypes, "CDLL", lambda _: None)
    target = built.folder / "dist" / "x"
    old, new = ["count.txt", "words.txt"], ["joined.txt"]
    for at in range(40):
        shutil.rmtree(target.parent, ignore_errors=True)
        assert export(built, "read", target).code == 0
        child = os.fork()
        if child == 0:
            _killed_at(at)
            with Pipeline(built.pipeline) as pipeline:
                pipeline.artifact("join").export(target, replace=True)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
        if target.exists():
            assert names(target)[1:] in (old, new)
        else:
            assert not exchange
        assert export(built, "join", target, "--force").code == 0
        assert names(target)[1:] == new
        assert [p.name for p in target.parent.iterdir()] == ["x"]
        if not os.WIFSIGNALED(status):
            break
    else:
        raise AssertionError("it never came to an end")
    assert at > 5


def _killed_at(count: int) -> None:
    """Kill this process at the ``count``-th change of a file name from now on."""
    left = [count]

    def watch(event: str, _arguments: tuple) -> None:
        if event in {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "ctypes.dlsym"}:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def test_a_file_that_comes_in_between_is_not_lost(built: Demo, monkeypatch) -> None:
    target = built.folder / "dist"
    assert export(built, "read", target).code == 0
    exchange = module._exchange

    def late(partial: Path, target: Path) -> Path:
        (target / "mine.txt").write_text("mine")
        return exchange(partial, target)

    monkeypatch.setattr(module, "_exchange", late)
    said = export(built, "join", target, "--force")
    assert (said.code, "what was added" in said.err) == (3, True)
    assert names(target)[1:] == ["joined.txt"]
    (kept,) = built.folder.glob(".dist.*")
    assert (kept / "mine.txt").read_text() == "mine"
    monkeypatch.undo()
