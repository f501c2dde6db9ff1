"""Cleaning up: what goes, what stays, and that a run beside it loses nothing."""

from __future__ import annotations

import io
import shutil
import subprocess
import time
from types import SimpleNamespace

import pytest

from stagegraph import Pipeline
from stagegraph.query import removal
from stagegraph.store.index import Index
from stagegraph.store.leftovers import disk_bytes
from stagegraph.store.pins import Pin, pinned
from stagegraph.store.workspace import Workspace
from tests.engine.test_faults import start, wait_for
from tests.support.demo import Demo


def glue(demo: Demo, *values: str) -> list[str]:
    """Run with each value in turn; return what was executed."""
    demo.counts  # noqa: B018
    for value in values:
        assert demo.run("--set", f"vars.glue={value}").code == 0
    return demo.counts


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def gc(demo: Demo, *argv: str) -> dict:
    result = demo("gc", str(demo.pipeline), "--json", *argv)
    assert result.code == 0, result.err
    return result.json


def test_results_of_the_last_runs_stay(demo: Demo) -> None:
    glue(demo, "a", "b", "c", "d")
    foretold = gc(demo, "--keep-runs", "2", "--dry-run")
    removed = gc(demo, "--keep-runs", "2")
    assert {**foretold, "dry_run": False} == removed
    assert [item["what"] for item in removed["removed"]] == ["demo/join", "demo/join"]
    assert removed["freed_bytes"] > 0
    assert glue(demo, "c") == []
    demo.run("--set", "vars.glue=a")
    assert demo.counts == ["join"]
    assert gc(demo, "--keep-runs", "100")["removed"] == []


def test_what_a_kept_run_had_from_before_stays(demo: Demo) -> None:
    """The state as of a run includes results it found in place."""
    demo.run()
    glue(demo, "b")
    demo.source.write_text("other words\n")
    glue(demo, "b")
    gc(demo, "--keep-runs", "2")
    with Pipeline(demo.pipeline) as pipeline:
        assert pipeline.artifact("read@~1:words.txt").read_text("words.txt") == "some words here\n"


def test_what_artifacts_show_is_never_removed(demo: Demo) -> None:
    glue(demo, "a", "b")
    other = demo.folder / "other.yaml"
    other.write_text(demo.pipeline.read_text().replace("name: demo", "name: other"))
    assert demo("run", str(other), "--set", "vars.glue=z").code == 0
    demo.counts  # noqa: B018
    removed = gc(demo, "--keep-runs", "0", "--max-size", "0B")
    assert "larger than --max-size" in removed["notes"][0]
    assert glue(demo, "b") == []
    demo("run", str(other), "--set", "vars.glue=z")
    assert demo.counts == []
    assert demo("fsck", str(demo.pipeline)).code == 0
    demo.path("join", "joined.txt").unlink()
    glue(demo, "b")
    assert demo.path("join", "joined.txt").read_text().count("b") == 1


def test_results_of_a_renamed_pipeline_go_with_the_second_gc(demo: Demo) -> None:
    glue(demo, "a")
    text = demo.pipeline.read_text()
    demo.pipeline.write_text(text.replace("name: demo", "name: fresh"))
    demo.edit("join", 'count("join")', 'count("join"); print("two")')
    demo.run("--set", "vars.glue=b")
    foretold = gc(demo, "--dry-run")
    for _ in range(2):  # saying marks nothing
        assert gc(demo, "--dry-run") == foretold
    first = gc(demo)
    assert first["removed"] == foretold["removed"] == []
    (note,) = first["notes"]
    assert note.startswith("no pipeline file here is named 'demo': its results are kept this time, and the next gc")
    second = gc(demo)
    assert [item["what"] for item in second["removed"]] == ["demo/join"]  # the other results are the new pipeline's too
    assert gc(demo)["removed"] == gc(demo)["notes"] == []
    assert demo("fsck", str(demo.pipeline)).code == 0
    demo.counts  # noqa: B018
    demo.run("--set", "vars.glue=b")
    assert demo.counts == []


