"""The whole path on the example checkpoint: built, verified, and afterwards only what really changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.support.edited_project import Project

GRAPH_NODES = {f"graph-build[llvm,{f}]" for f in ("embed", "prefill", "decode", "kv", "softmax")}


def executed(nodes: dict) -> set[str]:
    return {name for name, node in nodes.items() if node["outcome"] not in {"HIT", "SKIPPED"}}


def test_the_bundle_is_verified_and_a_second_run_executes_nothing(built: Project) -> None:
    again = built.run()
    assert {node["outcome"] for node in again.values()} == {"HIT"}
    assert again["verify[llvm]"]["summary"].startswith("verified")
    card = (built.folder / "artifacts/tiny-qwen/verify.llvm/card.md").read_text()
    assert "recorded" in card
    assert built("status", "overlay.yaml", "--check").returncode == 0


def test_generate_continues_the_prompt_as_recorded(built: Project) -> None:
    recording = json.loads((built.checkpoint / "reference" / "reference.json").read_text())
    (case,) = [c for c in recording["cases"] if c["scheme"] == "q4f32_1"]
    bundle = "artifacts/tiny-qwen/bundle.llvm/bundle"
    for wanted in case["continuations"][:2]:
        argv = ("--prompt", wanted["prompt"], "--max-tokens", str(len(wanted["ids"])), "--json")
        said = json.loads(built("generate", bundle, *argv).stdout)
        assert said["text"] == wanted["text"]
        assert said["decode_tokens_per_second"] > 0


def test_a_cosmetic_edit_of_softmax_reruns_nothing(project: Project) -> None:
    path = project.stages / "graph" / "softmax.py"
    path.write_text(path.read_text() + "\n# a remark\n")
    assert executed(project.run()) == set()


def test_an_edit_of_softmax_reruns_softmax_and_what_changed_below(project: Project) -> None:
    path = project.stages / "graph" / "softmax.py"
    path.write_text(path.read_text() + "\nUNUSED = 1\n")
    nodes = project.run()
    assert executed(nodes) == {"graph-build[llvm,softmax]"}
    assert nodes["graph-build[llvm,softmax]"]["outcome"] == "UNCHANGED"
    assert nodes["graph-build[llvm,softmax]"]["reason"] == "code stages.graph.softmax changed"


def test_adding_a_family_leaves_every_node_a_hit(project: Project) -> None:
    shutil.copy(project.stages / "models" / "qwen.py", project.stages / "models" / "other.py")
    project.edit("models/__init__.py", '"qwen": ', '"other": "stages.models.other:FAMILY", "qwen": ')
    assert executed(project.run()) == set()


def test_a_tokenizer_file_does_not_touch_the_weights(project: Project) -> None:
    path = project.checkpoint / "tokenizer_config.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "model_max_length": 2048}))
    assert executed(project.run("--stage", "quantize", "--stage", "compile")) == set()
    assert "tokenizer-bundle" in executed(project.run("--stage", "tokenizer-bundle"))


def test_changing_weights_leaves_graph_compile_and_tokenizer_alone(project: Project) -> None:
    shard = sorted(project.checkpoint.glob("*.safetensors"))[0]
    content = bytearray(shard.read_bytes())
    content[-64:] = bytes(64)
    shard.write_bytes(content)
    ran = executed(project.run("--stage", "bundle"))
    assert ran == {"config-parse", "quantize[llvm]", "bundle[llvm]"}
    assert "stale: it was recorded" in json.dumps(project.run(code=1)["verify[llvm]"]["problems"]), (
        "a stale recording fails verify"
    )


def test_force_rebuilds_identical_bytes(project: Project) -> None:
    nodes = project.run("--force", "--stage", "quantize", "--stage", "graph-build[*,decode]", "--stage", "bundle")
    forced = {name: node["reason"] for name, node in nodes.items() if name in executed(nodes)}
    assert forced == dict.fromkeys(
        ["quantize[llvm]", "graph-build[llvm,decode]", "bundle[llvm]"], "forced; the result is identical"
    )


def test_unknown_names_are_spec_errors_with_the_nearest(project: Project) -> None:
    error = project("run", "overlay.yaml", "--set", "vars.scheme=q4f33_1", "--set", "vars.targets=[lvm]", code=2).stderr
    assert "unknown value 'q4f33_1'; did you mean 'q4f32_1'?" in error
    assert "unknown value 'lvm'; did you mean 'llvm'?" in error
    assert "Traceback" not in error


def test_no_checkpoint_is_said_with_its_place(project: Project) -> None:
    error = project("run", "overlay.yaml", "--set", "vars.checkpoint=nowhere", code=2).stderr
    assert "there is no file or directory" in error
    assert "--set vars.checkpoint" in error


def test_a_hub_snapshot_is_the_same_checkpoint(project: Project, tmp_path: Path) -> None:
    hub = tmp_path / f"models--someone--{project.checkpoint.name}"  # the bundle is named after it
    blobs, snapshot = hub / "blobs", hub / "snapshots" / "main"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, file in enumerate(p for p in project.checkpoint.rglob("*") if p.is_file()):
        shutil.copy(file, blobs / str(i))
        link = snapshot / file.relative_to(project.checkpoint)
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(blobs / str(i))
    assert executed(project.run("--set", f"vars.checkpoint={snapshot}")) == set()


@pytest.mark.slow
def test_without_cuda_the_cpu_bundle_is_built_and_cuda_says_what_to_install(project: Project) -> None:
    """A PATH without nvcc and no NVIDIA packages to be seen: only the node that needs them fails."""
    path = project.stages / "targets" / "toolchain.py"
    assert "def toolkit(" in path.read_text()
    path.write_text(path.read_text() + '\n\ndef toolkit(kind: str = "auto") -> None:\n    return None\n')
    nodes = project.run("--set", "vars.targets=[llvm, cuda]", code=1)
    assert nodes["bundle[llvm]"]["outcome"] in {"HIT", "BUILT", "UNCHANGED"}
    assert nodes["compile[cuda]"]["outcome"] == "FAILED"
    assert "pip install" in nodes["compile[cuda]"]["problems"][0]
    assert nodes["bundle[cuda]"]["outcome"] == "SKIPPED"
