"""Crash at any point: whatever a run dies of, the next one finishes, byte for byte, and does nothing again.

Points are numbered file operations (``lib/sitecustomize.py``): at each a process is killed, or is refused by a disk
that is full or failing. Random kills hit what lies between them, native code included.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.endurance.bench import NODES, ROOT, Bench, count, descendants, is_alive, kill

PIECES = 6  # parts of an undisturbed run: two nodes of four, of which two are shared
RANDOM = int(os.environ.get("STAGEGRAPH_KILLS", "250"))
SEED = int(os.environ.get("STAGEGRAPH_KILLS_SEED", "2"))  # another one kills at other moments: figures of runs add up
NOTES = 2 * NODES + PIECES  # lines that the stages of a whole run note


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    bench = Bench(tmp_path_factory.mktemp("undisturbed") / "w")
    bench.run("-j", "1")
    assert count(bench.noted(), "made") == bench.parts() == PIECES
    bench.here("gc", "--keep-runs", "1")
    return bench


@pytest.fixture(scope="module")
def points(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The operation at each point of an undisturbed run."""
    bench = Bench(tmp_path_factory.mktemp("points") / "w")
    bench.run("-j", "1", **trace(bench))
    return [line.split()[1] for line in (bench.folder / "trace").read_text().splitlines()]


def trace(bench: Bench, fault: str = "") -> dict[str, object]:
    return {"LAB_ROOT": bench.folder / "artifacts", "LAB_TRACE": bench.folder / "trace", "LAB_FAULT": fault}


def recovers(bench: Bench, undisturbed: Bench) -> None:
    """What must be true after whatever happened."""
    keys, parts = bench.keys(), bench.parts()
    bench.noted()
    nodes = bench.run("-j", "1")
    redone = [name for name, node in nodes.items() if node["outcome"] != "HIT" and node["key"] in keys]
    assert not redone, f"committed and done again: {redone}"
    noted = bench.noted()
    assert count(noted, "begin") == sum(node["outcome"] != "HIT" for node in nodes.values())
    assert count(noted, "made") == PIECES - parts
    assert bench.shown() == undisturbed.shown()
    bench.here("gc", "--keep-runs", "1")
    differ = bench.kept() ^ undisturbed.kept()
    # A run that is killed once all is committed is not among past runs, and the next one, which does nothing, neither.
    assert not differ - ({"journal.jsonl"} - bench.kept()), sorted(differ)
    bench.here("fsck")
    bench.here("status", "--check")


def crash(folder: Path, fault: str, undisturbed: Bench) -> None:
    """One run with a fault, and what must be true afterwards."""
    bench = Bench(folder)
    done = bench.forked("run", "-j", "1", **trace(bench, fault))
    if fault.startswith("kill"):
        assert done.returncode in {-signal.SIGKILL, 0, 1}
    elif done.returncode:
        assert "error:" in done.stderr, done.stderr
    recovers(bench, undisturbed)
    shutil.rmtree(folder)


FAST = [("rename", "killall"), ("link", "ENOSPC+")]


@pytest.mark.parametrize(("name", "fault"), FAST)
def test_one_point_of_a_kind(name: str, fault: str, points: list[str], undisturbed: Bench, tmp_path: Path) -> None:
    here = [i for i, point in enumerate(points, 1) if point == name]
    crash(tmp_path / "w", f"{fault.rstrip('+')}:{here[len(here) // 2]}{'+' * fault.endswith('+')}", undisturbed)


# Fault -> at which points: each point is killed once, of itself or with the run, and refused once.
EVERY = {"kill": (0, 2), "killall": (1, 2), "ENOSPC": (0, 3), "ENOSPC+": (1, 3), "EIO": (2, 3)}


@pytest.mark.endurance
@pytest.mark.timeout(0)
@pytest.mark.parametrize("fault", EVERY)
def test_every_point(fault: str, points: list[str], undisturbed: Bench, tmp_path: Path) -> None:
    first, step = EVERY[fault]
    numbers = range(first + 1, len(points) + 1, step)
    wrong = []
    for number in numbers:
        try:
            crash(tmp_path / str(number), f"{fault.rstrip('+')}:{number}{'+' * fault.endswith('+')}", undisturbed)
        except AssertionError as error:
            wrong.append(f"{fault} at {number} ({points[number - 1]}): {error}"[:1500])
            print(wrong[-1], flush=True)
    print(f"{fault}: {len(numbers)} of {len(points)} points, {len(wrong)} wrong", dict(Counter(points)), flush=True)
    assert not wrong, "\n\n".join(wrong)