@pytest.mark.parametrize("how", ["comes back", "JSON", "a file that cannot be read"])
def test_results_of_a_pipeline_that_may_have_a_file_stay(demo: Demo, how: str) -> None:
    glue(demo, "a")
    text = demo.pipeline.read_text()
    other = demo.folder / "other.yaml"
    demo.pipeline.write_text(text.replace("name: demo", "name: fresh"))
    if how == "comes back":
        assert "no pipeline file" in gc(demo)["notes"][0]
        other.write_text(text)
        assert gc(demo)["notes"] == []
        other.unlink()
    elif how == "JSON":
        other.write_text(f'{{"extends": "{demo.pipeline.name}", "name": "demo"}}')
    else:
        other.write_text("name: demo\nstages: [")
    assert gc(demo)["removed"] == []
    if how != "comes back":
        assert gc(demo)["removed"] == []


def test_the_oldest_go_first_until_it_fits(demo: Demo) -> None:
    demo.edit("join", "ctx.params.glue.join(parts)", "ctx.params.glue * 1000 + ctx.params.glue.join(parts)")
    glue(demo, "a", "b", "c", "d")
    held = demo("du", str(demo.pipeline), "--json").json["bytes"]
    removed = gc(demo, "--max-size", f"{held - 1500}B")
    assert len(removed["removed"]) == 2
    assert removed["left_bytes"] <= held - 1500
    assert glue(demo, "d") == []
    assert glue(demo, "a", "b", "c") == ["join", "join"]  # began within one second: any two of them are the oldest


@pytest.mark.parametrize("size", ["50gigs", "-5", "GB", "1e3", "50", "0"])
def test_sizes_are_checked(demo: Demo, size: str) -> None:
    result = demo("gc", str(demo.pipeline), f"--max-size={size}")
    assert (result.code, "expected a size with its unit, such as 50GB" in result.err) == (2, True)


def test_kept_source_texts_and_logs_go_with_their_results(demo: Demo) -> None:
    demo.run()
    demo.edit("join", 'count("join")', 'count("join"); print("two")')
    demo.run()
    with Pipeline(demo.pipeline) as pipeline:
        before = set(pipeline.workspace.index.names("text:"))
    gc(demo, "--keep-runs", "1")
    with Pipeline(demo.pipeline) as pipeline:
        after = set(pipeline.workspace.index.names("text:"))
        logs = list((pipeline.workspace.root / "logs").rglob("*.log"))
    assert len(before - after) == 1
    assert len(logs) == 4


def test_memoised_parts_stay_while_a_run_is_under_way_and_go_by_size_after(demo: Demo) -> None:
    demo.run()
    with Pipeline(demo.pipeline) as pipeline:
        from stagegraph.store.memo import Memo, PartCode

        memo = Memo(pipeline.workspace.store, {"tensor": PartCode("code", {})})

        file = demo.folder / "part"
        file.write_bytes(b"p" * 5000)
        memo.remember("tensor", {"a": 1}, file)
        pin = Pin(pipeline.workspace.root)
        beside = gc(demo, "--max-size", "1000B")
        pin.release()
        assert [item["kind"] for item in beside["removed"]] == []
        assert gc(demo)["removed"] == []
        after = gc(demo, "--max-size", "1000B")
        assert [(item["kind"], item["what"]) for item in after["removed"]] == [("part", "tensor")]
        assert memo.recall("tensor", {"a": 1}) is None
    assert demo("fsck", str(demo.pipeline)).code == 0


