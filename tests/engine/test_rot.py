"""Objects whose content rots while their stat stays: found when they are read, before anything is made of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from stagegraph.digest import stat_id
from stagegraph.store.objects import RottenError
from stagegraph.store.workspace import Workspace
from tests.engine.test_damage import flipped, root, shown
from tests.support.demo import Demo


def object_with(demo: Demo, text: str) -> Path:
    return next(p for p in (root(demo) / "objects").rglob("*") if p.is_file() and p.read_text() == text)


def rot(demo: Demo, path: Path) -> None:
    """Flip a bit of an object. That changes its stat here, so the index is told that it has always been this one."""
    path.chmod(0o644)
    path.write_bytes(flipped(path.read_bytes(), 3))
    path.chmod(0o444)
    workspace = Workspace(demo.folder / "artifacts")
    index, now = workspace.index, list(stat_id(path))
    index.set(f"obj:{path.name}", now)
    for name in index.names("mat:"):
        state = index.get(name)
        if path.name in state["objects"]:
            index.set(name, state | {"objects": state["objects"] | {path.name: now}})
    assert workspace.store.verify(path.name) is None
    workspace.close()


@pytest.fixture(params=[0, 1 << 30], ids=["linked", "copied"])
def built(demo: Demo, request, monkeypatch) -> Demo:
    monkeypatch.setattr("stagegraph.store.objects.HARDLINK_FROM", request.param)
    assert demo.run().code == 0
    demo.counts  # noqa: B018
    return demo


def test_no_stage_reads_it_and_its_maker_runs_again(built: Demo) -> None:
    rot(built, object_with(built, "some words here\n"))
    assert set(built.run().outcomes.values()) == {"HIT"}  # nothing reads it
    built.edit("shapes", "getattr(importlib", "1 and getattr(importlib")
    result = built.run()
    assert result.code == 0
    reasons = {n["node"]: n["reason"] for n in result.json["nodes"]}
    assert reasons["read"] == "stored words.txt was damaged"
    assert result.outcomes == {
        "read": "UNCHANGED",
        "shape[line]": "UNCHANGED",
        "shape[column]": "UNCHANGED",
        "join": "HIT",
    }
    assert built.counts == ["read", "shape[column]", "shape[line]"]
    assert built.path("join", "joined.txt").read_text() == "column=some\nwords\nhere-line=some words here3"
    assert built.path("read", "words.txt").read_text() == "some words here\n"
    assert built("fsck", str(built.pipeline)).code == 0


HANDED_ON = """\
version: 1
name: demo
vars: {mark: a}
stages:
  first: {uses: shell, with: {cmd: "echo words > ${out.a}", outputs: {a: a.txt}}}
  second: {uses: shell, with: {cmd: "cp ${in.a} ${out.b}", inputs: {a: first.a}, outputs: {b: b.txt}}}
  third:
    uses: shell
    with: {cmd: "cat ${in.b} > ${out.c}; echo ${vars.mark} >> ${out.c}", inputs: {b: second.b}, outputs: {c: c.txt}}
"""


def test_the_node_that_an_object_was_handed_on_from_makes_it_again(demo: Demo) -> None:
    """The one in between, which gave the same object away, cannot be made of it and need not be."""
    demo.pipeline.write_text(HANDED_ON)
    demo.run()
    rot(demo, object_with(demo, "words\n"))
    result = demo.run("--set", "mark=b")
    assert result.outcomes == {"first": "UNCHANGED", "second": "HIT", "third": "BUILT"}, result.err
    assert demo.path("third", "c.txt").read_text() == "words\nb\n"
    assert demo("fsck", str(demo.pipeline)).code == 0


def test_it_is_not_shown_as_an_output(built: Demo) -> None:
    before = shown(built)
    built.run("--set", "vars.glue=+")
    rot(built, object_with(built, before["join/joined.txt"].decode()))
    built.counts  # noqa: B018
    assert built.run().outcomes["join"] in {"BUILT", "UNCHANGED"}
    assert (built.counts, shown(built)) == (["join"], before)


def test_what_was_made_again_takes_its_place(built: Demo) -> None:
    path = object_with(built, "some words here\n")
    rot(built, path)
    assert built.run("--stage", "read", "--force").code == 0
    assert path.read_text() == "some words here\n"


def test_no_verb_prints_it(built: Demo) -> None:
    rot(built, object_with(built, "a page\n"))
    said = built("show", "read", str(built.pipeline), "--view", "page")
    assert (said.code, "page is damaged in the store" in said.err) == (3, True)


def test_an_object_that_rots_whenever_it_is_written_fails_its_reader(built: Demo, monkeypatch) -> None:
    from stagegraph.store import objects as store

    digest = object_with(built, "some words here\n").name

    def place(self: store.Store, wanted: str, target: Path, *, known: bool = False) -> bool:
        if wanted == digest and not known:
            raise RottenError(digest)
        return real(self, wanted, target, known=known)

    real = store.Store.place
    monkeypatch.setattr(store.Store, "place", place)
    built.edit("line", '" ".join', '"_".join')
    result = built.run()
    assert result.code == 1
    assert "was damaged again" in str(result.json)


@pytest.mark.parametrize("odd", ["directory", "fifo", "mode"])
def test_what_cannot_be_read_in_an_objects_place_is_replaced(built: Demo, odd: str, monkeypatch) -> None:
    import os

    from stagegraph.store import objects as store

    path = object_with(built, "some words here\n")
    path.unlink()
    if odd == "directory":
        (path / "x").mkdir(parents=True)
    elif odd == "fifo":
        os.mkfifo(path)
    else:
        path.touch(0o000)
        read = store.digest_file

        def refused(file: Path, *rest: object) -> str:
            if Path(file).stat().st_mode & 0o777 == 0:
                raise PermissionError(13, "Permission denied", str(file))
            return read(file, *rest)

        monkeypatch.setattr(store, "digest_file", refused)  # root reads everything
    result = built.run()
    assert (result.code, built.counts) == (0, ["read"])
    assert path.read_text() == "some words here\n"
    assert set(built.run().outcomes.values()) == {"HIT"}


def test_a_check_after_a_run_with_large_outputs_finds_nothing_to_do(demo: Demo, monkeypatch) -> None:
    """Links to an object move its ctime, also that of the output that is one of them."""
    monkeypatch.setattr("stagegraph.store.objects.HARDLINK_FROM", 0)
    for _ in range(2):
        assert demo.run().code == 0
        assert demo("status", str(demo.pipeline), "--check").code == 0


def test_a_folder_in_the_place_of_a_log_makes_room_for_it(built: Demo, monkeypatch) -> None:
    from stagegraph.store.workspace import Workspace

    monkeypatch.setattr(Workspace, "log_path", lambda self, key: self.root / "logs" / "d")
    (root(built) / "logs" / "d").mkdir(exist_ok=True)
    result = built.run("--force", "--stage", "read")
    assert result.code == 0, result.err
    assert (root(built) / "logs" / "d").is_file()


def test_a_full_log_costs_no_node(built: Demo, monkeypatch) -> None:
    from stagegraph.store.workspace import Workspace

    (root(built) / "full").symlink_to("/dev/full")
    monkeypatch.setattr(Workspace, "log_path", lambda self, key: self.root / "full")
    result = built.run("--force", "--stage", "read")
    assert "ended with status" not in str(result.json)
    assert result.code == 0 or "No space left" in str(result.json)


def test_a_huge_number_of_jobs(built: Demo) -> None:
    assert built.run("-j", str(10**12), "--dry-run", "--force").code == 0
    assert built.run("-j", str(10**12)).code == 0
