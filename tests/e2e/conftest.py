"""The default pipeline for the CPU, over a copy of the stages that tests may edit; built once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.support.edited_project import OVERLAY, ROOT, Project
from tests.support.workers import made_once


def build(folder: Path) -> None:
    """Build the default pipeline for llvm in ``folder``."""
    project = Project(folder)
    shutil.copytree(ROOT / "stages", project.stages, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "examples" / "tiny-qwen", project.checkpoint, ignore=shutil.ignore_patterns("__pycache__"))
    (project.folder / "overlay.yaml").write_text(OVERLAY)
    outcomes = project.run()
    assert {node["outcome"] for node in outcomes.values()} == {"BUILT"}


def copied(folder: Path, target: Path) -> Project:
    """Copy the built project in ``folder`` to ``target``."""
    shutil.copytree(folder, target, symlinks=True)
    project = Project(target)
    project.run()  # copies have other inodes and times: what is known of them is learned anew, and nothing runs
    return project


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The default pipeline for llvm, built."""
    return copied(made_once(tmp_path_factory, "built-project", build), tmp_path_factory.mktemp("built") / "project")


@pytest.fixture
def project(built: Project, tmp_path: Path) -> Project:
    """A copy of the built project that a test may spoil."""
    return copied(built.folder, tmp_path / "project")
