"""The looking verbs on the real pipeline."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

from stagegraph import api
from stages.checkpoint.safetensors import read_header
from tests.e2e.test_main_job import executed
from tests.support.edited_project import ROOT, Project
from tests.support.output_schema import validate


def test_quantize_does_not_run_for_a_tokenizer_file(project: Project) -> None:
    path = project.checkpoint / "tokenizer_config.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "model_max_length": 2048}))
    assert executed(project.run("--stage", "quantize")) == set()
    said = project("explain", "tokenizer-bundle", "overlay.yaml").stdout
    assert "tokenizer_config.json changed (source checkpoint) (overlay.yaml:3)" in said


def test_an_edited_function_is_named_and_the_graphs_compared(project: Project) -> None:
    path = project.stages / "graph" / "softmax.py"
    text, node = path.read_text(), "graph-build[llvm,softmax]"
    project.edit("graph/softmax.py", "op.softmax(logits / ", "op.softmax(op.negative(logits) / ")
    said = project("explain", node, "overlay.yaml").stdout
    assert "stages/graph/softmax.py changed (function Softmax.softmax_with_temperature)" in said
    project.run("--stage", node)
    compared = project("diff", f"{node}@~1", node, "overlay.yaml").stdout
    assert "softmax_with_temperature, call" in compared
    path.write_text(text)
    back = project.run("--stage", node)
    assert executed(back) == set()
    assert back[node]["reason"] == "back to an earlier result"


def test_changed_weights_are_named_by_tensor(project: Project) -> None:
    shard = sorted(project.checkpoint.glob("*.safetensors"))[0]
    header = read_header(shard, shard.name)
    name, info = list(header.items())[1]
    content = bytearray(shard.read_bytes())
    content[info.offset : info.offset + 4] = b"\x01\x02\x03\x04"
    shard.write_bytes(content)
    said = project("explain", "quantize", "overlay.yaml").stdout
    assert f"{shard.name} changed: 1 tensor: {name} (source checkpoint)" in said


def test_graphs_can_be_read_with_what_they_cost(built: Project) -> None:
    ir = built("show", "graph-build[llvm,decode]", "overlay.yaml", "--ir").stdout
    assert "def decode(" in ir
    assert "FLOPs" in built("show", "graph-build[llvm,decode]", "overlay.yaml", "--view", "cost").stdout
    described = built("show", "compile[llvm]:model.so", "overlay.yaml").stdout
    assert "an ELF binary" in described


def test_a_library_in_a_bundle_comes_from_its_compile_and_every_source(built: Project) -> None:
    found = json.loads(built("lineage", "bundle[llvm]:bundle/model.so", "overlay.yaml", "--json").stdout)
    assert found["copied"] == {"bundle/model.so": "compile[llvm]:model.so"}
    labels = [origin["label"] for origin in found["executions"]]
    assert labels[0] == "compile[llvm]"
    assert "config-parse" in labels
    assert "quantize[llvm]" not in labels
    sources = {name for o in found["executions"] for files in o["sources"].values() for name in files}
    assert "config.json" in sources


def test_an_exported_bundle_runs(built: Project, tmp_path: Path) -> None:
    target = tmp_path / "ship" / "model"
    built("export", "bundle[llvm]:bundle", str(target), "overlay.yaml")
    assert not any(path.is_symlink() or path.stat().st_nlink > 1 for path in target.rglob("*") if path.is_file())
    said = json.loads(built("generate", str(target), "--prompt", "It was", "--max-tokens", "3", "--json").stdout)
    assert said["text"]
    result = json.loads(built("verify", str(target), "--json").stdout)
    assert result["result"] == "pass"
    assert "every token scored" in {check["name"] for check in result["checks"]}
    certificate = json.loads((target / "certificate.json").read_text())
    record = json.loads(built("show", "verify[llvm]", "overlay.yaml", "--json").stdout)["verify[llvm]"]
    assert certificate["made"]["tools"] == record["document"]["tools"]
    assert any("no chat format" in text for text in result["unchecked"])
    built("verify", "bundle[llvm]", "overlay.yaml", "--certificate", "verify[llvm]:certificate.json")


def test_a_bundle_is_named_by_its_node(built: Project) -> None:
    options = ["overlay.yaml", "--prompt", "It was", "--max-tokens", "3", "--json"]
    for reference in ("bundle[llvm]", "bundle.llvm", "bundle[llvm]:bundle"):
        assert json.loads(built("generate", reference, *options).stdout)["bundle"] == built.checkpoint.name
    assert "did you mean 'bundle.llvm'?" in built("generate", "bundle.lvm", *options, code=2).stderr
    # Several at once, and the pipeline file among them; it goes no further than the settings.
    several = ("bundle[llvm]", "bundle.llvm", "overlay.yaml", "--name", "a", "--name", "b")
    assert "is smaller than one context" in built("serve", *several, "--cache-tokens", "1", code=2).stderr
    assert "did you mean 'bundle.llvm'?" in built("serve", "bundle[llvm]", "bundle.lvm", "overlay.yaml", code=2).stderr


def python(project: Project, code: str) -> str:
    """Run an example of the documentation as it stands, but for the name of the pipeline file."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(project.folder / "lib"), str(ROOT)])}
    command = [sys.executable, "-c", code.replace("pipeline.yaml", "overlay.yaml")]
    done = subprocess.run(command, cwd=project.folder, env=env, capture_output=True, text=True, check=True)
    return done.stdout


def test_the_page_on_python_runs_as_it_stands(built: Project) -> None:
    page = (ROOT / "docs" / "python.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    said = python(built, code)
    assert said.splitlines()[-1] == "qwen"
    assert "config-parse HIT" in said


def test_the_example_of_the_api_runs_as_it_stands(project: Project) -> None:
    example = textwrap.dedent((api.__doc__ or "").partition("\n\n")[2].partition("\n\nA :class:")[0])
    # The engine's own page knows no model; this project's pipeline has such a variable and such a node.
    for theirs, ours in (
        ('"size": "small"', '"scheme": "q0f32"'),
        ("count[english]", "quantize[llvm]"),
        ("count", "quantize"),
    ):
        assert theirs in example
        example = example.replace(theirs, ours)
    said = python(project, example + '\nprint(run.ok, report["scheme"])')
    assert float(said.splitlines()[0]) >= 0
    assert said.splitlines()[1] == "True q0f32"


def test_bundles_are_compared_without_loading_anything_heavy(built: Project) -> None:
    said = built("compare", "bundle[*]", "overlay.yaml", "--json", env={"PYTHONPROFILEIMPORTTIME": "1"})
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in said.stderr.splitlines() if "|" in line}
    assert "stagegraph" in loaded
    assert not loaded & {"tvm", "torch", "transformers", "numpy", "tokenizers", "matplotlib"}
    rows = json.loads(said.stdout)
    validate(rows, "compare")
    assert rows["bundle[llvm]"]["verdict"] == "verified"
    assert rows["bundle[llvm]"]["decode"] is None, "no bench in this pipeline"


def test_the_page_on_comparing_has_a_pipeline(built: Project) -> None:
    (overlay,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "comparing.md").read_text(), re.DOTALL)
    (built.folder / "schemes.yaml").write_text(overlay.replace("extends: pipeline.yaml", "extends: overlay.yaml"))
    planned = json.loads(built("status", "schemes.yaml", "--json").stdout)
    names = {node["node"] for node in planned["nodes"]}
    assert {"verify[llvm,q8f16_1]", "bench[llvm,q0f16]", "graph-build[llvm,kv,q4f16_1]"} <= names