def test_a_run_beside_it_loses_nothing(demo: Demo) -> None:
    """The run has settled on results that a rival has since replaced in artifacts/; they are no run's last, either."""
    demo.pipeline.write_text(
        demo.pipeline.read_text()
        .replace("  join:", "  trouble: {with: {kind: '${vars.kind}'}}\n  join:")
        .replace("vars: {", "vars: {kind: none, ")
    )
    go = demo.folder / "go"
    waits = f'count("join"); import os, time\n        while not os.path.exists({str(go)!r}): time.sleep(0.02)'
    demo.edit("join", 'count("join")', waits)
    assert demo.run("--stage", "shape", "--stage", "trouble").code == 0
    demo.counts  # noqa: B018
    slow = start(demo, "--stage", "join", "--stage", "trouble", "--set", "vars.kind=short", "-j", "1")
    try:
        wait_for(demo, "join")
        demo.source.write_text("other words\n")
        assert demo.run("--stage", "shape").code == 0
        removed = gc(demo, "--keep-runs", "0")
    finally:
        go.touch()
    assert removed["notes"]
    assert {item["what"] for item in removed["removed"]} <= {"demo/trouble"}
    assert slow.wait() == 0
    assert gc(demo, "--keep-runs", "0")["notes"] == []
    assert demo("fsck", str(demo.pipeline)).code == 0


def test_what_comes_into_use_between_two_batches_stays(demo: Demo, monkeypatch) -> None:
    """A run takes an earlier result up again, or makes it again of objects that are to go."""
    glue(demo, "a", "b", "c", "d")
    ended = []

    def pause(_: float) -> None:
        if not ended:
            ended.append(start(demo, "--set", "vars.glue=a").wait())

    with monkeypatch.context() as patch:
        patch.setattr(removal, "BATCH_SECONDS", 0.0)
        patch.setattr(removal, "time", SimpleNamespace(sleep=pause, monotonic=time.monotonic))
        removed = gc(demo, "--keep-runs", "0")
    assert ended == [0]
    assert len([item for item in removed["removed"] if item["kind"] == "result"]) in {2, 3}
    assert demo("fsck", str(demo.pipeline)).code == 0
    demo.counts  # noqa: B018
    demo.run("--set", "vars.glue=a")
    assert demo.counts == []
    demo.run("--set", "vars.glue=b")
    assert demo.counts == ["join"]


def test_few_documents_are_removed_between_two_looks_at_the_clock(demo: Demo, monkeypatch) -> None:
    """Each is a file: all that a batch lists in its time, removed at its end, kept runs waiting for seconds."""
    glue(demo, "a", "b", "c", "d")
    together, delete_all = [], Index.delete_all
    monkeypatch.setattr(
        Index, "delete_all", lambda self, names: (together.append(len(names)), delete_all(self, names))[1]
    )
    monkeypatch.setattr(removal, "AT_ONCE", 1)
    assert len(gc(demo, "--keep-runs", "0")["removed"]) >= 3
    assert max(together) == 1


def test_records_are_gone_before_the_first_of_their_objects_goes(demo: Demo, monkeypatch) -> None:
    glue(demo, "a", "b")
    order, delete_all, unlink = [], Index.delete_all, removal._unlink

    def noted_delete(self, names):
        order.extend(name.partition(":")[0] for name in names)
        delete_all(self, names)

    def noted_unlink(path):
        order.extend(["object"] if "/objects/" in str(path) else [])
        unlink(path)

    monkeypatch.setattr(Index, "delete_all", noted_delete)
    monkeypatch.setattr(removal, "_unlink", noted_unlink)
    assert gc(demo, "--keep-runs", "0")["removed"]
    assert "object" in order
    assert "rec" in order
    assert "rec" not in order[order.index("object") :]


def test_what_is_written_together_is_one_commit_and_can_be_taken_back(tmp_path) -> None:
    (tmp_path / "index").mkdir()
    index, other = Index(tmp_path / "index"), Index(tmp_path / "index")
    index.set("memo:before", 1)
    with index.together():
        index.set("memo:a", 1)
        with index.together():
            index.set("memo:b", 2)
        assert (index.get("memo:b"), other.get("memo:b")) == (2, None)
        index.delete("memo:a")
    assert (other.get("memo:a"), other.get("memo:b")) == (None, 2)
    was = index.version()
    assert index.version() == was
    other.delete_all(["memo:b", "memo:before", "memo:none"])
    assert index.version() != was
    assert (index.get("memo:b"), index.get("memo:before")) == (None, None)


