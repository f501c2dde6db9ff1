"""A copy of the stages that tests may edit, and the default pipeline for the CPU, built once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

OVERLAY = f"""\
extends: {ROOT}/pipeline.yaml
name: tiny-qwen
vars: {{targets: [llvm], checkpoint: checkpoint}}
stages:
  verify: {{with: {{reference: recorded}}}}
"""


@dataclass
class Project:
    """A directory with an overlay of the default pipeline, a checkpoint and its own copy of ``stages/``."""

    folder: Path

    @property
    def stages(self) -> Path:
        return self.folder / "lib" / "stages"

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint"

    def __call__(
        self, *argv: str, code: int = 0, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join([str(self.folder / "lib"), str(ROOT)])
        done = subprocess.run(
            [sys.executable, "-m", "stagegraph.cli.main", *argv],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": path, **(env or {})},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done

    def run(self, *argv: str, code: int = 0) -> dict[str, dict[str, Any]]:
        done = self("run", "overlay.yaml", "--json", *argv, code=code)
        return {node["node"]: node for node in json.loads(done.stdout)["nodes"]}

    def edit(self, name: str, old: str, new: str) -> None:
        text = (self.stages / name).read_text()
        assert old in text
        (self.stages / name).write_text(text.replace(old, new))


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The default pipeline for llvm, built."""
    project = Project(tmp_path_factory.mktemp("project"))
    shutil.copytree(ROOT / "stages", project.stages, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "examples" / "tiny-qwen", project.checkpoint, ignore=shutil.ignore_patterns("__pycache__"))
    (project.folder / "overlay.yaml").write_text(OVERLAY)
    outcomes = project.run()
    assert {node["outcome"] for node in outcomes.values()} == {"BUILT"}
    return project


@pytest.fixture
def project(built: Project, tmp_path: Path) -> Project:
    """A copy of the built project that a test may spoil."""
    copy = Project(tmp_path / "project")
    shutil.copytree(built.folder, copy.folder, symlinks=True)
    copy.run()  # copies have other inodes and times: what is known of them is learned anew, and nothing runs
    return copy
