"""The default pipeline for the CPU, over a copy of the stages that tests may edit; built once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.support.edited_project import OVERLAY, ROOT, Project


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
