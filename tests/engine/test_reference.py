"""A path or a reference: what exists is a path, a result is found by every name it has, an earlier one put aside."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest

from stagegraph.cli.reference import folder
from stagegraph.errors import PlanError
from tests.support.demo import Demo


@pytest.fixture
def args(demo: Demo, monkeypatch) -> argparse.Namespace:
    demo.run()
    monkeypatch.chdir(demo.folder)
    return argparse.Namespace(file=str(demo.pipeline), overrides=[])


@pytest.mark.parametrize("name", ["shape[line]", "shape.line", "shape.l*", "shape[line]:laid"])
def test_a_result_is_where_its_node_shows_it(args, name: str) -> None:
    with folder(args, Path(name)) as found:
        assert found.is_relative_to(Path("artifacts").absolute())
        assert [p.name for p in found.rglob("*") if p.is_file()] == ["text"]
        assert ".stagegraph" not in found.parts


def test_an_earlier_result_is_put_aside_meanwhile(args, demo: Demo) -> None:
    shown = demo.folder / "artifacts" / "demo" / "read" / "words.txt"
    before = shown.read_text()
    next((demo.folder / "words").glob("*.txt")).write_text("other words")
    demo.run()
    assert shown.read_text() != before
    with folder(args, Path("read@~1:words.txt")) as found:
        assert found.read_text() == before
    assert not found.exists()


def test_what_exists_is_a_path(args) -> None:
    Path("read").mkdir()
    with folder(args, Path("read")) as found:
        assert found == Path("read")


@pytest.mark.parametrize("name", ["some/where", "/tmp/none"])
def test_what_can_only_be_a_path_is_left_to_the_verb(args, name: str) -> None:
    with folder(args, Path(name)) as found:
        assert found == Path(name)


def test_without_a_pipeline_there_are_only_paths(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with folder(argparse.Namespace(file="pipeline.yaml", overrides=[]), Path("read")) as found:
        assert found == Path("read")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raed", "raed: no such file or directory, and no node is named 'raed'; did you mean 'read'?"),
        ("shape.lime", "did you mean 'shape.line'?"),
        ("shape", "'shape' means shape[line], shape[column]: name one of them"),
        ("read:nothing", "has no file 'nothing'"),
    ],
)
def test_what_a_name_is_not_is_said(args, name: str, message: str) -> None:
    with pytest.raises(PlanError, match=re.escape(message)), folder(args, Path(name)):
        pass
