"""Where people run things: odd paths, poor file systems, other users' stores, full disks, no home, a wrong clock."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.endurance.bench import PATIENCE, Bench

NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts, or becomes another user, which takes root")

LOOKING = [
    ("status",),
    ("status", "--check"),
    ("show", "lab-join"),
    ("log", "lab-read"),
    ("explain", "lab-join"),
    ("lineage", "lab-join"),
    ("runs",),
    ("du",),
    ("fsck",),
    ("run",),  # without news it only looks
]
WRITING = [("gc",), ("run", "--force"), ("run", "--set", "vars.tag=y")]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    bench = Bench(tmp_path_factory.mktemp("undisturbed") / "w")
    bench.run()
    return bench


def command(
    bench: Bench, argv: tuple[str, ...], *, before: tuple[str, ...] = (), without: tuple[str, ...] = (), **extra: object
) -> subprocess.CompletedProcess[str]:
    """Run a command through a program that comes ``before`` it; it may fail, with a message."""
    env = {name: value for name, value in bench.env(**extra).items() if name not in without}
    words = [*before, sys.executable, "-m", "stagegraph.cli.main", *argv]
    ended = subprocess.run(
        words,
        cwd=bench.folder,
        env=env,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=PATIENCE,
        check=False,
    )
    assert "Traceback" not in ended.stdout + ended.stderr, f"{argv}: {ended.stderr}"
    assert ended.returncode == 0 or "error: " in ended.stderr, f"{argv}: {ended}"
    return ended


def limited(what: str) -> tuple[str, ...]:
    return ("bash", "-c", f'ulimit {what}; exec "$@"', "bash")


# Surroundings in which a run does all that it always does: what comes before it, variables without, variables.
POOR = {
    "no hard links": ((), (), {"LAB_DENY": "link:EPERM"}),
    "objects elsewhere": ((), (), {"LAB_DENY": "link:EXDEV"}),
    "links unknown": ((), (), {"LAB_DENY": "link:ENOSYS"}),
    "few descriptors": (limited("-n 32"), (), {}),
    "no home": ((), ("HOME", "USER", "LOGNAME", "LANG"), {}),
    "no /tmp": ((), (), {"TMPDIR": "/nonexistent"}),
    "clock runs backwards": ((), (), {"LAB_CLOCK": "5000"}),
}


def run_in(bench: Bench, before: tuple[str, ...], without: tuple[str, ...], extra: dict[str, str]) -> None:
    root = {"LAB_ROOT": bench.folder / "artifacts"}
    for argv in (("run",), ("run", "--force"), ("gc",), ("status", "--check"), ("fsck",)):
        ended = command(bench, argv, before=before, without=without, **root, **extra)
        assert ended.returncode == 0, f"{argv}: {ended}"


@pytest.mark.endurance
@pytest.mark.parametrize("poor", POOR)
def test_a_poor_place(poor: str, undisturbed: Bench, tmp_path: Path) -> None:
    bench = Bench(tmp_path / "w")
    run_in(bench, *POOR[poor])
    assert bench.shown() == undisturbed.shown()


ODD = [
    "with space",
    "quo'te\"s",
    "ünïcödé 中文 🙂",
    "new\nline",
    "-dash",
    "a" * 200,
    "$(x);`y`",
    "%s{x}",
    "back\\slash",
]


@pytest.mark.endurance
@pytest.mark.parametrize("name", [*ODD, "x:y,z;w", f"{'d' * 180}/{'e' * 140}"])
def test_an_odd_place(name: str, undisturbed: Bench, tmp_path: Path) -> None:
    bench = Bench(tmp_path / name)
    bench.run()
    bench("status", "--check")
    bench("export", "lab-join", "exported")
    assert "read was here" in bench("log", "lab-read").stdout
    assert bench.shown() == undisturbed.shown()


@pytest.mark.endurance
def test_a_path_that_is_too_long_for_the_index(undisturbed: Bench, tmp_path: Path) -> None:
    """SQLite opens no path of more than 512 bytes: what it keeps is a cache, and the warning says so."""
    bench = Bench(tmp_path / "/".join(letter * 200 for letter in "defg"))
    assert "no result is lost" in bench("run").stderr
    assert {node["outcome"] for node in bench.run().values()} == {"HIT"}
    assert bench.shown() == undisturbed.shown()


def test_a_poor_and_odd_place(undisturbed: Bench, tmp_path: Path) -> None:
    bench = Bench(tmp_path / ("new\nline " + "quo'te\"s ünïcödé 中文 🙂" * 3))
    extra = {"LAB_DENY": "link:EPERM", "LAB_CLOCK": "5000", "TMPDIR": "/nonexistent"}
    root = {"LAB_ROOT": bench.folder / "artifacts"}
    ended = command(bench, ("run",), before=limited("-n 32"), without=("HOME", "LANG"), **root, **extra)
    assert ended.returncode == 0, ended
    assert bench.shown() == undisturbed.shown()


def test_without_file_locks_a_run_refuses_and_looking_works(undisturbed: Bench) -> None:
    no_locks = {"LAB_DENY": "flock:ENOLCK", "LAB_ROOT": undisturbed.folder / "artifacts"}
    ended = command(undisturbed, ("run", "--force"), **no_locks)
    assert (ended.returncode, ended.stdout) == (3, "")
    assert "has no file locks" in ended.stderr
    assert command(undisturbed, ("show", "lab-join"), **no_locks).returncode == 0


@pytest.mark.endurance
@pytest.mark.parametrize("count", range(8, 32, 4))
def test_too_few_descriptors_are_said_and_cost_nothing(count: int, undisturbed: Bench, tmp_path: Path) -> None:
    bench = Bench(tmp_path / "w")
    ended = command(bench, ("run", "-j", "2"), before=limited(f"-n {count}"))
    assert ended.returncode == 0 or "Too many open files" in ended.stderr
    bench.run()
    assert bench.shown() == undisturbed.shown()


@pytest.mark.parametrize("verb", ["status", pytest.param("run", marks=pytest.mark.endurance)])
def test_what_takes_the_output_is_full(verb: str, undisturbed: Bench) -> None:
    with Path("/dev/full").open("w") as full:
        process = undisturbed.start(verb, stdout=full)
        _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 3
    assert err.splitlines()[-1] == "error: standard output: No space left on device"


@as_root
@pytest.mark.endurance
def test_another_users_store_is_read_and_not_written() -> None:
    with tempfile.TemporaryDirectory() as folder:  # the parents of tmp_path are nobody else's
        Path(folder).chmod(0o755)
        _read_and_not_written(Path(folder))


def _read_and_not_written(folder: Path) -> None:
    bench = Bench(folder / "w")
    bench.run()
    before = bench.kept(), bench.shown()
    nobody = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups")
    notes = {"LAB_NOTES": ""}
    for argv in LOOKING:
        assert command(bench, argv, before=nobody, **notes).returncode == 0, argv
    for argv in WRITING:
        ended = command(bench, argv, before=nobody, **notes)
        assert ended.returncode in {1, 3}, argv
        assert "Permission denied" in ended.stderr
    assert (bench.kept(), bench.shown()) == before


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "none", str(folder)], check=False).returncode:
        pytest.skip("cannot mount here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@as_root
@pytest.mark.endurance
def test_a_read_only_disk(disk: Path, undisturbed: Bench) -> None:
    subprocess.run(["mount", "-o", "remount,size=200m", str(disk)], check=True)
    bench = Bench(disk / "w")
    bench.run()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for argv in LOOKING:
        assert command(bench, argv, LAB_NOTES="").returncode == 0, argv
    for argv in WRITING:
        ended = command(bench, argv, LAB_NOTES="")
        assert ended.returncode in {1, 3}, argv
        assert "Read-only file system" in ended.stderr
    assert bench.shown() == undisturbed.shown()


@as_root
@pytest.mark.endurance
def test_a_full_disk_is_said_and_room_is_all_it_takes(disk: Path, undisturbed: Bench) -> None:
    bench = Bench(disk / "w")
    outcomes = []
    for size in (40, 60, 80, 120, 160, 200, 300, 400):  # KiB: a little further each time
        subprocess.run(["mount", "-o", f"remount,size={size}k", str(disk)], check=True)
        ended = command(bench, ("run",), LAB_NOTES="")
        outcomes.append(ended.returncode)
        assert ended.returncode == 0 or "No space left on device" in ended.stderr or "full" in ended.stderr, ended
    assert outcomes[0] != 0, "the disk was never full"
    subprocess.run(["mount", "-o", "remount,size=200m", str(disk)], check=True)
    bench.run()
    assert bench.shown() == undisturbed.shown()
    bench.here("gc", "--keep-runs", "1")
    bench.here("fsck")


@as_root
@pytest.mark.endurance
def test_a_full_tmp(disk: Path, undisturbed: Bench, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left"):
        (disk / "all").write_bytes(b"x" * (1 << 20))
    bench = Bench(tmp_path / "w")
    bench("run", TMPDIR=disk)
    bench("export", "lab-join", "exported", TMPDIR=disk)
    assert bench.shown() == undisturbed.shown()
