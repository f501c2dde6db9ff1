"""The same pipeline in two places, languages, time zones, seeds and widths gives the same bytes and the same keys."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.e2e.conftest import OVERLAY, ROOT, Project
from tests.endurance.bench import Bench

HERE = {"LC_ALL": "C", "TZ": "UTC", "PYTHONHASHSEED": "0"}
THERE = {"LC_ALL": "C.utf8", "TZ": "Asia/Kathmandu", "PYTHONHASHSEED": "4711"}


def test_small_stages(tmp_path: Path) -> None:
    one, other = Bench(tmp_path / "one"), Bench(tmp_path / "an" / "other place")
    first = one.run("-j", "1", **HERE)
    before = os.umask(0o077)
    try:
        second = other.run("-j", "4", **THERE)
    finally:
        os.umask(before)
    assert {name: node["key"] for name, node in first.items()} == {name: node["key"] for name, node in second.items()}
    assert one.shown() == other.shown()


def digests(project: Project) -> dict[str, str]:
    """The digest of every output; views are for people: one has timings, one TVM's names of variables."""
    found = (path for path in (project.folder / "artifacts").rglob("*") if not {".stagegraph", "views"} & {*path.parts})
    listed = sorted(str(path) for path in found if path.is_file())
    said = subprocess.run(["sha256sum", "-z", *listed], capture_output=True, text=True, check=True).stdout
    lines = [line for line in said.split("\0") if line]
    return {line[66:].removeprefix(str(project.folder)): line[:64] for line in lines}


@pytest.mark.endurance
@pytest.mark.timeout(0)
def test_the_real_pipeline(tmp_path: Path) -> None:
    made = []
    for folder, env, mask, jobs in ((tmp_path / "one", HERE, 0o022, "1"), (tmp_path / "an/other", THERE, 0o077, "3")):
        before = os.umask(mask)
        try:
            folder.mkdir(parents=True)
            project = Project(folder)
            shutil.copytree(ROOT / "stages", project.stages, ignore=shutil.ignore_patterns("__pycache__"))
            shutil.copytree(ROOT / "examples" / "tiny-qwen", project.checkpoint)
            (folder / "overlay.yaml").write_text(OVERLAY)
            project("run", "overlay.yaml", "-j", jobs, env=env)
        finally:
            os.umask(before)
        made.append(digests(project))
    assert made[0].keys() == made[1].keys()
    differ = [name for name, digest in made[0].items() if made[1][name] != digest]
    print(f"{len(made[0])} files of {len({Path(name).parent for name in made[0]})} folders, {len(differ)} differ")
    assert len(made[0]) > 20
    assert not differ
