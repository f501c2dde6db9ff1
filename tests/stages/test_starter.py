"""The pipeline file that a checkpoint is begun with."""

from __future__ import annotations

import argparse
import json
import math
import re
from pathlib import Path

import pytest
import yaml

from stages.cli import starter
from stages.quantization.schemes import SCHEMES

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "tiny-qwen"


def test_the_stages_are_those_of_the_repository() -> None:
    ours = yaml.safe_load((ROOT / "pipeline.yaml").read_text())
    assert yaml.safe_load(starter.STAGES.read_text())["stages"] == ours["stages"]


def test_the_file_says_what_was_found_and_chosen(tmp_path: Path) -> None:
    model = starter.examine(EXAMPLE)
    text = starter.compose(EXAMPLE, model, {"scheme": "q8f16_1"}, tmp_path)
    read = yaml.safe_load(text)
    assert read["vars"] == {
        "checkpoint": str(EXAMPLE), "scheme": "q8f16_1", "context_window": model.positions, "targets": ["llvm"],
    }  # fmt: skip
    assert model.positions == json.loads((EXAMPLE / "config.json").read_text())["seq_length"]
    inside = yaml.safe_load(starter.compose(EXAMPLE, model, {}, EXAMPLE.parent))
    assert inside["vars"]["checkpoint"] == "tiny-qwen"
    for targets, scheme in ((["llvm"], "q4k"), (["llvm", "cuda"], "q4f16_1")):
        assert (
            yaml.safe_load(starter.compose(EXAMPLE, model, {"targets": targets}, tmp_path))["vars"]["scheme"] == scheme
        )


def test_with_a_budget_the_stages_are_the_same_and_those_that_choose_rows(tmp_path: Path) -> None:
    text = starter.compose(EXAMPLE, starter.examine(EXAMPLE), {"bits": 4.5}, tmp_path)
    read, ours = yaml.safe_load(text), yaml.safe_load(starter.STAGES.read_text())["stages"]
    assert [read["vars"][name] for name in ("bits", "scheme")] == [4.5, "q4k"]
    stages = read["stages"]
    checkpoint = {"checkpoint": "${vars.checkpoint}"}
    assert stages.pop("calibrate") == {
        "needs": ["config-parse", "tokenizer-bundle"], "with": {**checkpoint, "feedback": True},
    }  # fmt: skip
    assert stages.pop("allocate") == {
        "needs": ["config-parse", "tokenizer-bundle", "calibrate"],
        "with": {**checkpoint, "bits": "${vars.bits}", "scales": "gptq"},
    }
    ours["param-register"]["needs"] += ["allocate"]
    ours["quantize"]["needs"] += ["calibrate"]
    ours["quantize"]["with"]["scales"] = "gptq"
    assert stages == ours
    page = (ROOT / "docs" / "quantization.md").read_text()
    (beside,) = [block for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL) if "allocate:" in block]
    for name, entry in yaml.safe_load(beside)["stages"].items():
        whole = yaml.safe_load(text.replace('"${vars.bits}"', "4.5"))["stages"][name]
        assert entry["needs"] == whole["needs"], name
        assert entry.get("with", {}).items() <= whole["with"].items()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--bits", "1"], "--bits 1: expected 2.3 to 16"),
        (["--bits", "nan"], "--bits nan: expected 2.3 to 16"),
        (["--bits", "4", "--scheme", "q4k"], "--scheme q4k, --bits 4: each says how matrices are stored"),
        (["--bits", "4", "--targets", "llvm,cuda"], "for which target cuda has no schedule"),
    ],
)
def test_a_budget_that_nothing_comes_to_is_refused(argv: list[str], said: str) -> None:
    parser = argparse.ArgumentParser()
    starter.add_arguments(parser)
    assert starter.settings(parser.parse_args(["--bits", "2.3", "--targets", "llvm"])) == {
        "bits": 2.3, "targets": ["llvm"],
    }  # fmt: skip
    with pytest.raises(ValueError, match=re.escape(said)):
        starter.settings(parser.parse_args(argv))


