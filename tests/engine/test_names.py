"""Names of nodes with dots: on the command line, of directories, and of those that earlier versions left."""

from __future__ import annotations

import itertools

import pytest

from stagegraph.files import dotted, typed
from stagegraph.spec.model import fits
from tests.support.demo import PIPELINE, Demo

TWO = PIPELINE.replace("join: {", "join: {foreach: {os: [linux, mac], version: ['3.11', '3.12']}, ")


@pytest.mark.parametrize(
    ("name", "folder"),
    [("a", "a"), ("a[x]", "a.x"), ("a[x,y]", "a.x.y"), ("a[3.11]", "a.3.11"), ("a[x,3.11]", "a[x,3.11]")],
)
def test_dotted(name: str, folder: str) -> None:
    assert dotted(name) == folder
    assert typed(name) == (f"'{name}'" if "[" in folder else folder)


def test_no_two_nodes_of_an_entry_share_a_directory() -> None:
    values = ["x", "y", "x.y", "y.x", "x.x"]
    names = [f"a[{','.join(each)}]" for each in itertools.product(values, repeat=2)]
    assert len({dotted(name) for name in names}) == len(names)


@pytest.mark.parametrize(
    ("pattern", "values", "fit"),
    [
        ("[x,y]", "xy", True), ("[x, *]", "xy", True), ("[x]", "xy", False), ("[*]", "xy", True), ("[*]", "", False),
        (".x.y", "xy", True), (".x,y", "xy", True), (".*.y", "xy", True), (".x.*", "xy", True), (".x", "xy", False),
        (".*", "xy", True), (".y.x", "xy", False), (".x", "x", True), (".x", "", False),
    ],
)  # fmt: skip
def test_fits(pattern: str, values: str, *, fit: bool) -> None:
    assert fits(pattern, list(values)) is fit


def test_dots_name_nodes_wherever_brackets_do(demo: Demo) -> None:
    demo.pipeline.write_text(TWO)
    assert demo.run("--stage", "join.linux.3.11").code == 0
    assert demo.path("join[linux,3.11]", "joined.txt").exists()  # with a dot in a value the brackets stay
    assert demo.path("shape.line", "laid").is_dir()
    file = str(demo.pipeline)
    for name in ("join[linux,3.11]", "join.linux.3.11", "join.linux.*11"):
        for argv in (["show", name], ["show", f"{name}:joined.txt"], ["log", name], ["explain", name]):
            done = demo(argv[0], *argv[1:], file)
            assert done.code == 0, (argv, done.err)
        assert "joined.txt" in demo("show", f"{name}@~0", file).out
    assert "did you mean 'shape.line'?" in demo("show", "shape.lime", file).err


def test_directories_of_earlier_versions_are_renamed_and_nothing_is_written(demo: Demo) -> None:
    assert demo.run().code == 0
    new, old = demo.path("shape.line"), demo.path("shape[line]")
    inode = (new / "laid" / "deep" / "text").stat().st_ino
    new.rename(old)
    done = demo("run", str(demo.pipeline))
    assert (done.code, "restores" in done.out) == (0, False)
    assert not old.exists()
    assert (new / "laid" / "deep" / "text").stat().st_ino == inode
