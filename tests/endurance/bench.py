"""A pipeline of small stages in a directory of its own, driven by the command line as users drive it."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from stagegraph import registry
from stagegraph.cli.main import main
from tests.endurance import forks

ROOT = Path(__file__).parents[2]
LIB = Path(__file__).parent / "lib"
PIPELINE = """\
version: 1
name: lab
vars: {tag: x, which: [a, b], glue: "-"}
stages:
  lab-read: {with: {text: words, tag: "${vars.tag}"}}
  lab-cut: {needs: [lab-read], foreach: {which: "${vars.which}"}, with: {which: "${each.which}"}}
  lab-big: {needs: [lab-read]}
  lab-join: {needs: [lab-cut, lab-big], with: {glue: "${vars.glue}"}}
"""
NODES = 5
PATIENCE = 600  # seconds until a command counts as hanging


class Bench:
    """One directory with a pipeline and its ``artifacts/``."""

    def __init__(self, folder: Path, pipeline: str = PIPELINE) -> None:
        self.folder = folder
        self.store = folder / "artifacts" / ".stagegraph"
        self.notes = folder / "notes"
        (folder / "words").mkdir(parents=True)
        (folder / "words" / "a.txt").write_text("some words here\n")
        (folder / "pipeline.yaml").write_text(pipeline)

    def env(self, **extra: object) -> dict[str, str]:
        """The environment of a command: the fakes on the path, notes beside the pipeline."""
        own = {"PYTHONPATH": f"{LIB}{os.pathsep}{ROOT}", "NO_COLOR": "1", "LAB_NOTES": str(self.notes)}
        return {**os.environ, **own, **{name: str(value) for name, value in extra.items()}}

    def start(self, *argv: str, stdout: Any = subprocess.DEVNULL, **extra: object) -> subprocess.Popen[str]:
        """Start a command in a session of its own."""
        return subprocess.Popen(
            [sys.executable, "-m", "stagegraph.cli.main", *argv],
            cwd=self.folder,
            env=self.env(**extra),
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stdout if stdout is subprocess.DEVNULL else subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )

    def __call__(self, *argv: str, code: int | None = 0, **extra: object) -> subprocess.CompletedProcess[str]:
        """Run a command; it must end with ``code`` and without a traceback."""
        process = self.start(*argv, stdout=subprocess.PIPE, **extra)
        out, err = process.communicate(timeout=PATIENCE)
        assert "Traceback" not in out + err, f"{argv}: {err[-3000:]}"
        assert code in {None, process.returncode}, f"{argv}: exit {process.returncode}\n{out[-2000:]}\n{err[-2000:]}"
        return subprocess.CompletedProcess(argv, process.returncode, out, err)

    def forked(self, *argv: str, **extra: object) -> subprocess.CompletedProcess[str]:
        """Run a command, without a traceback, in a process that need not import what it runs."""
        done = forks.run([*argv], self.folder, self.env(**extra))
        assert "Traceback" not in done.stdout + done.stderr, f"{argv}: {done.stderr[-3000:]}"
        return done

    def here(self, verb: str, *argv: str) -> str:
        """Run a command that executes nothing in this process, which takes a tenth of the time; return what it said."""
        out = io.StringIO()
        sys.path.append(str(LIB))
        registry.installed.cache_clear()
        try:
            with redirect_stdout(out), redirect_stderr(out), pytest.raises(SystemExit) as end:
                main([verb, str(self.folder / "pipeline.yaml"), *argv])
        finally:
            sys.path.remove(str(LIB))
            registry.installed.cache_clear()
        assert not end.value.code, f"{verb}: exit {end.value.code}\n{out.getvalue()}"
        return out.getvalue()

    def run(self, *argv: str, **extra: Any) -> dict[str, dict[str, Any]]:
        """Run the pipeline; return what the run says of each node."""
        done = self.forked("run", "--json", *argv, **extra)
        assert not done.returncode, f"{argv}: exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        return {n["node"]: n for n in json.loads(done.stdout)["nodes"]}

    def shown(self) -> dict[str, str]:
        """Every file that ``artifacts/`` shows, by name, with its digest."""
        return _tree(self.folder / "artifacts", skip=".stagegraph")

    def kept(self) -> set[str]:
        """Every file of the store but those of the database, and every directory of an execution."""
        names = {name for name in _names(self.store) if name.startswith("work/") or not (self.store / name).is_dir()}
        return {name for name in names if not name.startswith("index/")}

    def keys(self) -> set[str]:
        """The keys of all committed results."""
        return {path.name for path in self.store.glob("records/*/[0-9a-f]*")}

    def parts(self) -> int:
        """How many parts are committed."""
        return len(list(self.store.glob("parts/*/[0-9a-f]*")))

    def notes_so_far(self) -> int:
        """How many lines stages noted since the last look."""
        return self.notes.read_bytes().count(b"\n") if self.notes.exists() else 0

    def noted(self) -> list[list[str]]:
        """What stages noted since the last look: what, name, process, time."""
        lines = self.notes.read_text().splitlines() if self.notes.exists() else []
        self.notes.unlink(missing_ok=True)
        return [line.split() for line in lines]


def count(noted: list[list[str]], what: str) -> int:
    """How often something was noted."""
    return sum(line[0] == what for line in noted)


def _names(base: Path) -> set[str]:
    found = (Path(folder, name) for folder, folders, files in os.walk(base) for name in folders + files)
    return {path.relative_to(base).as_posix() for path in found}


def _tree(base: Path, skip: str) -> dict[str, str]:
    digests = {}
    for folder, folders, names in os.walk(base):
        folders[:] = [name for name in folders if name != skip]
        for name in names:
            path = Path(folder, name)
            digests[path.relative_to(base).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    return digests


def descendants(pid: int) -> list[int]:
    """The processes that a process started, and theirs."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (parent := _status(int(entry.name))[1]):
            children.setdefault(parent, []).append(int(entry.name))
    found, todo = [], [pid]
    while todo:
        mine = children.get(todo.pop(), [])
        found += mine
        todo += mine
    return found


def is_alive(pid: int) -> bool:
    """Say whether a process runs: one that is dead and not waited for does not."""
    return _status(pid)[0] not in {"", "Z", "X"}


def _status(pid: int) -> tuple[str, int]:
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except (OSError, ValueError):
        return "", 0
    return state, int(parent)


def kill(pids: list[int]) -> None:
    """SIGKILL, whatever is left of them."""
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
