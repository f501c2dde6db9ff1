"""What reading costs: nothing heavy is imported, and the time stays far below what a run takes."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from stagegraph.spec import load
from tests.engine.spec_fakes import SpecFiles

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SpecFiles:
    return SpecFiles(tmp_path, monkeypatch)


def test_a_thousand_entries_take_less_than_half_a_second(spec: SpecFiles) -> None:
    entries = (
        f"  e{i}:\n    uses: shape\n    needs: [{', '.join(f'e{j}' for j in range(max(0, i - 3), i))}]\n"
        f"    with: {{target: '${{vars.target}}', size: {i + 1}, archs: [80, 90]}}\n    timeout: 10m\n"
        for i in range(1000)
    )
    path = spec.write("p.yaml", "version: 1\nname: big\nvars: {target: llvm}\nstages:\n" + "".join(entries))
    start = time.process_time()
    pipeline = load(path, (), {})
    assert time.process_time() - start < 0.5
    assert len(pipeline.nodes) == 1000


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
