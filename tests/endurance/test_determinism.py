"""The same pipeline of two users in two places, languages, time zones, seeds and widths: the same bytes and keys."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from tests.endurance.bench import LIB, Bench
from tests.support.edited_project import OVERLAY, ROOT

HERE = {"LC_ALL": "C", "TZ": "UTC", "PYTHONHASHSEED": "0"}
THERE = {"LC_ALL": "C.utf8", "TZ": "Asia/Kathmandu", "PYTHONHASHSEED": "4711"}
NOBODY, OTHER = 65534, 4711
# Python must be in that user's reach too, for workers: a root's own in its home is not.
WHO = "import os, subprocess, sys; subprocess.run([sys.executable, '-c', 'import os; print(os.getuid())'], check=True)"


@pytest.fixture(scope="module")
def other_user() -> list[str]:
    """What a command begins with to be another user's: one of this machine for root, else one of a namespace."""
    become = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    pretend = ["unshare", "--user", f"--map-user={OTHER}", f"--map-group={OTHER}"]
    for words in ([become] if os.geteuid() == 0 else []) + [pretend]:
        try:
            said = subprocess.run(
                [*words, sys.executable, "-c", WHO], capture_output=True, text=True, check=False
            ).stdout
        except OSError:
            continue
        if said and int(said) != os.geteuid():
            return words
    pytest.skip("there is no way to be another user here")


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that another user may enter: the parents of tmp_path are nobody else's."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def keys(folder: Path, file: str, jobs: str, env: Mapping[str, str], user: Sequence[str]) -> dict[str, str]:
    """Run a pipeline as ``user``, who owns the folder then; return the key of every node."""
    if "setpriv" in user:
        for path in [folder, *folder.rglob("*")]:
            os.chown(path, NOBODY, NOBODY)
    done = subprocess.run(
        [*user, sys.executable, "-m", "stagegraph.cli.main", "run", file, "--json", "-j", jobs],
        cwd=folder,
        env={**os.environ, "HOME": str(folder), **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return {node["node"]: node["key"] for node in json.loads(done.stdout)["nodes"]}


def test_small_stages(place: Path, other_user: list[str]) -> None:
    one, other = Bench(place / "one"), Bench(place / "an" / "other place")
    path = {"PYTHONPATH": f"{LIB}{os.pathsep}{ROOT}"}
    first = keys(one.folder, "pipeline.yaml", "1", HERE | path, [])
    before = os.umask(0o077)
    try:
        second = keys(other.folder, "pipeline.yaml", "4", THERE | path, other_user)
    finally:
        os.umask(before)
    assert first == second
    assert one.shown() == other.shown()
    owners = {path.stat().st_uid for path in (other.folder / "artifacts").rglob("*")}
    assert owners == ({NOBODY} if "setpriv" in other_user else {os.geteuid()})


def digests(folder: Path) -> dict[str, str]:
    """The digest of every output; views are for people: one has timings, one TVM's names of variables."""
    found = (path for path in (folder / "artifacts").rglob("*") if not {".stagegraph", "views"} & {*path.parts})
    listed = sorted(str(path) for path in found if path.is_file())
    said = subprocess.run(["sha256sum", "-z", *listed], capture_output=True, text=True, check=True).stdout
    lines = [line for line in said.split("\0") if line]
    return {line[66:].removeprefix(str(folder)): line[:64] for line in lines}


@pytest.mark.endurance
@pytest.mark.timeout(0)
def test_the_real_pipeline(place: Path, other_user: list[str]) -> None:
    made, keyed = [], []
    for name, env, mask, jobs, user in (("one", HERE, 0o022, "1", []), ("an/other", THERE, 0o077, "3", other_user)):
        folder = place / name
        folder.mkdir(parents=True)
        shutil.copytree(ROOT / "stages", folder / "lib/stages", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(ROOT / "examples" / "tiny-qwen", folder / "checkpoint")
        (folder / "overlay.yaml").write_text(OVERLAY)
        path = {"PYTHONPATH": os.pathsep.join([str(folder / "lib"), str(ROOT)])}
        before = os.umask(mask)
        try:
            keyed.append(keys(folder, "overlay.yaml", jobs, env | path, user))
        finally:
            os.umask(before)
        made.append(digests(folder))
    assert keyed[0] == keyed[1]
    assert made[0].keys() == made[1].keys()
    differ = [name for name, digest in made[0].items() if made[1][name] != digest]
    print(f"{len(keyed[0])} nodes, {len(made[0])} files, {len(differ)} differ, as {other_user}")
    assert any(name.endswith("certificate.json") for name in made[0])
    assert len(made[0]) > 20
    assert not differ, differ
