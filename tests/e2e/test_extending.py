"""docs/extending.md on the shipped stages, done as it says in a copy of them: a family, a scheme, a pass, a target.

One pipeline takes all four: a checkpoint of the new family, as transformers writes it, becomes a bundle in the new
scheme for the new target, lowered by the new pass, and verify holds it against transformers.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import family_models
from tests.support.edited_project import ROOT, Project
from tests.support.tokenizer_folders import FOLDERS, SIZE, write_folder

PAGE = ROOT / "docs" / "extending.md"
SECTIONS = ("A model family", "A quantization scheme", "A lowering pass", "A target")  # on the shipped stages
IN_THE_PIPELINE_FILE = {"A command", "A stage in a file beside pipeline.yaml"}  # which declares what they bring
STEP = re.compile(r"^`([\w/.]+)`(?:, after the line `([^`\n]+)`)?:\n\n```\w+\n(.*?)^```", re.MULTILINE | re.DOTALL)
OVERLAY = f"""\
extends: {ROOT}/pipeline.yaml
name: tiny-qwen
vars: {{targets: [plain], checkpoint: checkpoint, context_window: 0, scheme: q4f32_64}}
stages:
  graph-build: {{with: {{prefill_chunk: 48}}}}
  verify: {{with: {{reference: live, probe_tokens: 256, max_kl: 100, min_top1: 0, max_ppl_ratio: 100}}}}
"""
CASE = family_models.Case("SeedOss", {
    **family_models.SIZES, "num_key_value_heads": 2, "head_dim": 32, "rope_parameters": family_models.LLAMA3,
    "vocab_size": SIZE + 35, "bos_token_id": SIZE, "eos_token_id": SIZE + 1,
})  # fmt: skip
LOWERED = """
import tvm
from tvm import relax as rx
from stages.lowering.drop_casts import drop_casts
from stages.lowering.pipeline import phases
from stages.targets.table import TARGETS
assert drop_casts in phases(TARGETS["plain"])["graph"]
builder = rx.BlockBuilder()
x = rx.Var("x", rx.TensorType([2, 3], "float32"))
with builder.function("main", [x]):
    with builder.dataflow():
        y = builder.emit(rx.op.exp(builder.emit(rx.op.astype(x, "float32"))))
        out = builder.emit_output(rx.op.astype(y, "float16"))
    builder.emit_func_output(out)
print(str(drop_casts(builder.get())).count("astype"))
"""


def sections() -> dict[str, str]:
    """The sections of the page: heading -> text."""
    return dict(part.split("\n", 1) for part in PAGE.read_text().split("\n## ")[1:])


def counts() -> dict[str, int]:
    """What the table at the top of the page says: anchor of a section -> number of files."""
    rows = re.findall(r"^\| \[[^]]*\]\(#([\w-]+)\) \|.*\| (\d+) \|$", PAGE.read_text(), re.MULTILINE)
    return {anchor: int(count) for anchor, count in rows}


def anchor(section: str) -> str:
    return section.lower().replace(" ", "-").replace(".", "")


def do(section: str, folder: Path) -> set[str]:
    """Do what a section of the page says; return the files that it touched."""
    touched = set()
    for path, line, code in STEP.findall(sections()[section]):
        file = folder / path
        if line:
            lines = file.read_text().splitlines(keepends=True)
            (at,) = [number for number, found in enumerate(lines) if found.strip() == line]
            file.write_text("".join([*lines[: at + 1], code, *lines[at + 1 :]]))
        else:
            assert not file.exists()
            file.write_text(code)
        touched.add(path)
    return touched


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A pipeline on a copy of the stages that the page was done in, and a checkpoint of its family."""
    project = Project(tmp_path_factory.mktemp("extended") / "project")
    shutil.copytree(ROOT / "stages", project.stages, ignore=shutil.ignore_patterns("__pycache__"))
    for section in SECTIONS:
        assert len(do(section, project.folder / "lib")) == counts()[anchor(section)]
    files, _, _ = FOLDERS["llama3 model"]
    write_folder(project.checkpoint, files)
    family_models.write(project.checkpoint, CASE)
    (project.folder / "overlay.yaml").write_text(OVERLAY)
    return project


def test_what_is_added_as_the_page_says_is_taken(extended: Project) -> None:
    """The family reads config and tensors, the scheme and the target lay them out, the pass is in its phase."""
    extended.run("--until", "param-register")
    shown = extended.folder / "artifacts" / "tiny-qwen"
    assert json.loads((shown / "config-parse" / "model.json").read_text())["family"] == "seed_oss"
    params = json.loads((shown / "param-register.plain" / "params.json").read_text())
    assert params["scheme"] == "q4f32_64"
    words = next(param for param in params["params"] if param["name"].endswith("qkv_proj.q_weight"))
    assert words["shape"][1] == 16, "96 values are two groups of 64, of 8 words each"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(extended.folder / "lib"), str(ROOT)])}
    command = [sys.executable, "-P", "-c", LOWERED]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert said.stdout == "1\n", "the cast that changes nothing is gone, the other is not"


@pytest.mark.slow
def test_what_is_added_as_the_page_says_makes_a_verified_bundle(extended: Project) -> None:
    outcomes = extended.run()
    assert {node["outcome"] for node in outcomes.values()} <= {"BUILT", "HIT"}
    shown = extended.folder / "artifacts" / "tiny-qwen"
    report = json.loads((shown / "verify.plain" / "verify.json").read_text())
    assert (report["verdict"], report["reference"]["kind"]) == ("verified", "live")
    assert all(check["ok"] for check in report["checks"])
    card = json.loads((shown / "bundle.plain" / "bundle" / "bundle.json").read_text())
    assert (card["target"], card["model"]["scheme"]) == ("plain", "q4f32_64")


def test_the_table_counts_the_files_of_each_section() -> None:
    counted, texts = counts(), {anchor(section): text for section, text in sections().items()}
    declared = {anchor(section) for section in IN_THE_PIPELINE_FILE}
    assert {anchor(section) for section in SECTIONS} | declared | {"an-installed-package"} == counted.keys()
    for section, count in counted.items():
        files = set(re.findall(r"^`([\w/.]+)`[^\n]*\n\n```", texts[section], re.MULTILINE))
        assert len(files) + (section in declared) == count, f"{section}: {sorted(files)}"
    assert max(counted.values()) <= 4