def random_kill(folder: Path, undisturbed: Bench, rng: random.Random) -> str:
    """Kill a run, alone or with all it started, at a random moment; say how far it had come.

    The moment is soon after so many notes of its stages, not after so many seconds: on a busy machine a run that is
    killed after a second has committed nothing yet, and all kills would be the same.
    """
    bench = Bench(folder)
    process = bench.start("run", "-j", rng.choice("12"), LAB_NAP=0.02)
    awaited = rng.randrange(NOTES)
    while process.poll() is None and bench.notes_so_far() < awaited:
        time.sleep(0.005)
    time.sleep(rng.uniform(0, 0.3))
    started = [process.pid, *descendants(process.pid)]
    kill(started[:1] if rng.random() < 0.5 else started)
    process.wait()
    done = len(bench.keys())
    until = time.monotonic() + 60
    while any(map(is_alive, started)):
        assert time.monotonic() < until, "orphaned workers live on"
        time.sleep(0.01)
    recovers(bench, undisturbed)
    shutil.rmtree(folder)
    return "finished" if process.returncode == 0 else f"killed with {done} of {NODES} committed"


def test_a_random_kill(undisturbed: Bench, tmp_path: Path) -> None:
    random_kill(tmp_path / "w", undisturbed, random.Random(1))


@pytest.mark.endurance
@pytest.mark.timeout(0)
def test_random_kills(undisturbed: Bench, tmp_path: Path) -> None:
    rng = random.Random(SEED)
    found = Counter(random_kill(tmp_path / str(i), undisturbed, rng) for i in range(RANDOM))
    print(f"random kills of seed {SEED}: {dict(found)}")
    assert found.total() - found["finished"] >= RANDOM // 2
    assert {f"killed with {done} of {NODES} committed" for done in range(NODES)} <= found.keys()


REAL = f"""\
version: 1
name: real
vars: {{checkpoint: {ROOT}/examples/tiny-qwen}}
stages:
  config-parse: {{with: {{checkpoint: "${{vars.checkpoint}}"}}}}
  param-register: {{needs: [config-parse], with: {{scheme: q4f32_1, target: llvm}}}}
  quantize:
    needs: [config-parse, param-register]
    with: {{checkpoint: "${{vars.checkpoint}}", scheme: q4f32_1, target: llvm}}
"""
REAL_KILLS = 10


def progress(bench: Bench) -> int:
    """How many results and parts are committed."""
    return len(bench.keys()) + bench.parts()


@pytest.mark.endurance
@pytest.mark.timeout(0)
def test_random_kills_of_real_stages(tmp_path: Path) -> None:
    undisturbed, rng, found = Bench(tmp_path / "undisturbed", REAL), random.Random(SEED), []
    undisturbed.run("-j", "1", **trace(undisturbed))
    operations = (undisturbed.folder / "trace").read_text().count("\n")
    whole, parts = progress(undisturbed), undisturbed.parts()
    for number in range(REAL_KILLS):
        bench = Bench(tmp_path / str(number), REAL)
        # At a random operation: quantize takes a part of a second, of which a moment cannot be met from outside.
        fault = f"{'killall' if number % 2 else 'kill'}:{rng.randint(1, operations)}"
        bench.forked("run", "-j", "1", **trace(bench, fault))
        keys, kept = bench.keys(), bench.parts()
        found.append(progress(bench))
        nodes = bench.run("-j", "1")
        assert not [name for name, node in nodes.items() if node["outcome"] != "HIT" and node["key"] in keys]
        if nodes["quantize"]["key"] not in keys:
            assert sum(count["made"] for count in nodes["quantize"]["parts"].values()) <= parts - kept
        assert bench.shown() == undisturbed.shown()
        bench.here("fsck")
        shutil.rmtree(bench.folder)
    print(f"kills of real stages at {REAL_KILLS} of {operations} operations; committed: {sorted(found)} of {whole}")
    assert len({*found}) > REAL_KILLS // 3
