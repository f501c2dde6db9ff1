"""A directory with a pipeline over a copy of the stages that a test may edit, and its command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
