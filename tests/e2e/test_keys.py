"""Keys on the real pipeline: an edit of what makes a result is never answered from what an earlier code made."""

from __future__ import annotations

import json

import pytest

from stagegraph.files import dotted
from tests.support.edited_project import Project

QUANTIZE = "quantize[llvm]"


def weights(project: Project) -> dict[str, bytes]:
    (folder,) = (project.folder / "artifacts").glob(f"*/{dotted(QUANTIZE)}/weights")
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def quantized(project: Project, *argv: str) -> tuple[str, dict[str, int], dict[str, bytes]]:
    """Run quantize; return how it ended, how many tensors were made and reused, and the weights."""
    node = project.run("--stage", QUANTIZE, *argv)[QUANTIZE]
    counts = node["parts"]["tensor"]
    return node["outcome"], {how: counts[how] for how in ("made", "reused")}, weights(project)


def test_weights_are_made_anew_by_other_arithmetic(project: Project) -> None:
    right = weights(project)
    group = project.stages / "quantization" / "group.py"
    text = group.read_text()
    project.edit("quantization/group.py", "np.rint(values", "np.trunc(values")
    outcome, counts, wrong = quantized(project)
    assert (outcome, counts["reused"]) == ("BUILT", 0)
    assert wrong != right
    assert quantized(project, "--force")[2] == wrong
    group.write_text(text)
    # Of another key than before, and of the same parts.
    project.edit("quantize.py", "SLACK = 2**20", "SLACK = 2**21")
    outcome, counts, again = quantized(project)
    assert again == right
    assert counts["made"] == 0


@pytest.mark.parametrize(
    ("module", "old", "new", "node"),
    [
        ("quantization/tir_kernels.py", "CAST_LANES = 16", "CAST_LANES = 8", QUANTIZE),
        ("profiles.py", "cache_module_lookups()", "cache_module_lookups() or 1", "graph-build[llvm,softmax]"),
    ],
)
def test_code_that_runs_by_its_name_counts(project: Project, module: str, old: str, new: str, node: str) -> None:
    project.edit(module, old, new)
    said = json.loads(project("status", "overlay.yaml", "--json").stdout)
    assert {found["node"]: found["status"] for found in said["nodes"]}[node] == "STALE"


@pytest.mark.slow
def test_the_pipeline_is_built_twice_alike(built: Project) -> None:
    done = built("run", "overlay.yaml", "--check-reproducible", "--json")
    found = json.loads(done.stdout)
    assert found["reproduction"] == {"same": len(found["nodes"]), "differing": [], "failed": []}
