"""``pipeline show param-register --tensor``: both ways, from what is stored."""

from __future__ import annotations

import json

from tests.support.edited_project import Project

BLOCK = "transformer.h.0"


def show(project: Project, name: str, *argv: str, node: str = "param-register", code: int = 0) -> str:
    done = project("show", node, "overlay.yaml", "--tensor", name, *argv, code=code)
    return done.stderr if code else done.stdout


def test_a_tensor_is_followed_both_ways(built: Project) -> None:
    made = json.loads(show(built, f"{BLOCK}.mlp.gate_up_proj.q_scale", "--json"))["param-register[llvm]"]["parameter"]
    assert [source["name"] for source in made["sources"]] == [f"{BLOCK}.mlp.w2.weight", f"{BLOCK}.mlp.w1.weight"]
    assert {source["dtype"] for source in made["sources"]} <= {"BF16", "F16", "F32"}
    text = show(built, f"{BLOCK}.mlp.w1.weight")
    assert text.startswith("-- param-register[llvm] --\ncheckpoint tensor transformer.h.0.mlp.w1.weight  ")
    assert f"feeds {BLOCK}.mlp.gate_up_proj.weight" in text


def test_an_unknown_name_and_another_stage_are_said(built: Project) -> None:
    message = show(built, f"{BLOCK}.mlp.w3.weight", code=2)
    assert "nothing is named 'transformer.h.0.mlp.w3.weight'; did you mean 'transformer.h.0.mlp.w" in message
    assert f"did you mean '{BLOCK}.mlp.gate_up_proj.q_scale' or " in show(built, f"{BLOCK}.mlp.gate", code=2)
    assert "--tensor asks about param-register" in show(built, "lm_head.weight", node="bundle", code=2)


def test_headers_of_another_checkpoint_are_not_mixed_in(project: Project) -> None:
    """config-parse has read another checkpoint since; what was registered is still what param-register made."""
    path = project.checkpoint / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "initializer_range": 0.5}))
    project.run("--stage", "config-parse")
    assert "file" in show(project, "lm_head.weight", "--json")  # no other output: what was read is what there is
    for file in project.checkpoint.glob("*.safetensors*"):
        file.rename(project.checkpoint / file.name.replace("model", "weights"))
    index = next(project.checkpoint.glob("*.index.json"), None)
    if index:
        index.write_text(index.read_text().replace('"model', '"weights'))
    project.run("--stage", "config-parse")
    assert "file" not in show(project, "lm_head.weight", "--json")


def test_nothing_heavy_is_loaded(built: Project) -> None:
    done = built(
        "show", "param-register", "overlay.yaml", "--tensor", "lm_head.weight", env={"PYTHONPROFILEIMPORTTIME": "1"}
    )
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert "stagegraph" in loaded
    assert not loaded & {"tvm", "torch", "transformers", "tiktoken", "numpy", "tokenizers", "rich"}
