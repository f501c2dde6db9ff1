"""What nodes take of the machine: memory is watched, waited for and refused; a full disk costs what needs it."""

from __future__ import annotations

import errno
import json
import os
import textwrap
from pathlib import Path

import pytest

from stagegraph import registry
from stagegraph.execution import resources
from tests.support.demo import Demo

EAT = '''
    """Takes memory, itself or by a child in a session of its own."""
    from __future__ import annotations
    import mmap, os, subprocess, sys, time
    from dataclasses import dataclass
    from fakes.counting import count
    from stagegraph.stage import Context, Out, Stage, param

    HOLD = "import sys, time; block = bytearray(int(sys.argv[1]) << 20); time.sleep(float(sys.argv[2]))"

    class Eat(Stage):
        """Takes memory."""
        id = "eat"

        @dataclass(frozen=True)
        class Params:
            """Parameters."""
            mib: int = param("how much", default=1)
            how: str = param("who", default="itself")
            seconds: float = param("for how long", default=30.0)

        outputs = {"out": Out("out.txt", "a file")}

        def run(self, ctx: Context) -> None:
            count(f"eat[{ctx.params.mib}]")
            if ctx.params.how == "child":
                words = [sys.executable, "-c", HOLD, str(ctx.params.mib), str(ctx.params.seconds)]
                subprocess.run(words, start_new_session=True, check=True)
            elif ctx.params.how == "file":
                with (ctx.out / "out.txt").open("w+b") as file:
                    file.truncate(ctx.params.mib << 20)
                    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as block:
                        sum(block[i] for i in range(0, len(block), 4096))
                        time.sleep(ctx.params.seconds)
            else:
                block = bytearray(ctx.params.mib << 20)
                time.sleep(ctx.params.seconds)
            (ctx.out / "out.txt").write_text("done")
'''


@pytest.fixture
def eater(demo: Demo) -> Demo:
    (demo.package / "eat.py").write_text(textwrap.dedent(EAT).lstrip())
    registry.shipped().stages["eat"] = "fakes.eat:Eat"
    return demo


def write(demo: Demo, *entries: str) -> None:
    text = "version: 1\nname: demo\nstages:\n  read: {with: {text: words}}\n"
    demo.pipeline.write_text(text + "".join(f"  {entry}\n" for entry in entries))


@pytest.mark.parametrize("how", ["itself", "child"])
def test_a_node_over_its_declared_memory_is_stopped_and_named(eater: Demo, how: str) -> None:
    write(eater, f"eat: {{with: {{mib: 300, how: {how}}}, resources: {{memory: 150 MiB}}}}")
    result = eater.run()
    assert result.code == 1
    assert result.outcomes == {"read": "BUILT", "eat": "FAILED"}
    (problem,) = result.json["nodes"][1]["problems"]
    assert "more than its resources.memory of 150 MiB" in problem
    assert "pipeline.yaml:5:3" in problem


def test_pages_of_files_are_no_memory_of_a_node(eater: Demo) -> None:
    write(eater, "eat: {with: {mib: 300, how: file, seconds: 0.8}, resources: {memory: 150 MiB}}")
    assert eater.run().outcomes == {"read": "BUILT", "eat": "BUILT"}


def test_what_never_fits_is_said_before_anything_ran_and_what_is_done_needs_no_room(eater: Demo, monkeypatch) -> None:
    few = "eat: {with: {seconds: 0}, resources: {memory: 900 MiB}}"
    write(eater, few, "more: {uses: eat, with: {mib: 2, seconds: 0}, resources: {memory: 2 TiB}}")
    monkeypatch.setattr(resources, "machine_mib", lambda: 500)
    result = eater.run()
    assert result.code == 2
    assert result.json["problems"] == [
        f"{place}: its resources.memory is {asked}, and this machine (or its control group) has 500 MiB; run it on a "
        "larger one, or declare less: that changes no key"
        for place, asked in ((f"{eater.pipeline}:5:3: eat", "900 MiB"), (f"{eater.pipeline}:6:3: more", "2048 GiB"))
    ]
    assert eater.counts == []
    write(eater, few)
    monkeypatch.setattr(resources, "machine_mib", lambda: 1000)
    assert eater.run().code == 0
    monkeypatch.setattr(resources, "machine_mib", lambda: 500)
    assert set(eater.run().outcomes.values()) == {"HIT"}


