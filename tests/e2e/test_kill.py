"""kill -9 in the middle of every stage of the real pipeline: the next run finishes the same bundle."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.edited_project import ROOT, Project

NODES = [
    "config-parse",
    "tokenizer-bundle",
    "param-register[llvm]",
    "graph-build[llvm,kv]",
    "quantize[llvm]",
    "compile[llvm]",
    "bundle[llvm]",
    "verify[llvm]",
]


def bundle(project: Project) -> dict[str, bytes]:
    folder = project.folder / "artifacts/tiny-qwen/bundle.llvm/bundle"
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("node", NODES)
def test_the_next_run_resumes(built: Project, tmp_path: Path, node: str) -> None:
    project = Project(tmp_path / "project")
    shutil.copytree(built.folder, project.folder, ignore=shutil.ignore_patterns("artifacts"))
    process = subprocess.Popen(
        [sys.executable, "-m", "stagegraph.cli.main", "run", "overlay.yaml"],
        cwd=project.folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(project.folder / "lib"), str(ROOT)])},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith(f"{node}: running"):
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    nodes = project.run()
    assert nodes[node]["outcome"] == "BUILT"
    assert bundle(project) == bundle(built)
    assert project("fsck", "overlay.yaml").stdout.endswith("all intact\n")
