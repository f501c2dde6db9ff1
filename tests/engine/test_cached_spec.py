"""A pipeline that was read before is not read again, until something that it was read from changes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
STAGE = """
from __future__ import annotations
from dataclasses import dataclass
from stagegraph.stage import Context, Out, Source, Stage, param, source


class Step(Stage):
    id = "step"

    @dataclass(frozen=True)
    class Params:
        word: str = param("a word", choices=("one", "two"))
        sizes: tuple[float, ...] = param("numbers", default=(1.0,))
        text: Source = source("a file", include=("*",), optional=True)

    outputs = {"out": Out("out.txt", "a word")}

    def run(self, ctx: Context) -> None:
        (ctx.out / "out.txt").write_text(ctx.params.word)
"""
FILE = """version: 1
extends: base.yaml
name: kept
stages:
  step:
    uses: ./step.py:Step
    foreach: {word: [one, two]}
    resources: {memory: 10}
    with: {word: "${each.word}", sizes: [1, 2.5], text: "here/../text.txt"}
  last: {uses: ./step.py:Step, with: {word: "${env.LAST}"}}
  shell: {uses: shell, with: {cmd: [sh, -c, "cat ${in.s} > ${out.o}"], sources: {s: text.txt}, outputs: {o: o.txt}}}
"""
LOOK = """
import json, sys
from stagegraph import Pipeline
with Pipeline("pipeline.yaml", sys.argv[1:]) as pipeline:
    nodes = [node.spec for node in pipeline.dag.nodes]
    pipeline.plan()
told = [
    repr(n._replace(
        stage=n.stage.id,
        origin=n.origin._replace(arguments=tuple(n.origin.arguments)),
        places=dict(n.places),
        need_places=dict(n.need_places),
    ))
    for n in nodes
]
print(json.dumps({"read": "yaml" in sys.modules, "nodes": told}))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "artifacts" / ".stagegraph").mkdir(parents=True)  # as after a first run
    (tmp_path / "step.py").write_text(STAGE)
    (tmp_path / "base.yaml").write_text("version: 1\nvars: {word: one}\n")
    (tmp_path / "pipeline.yaml").write_text(FILE)
    for name in ("a", "b"):
        (tmp_path / name / "inside").mkdir(parents=True)
        (tmp_path / name / "text.txt").write_text(name)
    (tmp_path / "text.txt").write_text("a")
    (tmp_path / "here").symlink_to("a/inside")
    time.sleep(0.3)  # what changed just before a process began is not believed yet
    return tmp_path


def look(folder: Path, *settings: str, last: str = "one") -> dict[str, object]:
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "LAST": last}
    command = [sys.executable, "-c", LOOK, *settings]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=True)
    found: dict[str, object] = json.loads(done.stdout)
    return found


def test_it_is_read_once_and_the_same_after(folder: Path) -> None:
    first, second = look(folder), look(folder)
    assert (first["read"], second["read"]) == (True, False)
    assert first["nodes"] == second["nodes"]


def test_what_the_first_run_read_the_second_need_not(folder: Path) -> None:
    shutil.rmtree(folder / "artifacts")
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "LAST": "one"}
    subprocess.run([sys.executable, "-m", "stagegraph.cli.main", "run"], cwd=folder, env=env, check=True)
    assert look(folder)["read"] is False


def relink(folder: Path) -> None:
    (folder / "here").unlink()
    (folder / "here").symlink_to("b/inside")


def rewrite(name: str, old: str, new: str) -> object:
    return lambda folder: (folder / name).write_text((folder / name).read_text().replace(old, new))


CHANGES = {
    "the file": (rewrite("pipeline.yaml", "2.5", "3.5"), {}),
    "a file that it extends": (rewrite("base.yaml", "one", "two"), {}),
    "a link on the way to a source": (relink, {}),
    "a stage": (rewrite("step.py", "default=(1.0,)", "default=(2.0,)"), {}),
    "a variable of the environment": (lambda _: None, {"last": "two"}),
}


@pytest.mark.parametrize("what", CHANGES)
def test_it_is_read_again_after_a_change_of(what: str, folder: Path) -> None:
    change, given = CHANGES[what]
    first = look(folder)
    change(folder)  # type: ignore[operator]
    time.sleep(0.3)
    second = look(folder, **given)
    assert second["read"] is True
    assert what == "a file that it extends" or first["nodes"] != second["nodes"]


def test_a_pipeline_with_a_secret_is_not_kept(folder: Path) -> None:
    (folder / "step.py").write_text(STAGE.replace(', choices=("one", "two")', ""))
    (folder / "pipeline.yaml").write_text(FILE.replace("env.LAST", "secret.LAST"))
    time.sleep(0.3)
    for _ in range(2):
        assert look(folder, last="not to be kept")["read"] is True
    kept = b"".join(path.read_bytes() for path in (folder / "artifacts").rglob("*") if path.is_file())
    assert b"not to be kept" not in kept
