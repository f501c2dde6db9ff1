"""What reading a pipeline file loads; benchmarks/engine.py has what it takes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine.spec_fakes import SpecFiles

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SpecFiles:
    return SpecFiles(tmp_path, monkeypatch)


STAGE = """
from __future__ import annotations
from dataclasses import dataclass
from stagegraph.stage import Stage, param

class Light(Stage):
    id = "light"

    @dataclass(frozen=True)
    class Params:
        size: int = param("how large", minimum=1)
"""

READ = """
import sys
from pathlib import Path
from stagegraph import registry
registry.SHIPPED = {"light": "light_stage:Light"}
from stagegraph.spec import load
load(Path("p.yaml"))
print(*sys.modules)
"""


def test_reading_imports_nothing_heavy(spec: SpecFiles) -> None:
    spec.write("light_stage.py", STAGE)
    spec.write("p.yaml", "version: 1\nname: a\nstages: {light: {foreach: {n: [1, 2]}, with: {size: '${each.n}'}}}")
    env = {"PYTHONPATH": f"{REPOSITORY}:{spec.root}"}
    command = [sys.executable, "-c", READ]
    loaded = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.split()
    heavy = {"networkx", "jsonschema", "numpy", "tvm", "asyncio", "importlib.metadata", "blake3", "diskcache"}
    assert "yaml" in loaded
    assert not heavy & set(loaded)