def test_what_does_not_fit_beside_others_waits(eater: Demo, monkeypatch) -> None:
    """Of two nodes of 600 MiB on a machine of 1,000 the second begins after the first has ended."""
    stamps = eater.folder / "stamps"
    eater.edit("eat", "count(f", f"(out := open({str(stamps)!r}, 'a')).write('begin '); out.close(); count(f")
    eater.edit("eat", '.write_text("done")', f".write_text('done'); open({str(stamps)!r}, 'a').write('end ')")
    monkeypatch.setattr(resources, "machine_mib", lambda: 1000)
    entries = ("one", "two")
    for memory, expected in (("600 MiB", "begin end begin end "), ("300 MiB", "begin begin end end ")):
        stamps.write_text("")
        write(
            eater,
            *(
                f"{n}: {{uses: eat, with: {{mib: {i}, seconds: 1.{len(memory)}}}, resources: {{memory: {memory}}}}}"
                for i, n in enumerate(entries)
            ),
        )
        done = eater.run("-j", "2", "--force")
        assert done.code == 0
        assert stamps.read_text() == expected
        assert ("waiting for 600 MiB of memory" in done.err) is (memory == "600 MiB")


def test_what_undeclared_nodes_hold_counts_too(eater: Demo, monkeypatch) -> None:
    room = resources.Room(4)
    node = _FakeNode(memory=100)
    monkeypatch.setattr(resources, "machine_mib", lambda: 1000)
    for held, fits in ((950, False), (800, True)):
        monkeypatch.setattr(resources, "resident_bytes", lambda pids, held=held: dict.fromkeys(pids, held << 20))
        assert room.has(node, [(_FakeNode(memory=0), _FakeWorker())]) is fits  # type: ignore[arg-type, list-item]


class _FakeWorker:
    pid = 1


class _FakeNode:
    def __init__(self, memory: int) -> None:
        from stagegraph.spec.model import Resources

        self.spec = self
        self.resources = Resources(memory)


# -- the disk --------------------------------------------------------------------------------------------------------


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch):
    """Make writing to paths that hold a word fail as a full disk does."""

    def fill(*words: str) -> None:
        real_open, real_write = os.open, os.write
        doomed: set[int] = set()

        def opened(path, *args, **kwargs):
            descriptor = real_open(path, *args, **kwargs)
            doomed.discard(descriptor)
            if any(word in str(path) for word in words):
                doomed.add(descriptor)
            return descriptor

        def write(descriptor: int, data: bytes) -> int:
            if descriptor in doomed:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real_write(descriptor, data)

        monkeypatch.setattr(os, "open", opened)
        monkeypatch.setattr(os, "write", write)

    return fill


def test_a_full_disk_at_the_journal_or_a_claim_costs_no_result(demo: Demo, full, caplog) -> None:
    full("journal.jsonl", "running/")
    result = demo.run()
    assert (result.code, set(result.outcomes.values())) == (0, {"BUILT"})
    said = [record.getMessage() for record in caplog.records]
    assert [("journal.jsonl" in text, "No space left on device" in text) for text in said] == [
        (False, True),
        (True, True),
    ]
    assert demo("runs", str(demo.pipeline), "--json").json["runs"] == []
    assert set(demo.run().outcomes.values()) == {"HIT"}


def test_a_short_write_of_the_journal_is_said_and_tears_nothing(demo: Demo, monkeypatch, caplog) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[: len(data) // 2]))
    demo.run()
    monkeypatch.undo()
    assert "this run will not be among past runs" in caplog.text


def test_a_node_that_cannot_begin_fails_alone(demo: Demo, monkeypatch) -> None:
    """No room for the lock, or the work directory, of one node: the others go on."""
    from stagegraph.execution.sandbox import Sandbox
    from stagegraph.store.workspace import Workspace

    no_space = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")
    for owner, name, turn in ((Workspace, "try_lock", 1), (Sandbox, "create", 2)):
        calls = [0]
        real = getattr(owner, name)

        def failing(*args, calls=calls, turn=turn, real=real):
            calls[0] += 1
            if calls[0] == turn:
                raise no_space
            return real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, failing)
            demo.source.write_text(f"other words {name}\n")
            result = demo.run("-j", "1")
        assert result.code == 1
        failed = [node for node in result.json["nodes"] if node["outcome"] == "FAILED"]
        assert [node["problems"] for node in failed] == [["somewhere: No space left on device"]]
        assert demo.run().code == 0


def test_a_disk_that_takes_no_more_under_a_failure_costs_only_its_leftovers(demo: Demo, monkeypatch) -> None:
    from stagegraph.store.workspace import Workspace

    def full(*_: object) -> Path:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Workspace, "keep_failed", full)
    demo.source.write_text("FAIL")
    result = demo.run()
    assert result.code == 1
    assert json.loads(result.out)["nodes"][0]["problems"] == ["the text says FAIL"]
    assert "kept:" not in result.err