def test_claims_of_runs_that_are_gone_lapse(demo: Demo) -> None:
    root = demo.folder / "root"
    root.mkdir()
    pin = Pin(root)
    pin.add(["k1", "k2"])
    assert pinned(root) == (1, {"k1", "k2"})
    pin.release()
    (root / "running" / "1-1").write_text("k3\n")  # as a killed run leaves it
    assert pinned(root) == (0, set())
    assert list((root / "running").iterdir()) == []


def test_du_counts_each_object_once(demo: Demo) -> None:
    demo.run()
    glue(demo, "b")
    found = demo("du", str(demo.pipeline), "--json").json
    entries = {entry["what"]: entry["bytes"] for entry in found["entries"]}
    objects = sum(p.stat().st_size for p in (demo.folder / "artifacts/.stagegraph/objects").rglob("*") if p.is_file())
    assert found["bytes"] == objects
    told = subprocess.run(["du", "-s", "-B1", "artifacts"], cwd=demo.folder, capture_output=True, text=True, check=True)
    disk, copies = disk_bytes(Workspace(demo.folder / "artifacts"))
    assert disk == int(told.stdout.split()[0]) <= found["disk_bytes"]  # which counts what an open index needs
    assert 0 < copies < disk
    assert sum(size for what, size in entries.items() if not what.startswith(".stagegraph")) == objects
    assert "earlier results" in entries
    assert found["gc_frees"] == 0
    assert "`pipeline gc` would free 0 B" in demo("du", str(demo.pipeline)).out


def test_what_the_pipeline_files_need_as_they_stand_stays(demo: Demo) -> None:
    """However many runs with other settings came since, of this pipeline or of another file that has its name."""
    demo.run()
    demo("run", str(demo.pipeline), "--set", "vars.glue=z", "--set", "vars.shapes=[line]")
    other = demo.folder / "other.yaml"
    other.write_text(demo.pipeline.read_text().replace('glue: "-"', "glue: y"))
    demo("run", str(other))
    (demo.folder / "compose.yaml").write_text("services: {}\n")
    glue(demo, "a", "b")
    removed = gc(demo, "--keep-runs", "0", "--max-size", "0B")
    assert [item["what"] for item in removed["removed"]] == ["demo/join", "demo/join"]
    assert "compose" not in str(removed["notes"])
    demo.run()
    demo("run", str(other))
    assert demo.counts == []
    broken = demo.folder / "broken.yaml"
    broken.write_text("version: 1\nname: x\nstages: {read: {with: {text: nowhere}}}\n")
    assert "broken.yaml cannot be planned" in gc(demo)["notes"][-1]


def test_nothing_goes_where_what_names_things_is_damaged(demo: Demo) -> None:
    glue(demo, "a", "b")
    root = demo.folder / "artifacts" / ".stagegraph"

    def refused(said: str) -> None:
        result = demo("gc", str(demo.pipeline), "--keep-runs", "0", "--max-size", "0B")
        assert (result.code, said in result.err, "nothing was removed" in result.err) == (3, True, True), result.err

    objects = sorted((root / "objects").rglob("*"))
    record = next(p for p in (root / "records").rglob("*") if p.is_file())
    good = record.read_bytes()
    record.write_bytes(good[:-1])
    refused("1 records or parts are damaged")
    assert demo("fsck", str(demo.pipeline)).code == 3
    record.write_bytes(good)
    assert demo("fsck", str(demo.pipeline)).code == 0
    database = root / "index" / "cache.db"
    intact = database.read_bytes()
    database.write_bytes(intact[:4096] + b"\x55" * (len(intact) - 4096))
    refused("damaged")
    shutil.rmtree(root / "index", ignore_errors=True)
    (root / "journal.jsonl").unlink()
    refused("nothing says which results are in use")
    assert sorted((root / "objects").rglob("*")) == objects
    glue(demo, "b")
    assert demo("gc", str(demo.pipeline)).code == 0


