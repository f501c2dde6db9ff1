"""Every format a stranger can give us, mutated for STAGEGRAPH_FUZZ_MINUTES CPU minutes each (5 where it is not set).

Prints a line of figures for each target: executions, how many were taken, CPU minutes; a finding fails the target.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.endurance.hostile.judge import Judge, written
from tests.endurance.hostile.targets import TARGETS, Files, prepare

MINUTES = float(os.environ.get("STAGEGRAPH_FUZZ_MINUTES", "5"))
FIRST = int(os.environ.get("STAGEGRAPH_FUZZ_SEED", str(time.time_ns() % 10**6)))
ROUND = 200  # examples drawn before the clock is read
QUIET = settings(
    max_examples=ROUND, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
)


@pytest.mark.endurance
@pytest.mark.timeout(0)
@pytest.mark.parametrize("name", TARGETS)
def test_no_file_of_a_stranger_breaks_a_promise(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare()
    target, judge = TARGETS[name], Judge(TARGETS[name].run, tmp_path)
    executions = taken = 0
    slowest = 0.0
    peak = 0
    found: dict[str, Files] = {}  # what went wrong -> the smallest files that did it

    def judged(files: Files) -> None:
        nonlocal executions, taken, slowest, peak
        verdict = judge.judge(written(judge.folder(), files))
        executions += 1
        taken += verdict.taken
        slowest, peak = max(slowest, verdict.cpu), max(peak, verdict.peak)
        if verdict.fault:
            kind = re.sub(r"[0-9]+|'.*?'|\".*?\"", "", verdict.fault.strip().splitlines()[-1])[:120]
            if kind not in found or _size(files) < _size(found[kind]):
                found[kind] = files
                _keep(name, kind, verdict.fault, files)

    own, number = time.process_time(), 0
    while judge.cpu + time.process_time() - own < MINUTES * 60:
        seed(FIRST + number)(QUIET(given(target.files)(judged)))()
        number += 1
    judge.close()
    minutes = (judge.cpu + time.process_time() - own) / 60
    with capsys.disabled():
        print(
            f"\n{name}: {executions:,} executions, {taken:,} taken, {minutes:.1f} CPU minutes, "
            f"slowest {slowest:.1f} s, peak {peak >> 20} MiB, {len(found)} kinds of findings"
        )
    assert not found, found.keys()


def test_a_case_that_waits_for_ever_is_a_finding_and_the_next_one_is_judged(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("tests.endurance.hostile.judge.STILL", 1.0)

    def read(folder: Path) -> list[str]:
        return [(folder / "file").read_text()]

    waiting = Judge(read, tmp_path)
    folder = waiting.folder()
    os.mkfifo(folder / "file")
    assert waiting.judge(folder).fault == "nothing has run for 1 seconds"
    assert waiting.judge(written(waiting.folder(), {"file": b"refused"})).problems == ("refused",)
    waiting.close()


def _size(files: Files) -> int:
    return sum(map(len, files.values()))


def _keep(name: str, kind: str, fault: str, files: Files) -> None:
    """Keep what was found, to be looked at, where STAGEGRAPH_FUZZ_FINDINGS names a directory."""
    if "STAGEGRAPH_FUZZ_FINDINGS" in os.environ:
        digest = hashlib.sha256(kind.encode()).hexdigest()[:8]
        folder = Path(os.environ["STAGEGRAPH_FUZZ_FINDINGS"], f"{name}-{digest}")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        written(folder, files)
        (folder / "FAULT").write_text(fault, errors="replace")
