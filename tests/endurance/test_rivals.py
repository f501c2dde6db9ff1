"""Many processes at work on one store: each thing is made once, nobody waits for ever, nobody sees half of anything."""

from __future__ import annotations

import random
import subprocess
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.endurance.bench import NODES, PATIENCE, Bench, count, descendants, kill

TAGS = "xyz"
# Command -> how often it is chosen.
COMMANDS = {
    ("run",): 4,
    ("run", "--force"): 1,
    ("run", "--force", "--stage", "lab-cut"): 2,
    ("run", "--set", "vars.tag=y"): 3,
    ("run", "--set", "vars.tag=z", "-j", "1"): 3,
    ("run", "--set", "vars.glue=+"): 2,
    ("gc", "--keep-runs", "0"): 2,
    ("gc", "--keep-runs", "3"): 1,
    ("fsck",): 1,
    ("status",): 2,
    ("status", "--json"): 1,
    ("du",): 1,
    ("runs",): 1,
    ("show", "lab-join"): 1,
    ("export", "lab-join"): 2,
}
KILLED = 0.15  # of all commands
# What a command may end with. Between a gc and the next run there may be nothing to show or to export.
CODES = {"show": {0, 2}, "export": {0, 2}}


def overlaps(noted: list[list[str]]) -> list[str]:
    """Return the executions that began while another of the same work went on, by what they noted."""
    under_way: dict[tuple[str, str], float] = {}
    spans: dict[str, list[tuple[float, float, str]]] = {}
    begins: dict[str, list[tuple[float, str]]] = {}
    for what, name, pid, when in noted:
        if what == "begin":
            under_way[name, pid] = float(when)
            begins.setdefault(name, []).append((float(when), pid))
        elif what == "end":
            spans.setdefault(name, []).append((under_way.pop((name, pid)), float(when), pid))
    return [
        f"{name}: {other} began at {at} while {pid} was at it from {start} to {end}"
        for name, found in spans.items()
        for start, end, pid in found
        for at, other in begins[name]
        if other != pid and start < at < end
    ]


def rival(bench: Bench, seed: int, seconds: float) -> tuple[Counter[str], list[str]]:
    """Give commands for a while; return how often which, and what was wrong."""
    rng = random.Random(seed)
    done: Counter[str] = Counter()
    wrong = []
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        (argv,) = rng.choices(list(COMMANDS), list(COMMANDS.values()))
        if argv[0] == "export":
            argv = (*argv, f"exported-{rng.randrange(3)}", "--force")
        process = bench.start(*argv, stdout=subprocess.PIPE, LAB_NAP=0.01)
        is_killed = argv[0] in {"run", "gc", "export"} and rng.random() < KILLED
        if is_killed:
            time.sleep(rng.uniform(0.1, 1.0))
            kill([process.pid, *(descendants(process.pid) if rng.random() < 0.5 else [])])
        try:
            out, err = process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            kill([process.pid, *descendants(process.pid)])
            return done, [*wrong, f"{argv} hung"]
        done[f"{argv[0]} killed" if is_killed else argv[0]] += 1
        if "Traceback" in out + err or (not is_killed and process.returncode not in CODES.get(argv[0], {0})):
            wrong.append(f"{' '.join(argv)}: exit {process.returncode}\n{out[-1000:]}{err[-1500:]}")
    return done, wrong


def compete(folder: Path, *, rivals: int, seconds: float) -> None:
    """Let rivals loose on one store, and say what must be true afterwards."""
    alone = Bench(folder / "alone")
    alone.run()
    alone.here("gc", "--keep-runs", "0", "--max-size", "1KiB")
    bench = Bench(folder / "rivals")
    with ThreadPoolExecutor(rivals) as pool:
        ended = list(pool.map(lambda seed: rival(bench, seed, seconds), range(rivals)))
    done = sum((counts for counts, _ in ended), Counter())
    noted = bench.noted()
    print(f"{rivals} rivals, {seconds} s: {dict(done)}, {count(noted, 'begin')} executions", flush=True)
    wrong = [problem for _, problems in ended for problem in problems] + overlaps(noted)
    assert not wrong, f"{len(wrong)} problems:\n" + "\n\n".join(wrong[:20])
    bench.here("fsck")
    bench.run()
    assert bench.shown() == alone.shown()
    bench.here("gc", "--keep-runs", "0", "--max-size", "1KiB")
    assert bench.kept() == alone.kept()
    bench.here("fsck")
    left = [path.name for path in bench.folder.iterdir() if path.name.startswith(".")]
    for i in range(3):  # the next export removes what killed ones left
        bench("export", "lab-join", f"exported-{i}", "--force")
    left = [path.name for path in bench.folder.iterdir() if path.name.startswith(".")]
    assert not left


def test_each_thing_is_made_once(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "w")
    runs = [bench.start("run", "--set", f"vars.tag={tag}", stdout=subprocess.PIPE) for tag in TAGS[:2] * 2]
    for process in runs:
        out, err = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, out + err
    begun = Counter(name for what, name, *_ in bench.noted() if what == "begin")
    assert len(begun) == NODES * 2
    assert set(begun.values()) == {1}


def test_an_overlap_is_seen() -> None:
    noted = [["begin", "a", "1", "1.0"], ["begin", "a", "2", "1.5"], ["end", "a", "1", "2.0"], ["end", "a", "2", "3.0"]]
    assert len(overlaps(noted)) == 1
    assert not overlaps([noted[0], noted[2]])


def test_rivals(tmp_path: Path) -> None:
    compete(tmp_path, rivals=2, seconds=1)


@pytest.mark.endurance
@pytest.mark.timeout(0)
def test_rivals_for_minutes(tmp_path: Path) -> None:
    compete(tmp_path, rivals=8, seconds=300)
