"""What reading a pipeline file loads; benchmarks/engine.py has what it takes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from stagegraph import registry
from stagegraph.errors import SpecError
from stagegraph.spec import load as module
from stagegraph.spec import matrix, reader, scope
from stagegraph.spec.load import load
from tests.support.spec_files import SpecFiles

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
registry.shipped = lambda: registry.Provider(stages={"light": "light_stage:Light"})
from stagegraph.spec.load import load
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


HEAD = "version: 1\nname: fake\n"
BOMBS = {
    "doubled": HEAD + "vars:\n  a0: xxxxxxxxxx\n"
    + "".join(f"  a{i}: '${{vars.a{i - 1}}}${{vars.a{i - 1}}}'\n" for i in range(1, 41))
    + "stages:\n  x: {uses: '${vars.a40}'}\n",
    "listed": HEAD + "vars:\n  a: [" + ",".join(["x"] * 4_000_000) + "]\nstages: {x: {uses: y}}\n",
    "values": HEAD + "vars:\n  a: [" + ",".join(["x"] * 400_000) + "]\nstages: {x: {uses: y}}\n",
    "merged": HEAD + "vars:\n  a: &a {" + ", ".join(f"k{i}: 1" for i in range(20_000)) + "}\n  b: ["
    + ", ".join(["{<<: *a}"] * 20_000) + "]\nstages: {x: {uses: y}}\n",
    "merged twice": HEAD + "vars:\n  a: &a {" + ", ".join(f"k{i}: 1" for i in range(20_000)) + "}\n  s: &s {z: 1}\n"
    + "  b: {<<: *a, " + ", ".join(["<<: *s"] * 20_000) + "}\nstages: {x: {uses: y}}\n",
    "tagged": "".join(f"%TAG !a{i}! b\n" for i in range(250_000)) + "---\n" + HEAD + "stages: {x: {uses: y}}\n",
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_a_pipeline_that_would_grow_without_end_is_refused_in_little_memory(name: str, tmp_path: Path) -> None:
    (tmp_path / "pipeline.yaml").write_text(BOMBS[name])
    code = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from stagegraph.errors import SpecError\n"
        "from stagegraph.spec.load import load\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n    load(Path('pipeline.yaml'))\n"
        "except SpecError as error:\n    print(len(str(error)))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    said, grown = map(int, done.stdout.split())
    assert said < 10_000
    assert grown < 200 << 10  # KiB


def test_what_reading_takes_is_bounded_by_what_is_counted(spec: SpecFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """The counts at which reading ends, each just passed and just kept; docs/guarantees.md has what they take."""
    spec.write("light_stage.py", STAGE)
    monkeypatch.setattr(registry, "shipped", lambda: registry.Provider(stages={"light": "light_stage:Light"}))
    monkeypatch.setattr(reader, "SIZE_LIMIT", 60)
    monkeypatch.setattr(scope, "_ALL_TEXTS_LIMIT", 30)
    shape = HEAD + "vars: {{v: [{}], t: {}, m: &m {{a: 1, b: 2}}{}}}\nstages: {{light: {{with: {{size: 1}}}}}}\n"
    for values, text, merges, said in (
        ("1, 2", "x", "", ""),
        (",".join("1" * 60), "x", "", "it has more than 60 values"),
        ("1, 2", "x", "".join(f", n{i}: {{<<: *m}}" for i in range(20)), "more than 60"),
        ("'${vars.t}-', '${vars.t}-'", "x" * 13, "", ""),
        ("'${vars.t}-', '${vars.t}-'", "x" * 17, "", "more than 30 characters"),
    ):
        file = spec.write("p.yaml", shape.format(values, text, merges))
        try:
            load(file)
            refused = ""
        except SpecError as error:
            refused = str(error)
        assert said in refused, (said, refused)
        assert bool(said) == bool("more than" in refused), refused


def test_a_long_file_of_small_values_is_no_attack(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text(HEAD + "vars:\n  a: [" + ",".join(["1"] * 150_000) + "]\nstages: {x: {uses: y}}\n")
    with pytest.raises(SpecError, match="unknown stage 'y'") as refused:
        load(tmp_path / "p.yaml")
    assert len(refused.value.problems) == 1


def test_of_thousands_of_problems_the_first_are_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text(HEAD + "stages:\n" + "".join(f"  e{i}: {{}}\n" for i in range(9_000)))
    with pytest.raises(SpecError, match="reading ended after 2,000 problems"):
        load(tmp_path / "p.yaml")


def test_rules_that_are_compared_with_each_combination_are_bounded(
    spec: SpecFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matrix, "_EXCLUDED_LIMIT", 12)
    rules = ", ".join(f"{{x: {i}, y: 1}}" for i in range(3))
    foreach = "{{x: [0, 1, 2], y: [1, {}], exclude: [{}]}}"
    said = "3 rules for 6 combinations, more than can be compared"
    assert said in "".join(spec.wrong(f"\nstages: {{plain: {{foreach: {foreach.format('2', rules)}}}}}"))
    monkeypatch.setattr(matrix, "_EXCLUDED_LIMIT", 18)
    spec.load(HEAD + f"\nstages: {{plain: {{foreach: {foreach.format('2', rules)}}}}}")


def test_pipes_and_devices_are_no_pipelines(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.yaml")
    for name in (tmp_path / "fifo.yaml", Path("/dev/zero")):
        with pytest.raises(SpecError, match="is no regular file"):
            load(name)


def test_the_nodes_of_all_entries_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "NODES_LIMIT", 2)
    monkeypatch.setattr(module, "read_entries", lambda *_, **__: ["a", "b"])
    made = iter([type("Node", (), {"place": module.Place("f", i, 1)})() for i in range(9)])
    monkeypatch.setattr(module, "expand", lambda *_: made)
    (tmp_path / "p.yaml").write_text(HEAD + "stages: {x: {uses: y}}\n")
    with pytest.raises(SpecError, match="makes more than 2 nodes"):
        load(tmp_path / "p.yaml")
    assert len(list(made)) == 6


def test_what_looks_like_directives_in_texts_counts_for_nothing(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text(HEAD + "# %TAG\n" * 500 + "stages: {x: {uses: y, with: {text: '%TAG'}}}\n")
    with pytest.raises(SpecError) as error:
        load(tmp_path / "p.yaml")
    assert "%TAG" not in str(error.value)
    assert "y" in str(error.value)  # no stage has this name


def test_a_base_whose_name_no_file_can_have_is_a_problem_of_its_place(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text(HEAD + f"extends: {'a' * 5_000}.yaml\nstages: {{x: {{uses: y}}}}\n")
    with pytest.raises(SpecError, match=r"p\.yaml:3:10: .*File name too long"):
        load(tmp_path / "p.yaml")