def test_weights_that_are_quantized_already_are_stored_as_they_are(tmp_path: Path) -> None:
    from tests.stages import test_prequantized

    test_prequantized.write(tmp_path / "fp8", "fp8 blocks of 128")
    test_prequantized.write_mxfp4(tmp_path / "mxfp4")
    for form, scheme in (("fp8", "e4m3_128"), ("mxfp4", "mxfp4")):
        model = starter.examine(tmp_path / form)
        text = starter.compose(tmp_path / form, model, {}, tmp_path)
        assert yaml.safe_load(text)["vars"]["scheme"] == scheme
        assert f"scheme: {scheme} # as this checkpoint's weights are stored: {model.form}" in text
        assert re.search(rf"#   {scheme} +\d+ MiB", text)
        chosen = starter.compose(tmp_path / form, model, {"scheme": "q4k"}, tmp_path)
        assert "scheme: q4k\n" in chosen


def test_the_page_of_a_model_is_the_model() -> None:
    page = "https://huggingface.co/some/Model-1B"
    assert starter.named(page) == starter.named(f"{page}/") == "hf://some/Model-1B"
    assert starter.named(f"{page}/tree/main") == "hf://some/Model-1B@main"
    for text in (
        "https://example.org/some/Model-1B",
        f"{page}/blob/main/config.json",
        "hf://some/Model-1B",
        "some/dir",
    ):
        assert starter.named(text) == text


@pytest.mark.parametrize("scheme", ["q0f32", "q4f32_1", "q4k"])
def test_the_bytes_are_about_those_that_are_stored(scheme: str) -> None:
    from stages.checkpoint.headers import read_headers
    from stages.models import load_family

    files = {path.name: path for path in EXAMPLE.glob("*.safetensors")} | {"config.json": EXAMPLE / "config.json"}
    tensors = read_headers(files).tensors
    family = load_family("qwen")
    config = family.parse(json.loads((EXAMPLE / "config.json").read_text()))
    exact = 0
    for param in family.params(config):
        row = SCHEMES[scheme].row(param.kind, param.shape[-1])
        parts = row.stored(*param.shape) if row else (("", param.shape, SCHEMES[scheme].storage_dtype),)
        exact += sum(starter.DTYPE_BYTES[dtype] * math.prod(shape) for _, shape, dtype in parts)
    assert starter.stored_bytes(SCHEMES[scheme], tensors) == pytest.approx(exact, rel=0.02)


def test_a_scheme_that_does_not_fit_is_said_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = starter.examine(EXAMPLE)
    assert "does not fit" not in starter.compose(EXAMPLE, model, {}, tmp_path)
    monkeypatch.setattr(starter, "_memory", lambda: starter.BESIDE + 2_000_000)
    text = starter.compose(EXAMPLE, model, {}, tmp_path)
    assert [line for line in text.splitlines() if "q0f32 " in line and "does not fit" in line]
    assert not [line for line in text.splitlines() if "q4k " in line and "does not fit" in line]


def refusals(tmp_path: Path) -> list[tuple[Path, str]]:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("x")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    return [
        (Path("someone/Model-1B"), "if it is a name on the hub, write hf://someone/Model-1B"),
        (Path("~/models/x"), f"write {Path.home()}/models/x"),
        (tmp_path / "nowhere", "no such file or folder; expected a checkpoint's folder, or a GGUF file"),
        (tmp_path / "file.txt", "is a file; expected a checkpoint's folder, or a .gguf file"),
        (tmp_path / "empty", "has no config.json"),
        (EXAMPLE.parent, f"a folder in it has one: {EXAMPLE.parent / 'tiny-llama'}"),
        (tmp_path / "broken", "config.json"),
    ]


def test_what_is_no_checkpoint_is_refused_with_what_to_do(tmp_path: Path) -> None:
    for path, said in refusals(tmp_path):
        with pytest.raises(ValueError, match=re.escape(said)):
            starter.examine(path)