def test_fsck_repairs_what_names_things(demo: Demo) -> None:
    demo.run()
    demo.counts  # noqa: B018
    root = demo.folder / "artifacts" / ".stagegraph"
    record = next(p for p in (root / "records").rglob("*") if p.is_file())
    record.write_bytes(b"{}")
    database = root / "index" / "cache.db"
    database.write_bytes(database.read_bytes()[:4096] + b"\x55" * 40960)
    found = demo("fsck", str(demo.pipeline), "--json")
    assert (found.code, len(found.json["problems"])) == (3, 2)
    assert demo("fsck", str(demo.pipeline), "--repair").code == 3
    assert demo("fsck", str(demo.pipeline)).out.endswith("all intact\n")
    assert demo.run().code == 0
    assert len(demo.counts) == 1


def test_fsck_puts_source_texts_into_an_index_that_is_begun_anew(demo: Demo) -> None:
    demo.run()
    database = demo.folder / "artifacts" / ".stagegraph" / "index" / "cache.db"
    database.write_bytes(database.read_bytes()[:4096] + b"\x55" * 40960)
    said = demo("fsck", str(demo.pipeline), "--repair")
    assert "the index is begun anew, with the source texts behind 4 results as they stand" in said.out
    demo.edit("read", "text.upper()", "text.title()")
    assert "function Read.run" in demo("explain", "read", str(demo.pipeline)).out


def test_what_was_left_behind_goes(demo: Demo) -> None:
    demo.run()
    root = demo.folder / "artifacts" / ".stagegraph"
    demo.source.write_text("FAIL")
    assert demo.run().code == 1
    for name in ("quarantine/x", "work/abc/1/out/half", "index.damaged-1/cache.db", "objects/ab/.copy", "locks/abc"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("left")
    said = {item["name"] for item in gc(demo)["removed"] if item["kind"] == "leftover"}
    assert said >= {"quarantine/x", "work/abc", "index.damaged-1", "objects/ab/.copy"}
    assert not [name for name in said if name.startswith("failed/")]  # the last failure of a node stays
    demo.source.write_text("some words here\n")
    assert demo.run().code == 0
    assert "failed/demo/read" in {item["name"] for item in gc(demo)["removed"]}
    assert [p.name for p in (root / "locks").iterdir()] == ["store"]
    assert gc(demo)["removed"] == []
    assert set(demo.run().outcomes.values()) == {"HIT"}


def test_what_a_killed_run_left_goes_with_what_it_claimed(demo: Demo) -> None:
    """Its claim is removed by whoever looks, which is not taken for a run that began or ended meanwhile."""
    demo.run()
    root = demo.folder / "artifacts" / ".stagegraph"
    (root / "work" / "abc" / "1").mkdir(parents=True)
    (root / "running" / "17779-1796015097584388498").write_text("c1" * 32 + "\n")
    assert "work/abc" in {item["name"] for item in gc(demo)["removed"]}
    assert not (root / "work" / "abc").exists()
    assert not [*(root / "running").iterdir()]


@pytest.mark.parametrize(("answer", "gone"), [("n", 0), ("", 0), ("y", 1)])
def test_it_asks_on_a_terminal(demo: Demo, answer: str, gone: int, monkeypatch) -> None:
    glue(demo, "a", "b")
    demo.run()
    records = demo.folder / "artifacts" / ".stagegraph" / "records"
    before = len(list(records.glob("*/*")))
    monkeypatch.setattr("sys.stdin", Terminal(f"{answer}\n"))
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    said = demo("gc", str(demo.pipeline), "--keep-runs", "1")
    monkeypatch.undo()
    assert (said.code, "demo/join" in said.out) == (0, True)
    assert said.out.count("? [y/N]") == 1
    assert before - len(list(records.glob("*/*"))) == 2 * gone
