"""What is shown of quantized weights: two results compared tensor by tensor, and the picture of the errors."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from stages.inspection import error_plot, picture, weights
from tests.stages.test_quantize import quantize, register
from tests.support.checkpoints import qwen_tensors, write_qwen, write_safetensors


def files(folder: Path) -> dict[str, Path]:
    return {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def made(tmp_path: Path):
    def make(
        name: str, scheme: str = "q4f16_1", factor: float = 1.0, target: str = "llvm", **options: object
    ) -> dict[str, Path]:
        tensors = qwen_tensors(hidden=64, layers=2, ff=96, rows=512, seed=0)
        tensors["transformer.h.1.mlp.c_proj.weight"] *= factor
        checkpoint = write_qwen(tmp_path / name / "checkpoint")
        for path in checkpoint.glob("*.safetensors*"):
            path.unlink()
        write_safetensors(checkpoint / "model.safetensors", tensors, "float32")
        inputs = register(checkpoint, tmp_path / name, scheme, target)
        return files(quantize(checkpoint, tmp_path / name / "out", scheme, inputs, target=target, **options).out)

    return make


def test_equal_weights_have_no_differences(made):
    assert weights.weights(made("a"), made("b")) == []


@pytest.mark.parametrize("scheme", ["q4f16_1", "q4f16_0", "q8f16_1", "q0f16"])
def test_two_layouts_of_equal_weights_have_no_differences(made, scheme: str):
    assert weights.weights(made("a", scheme), made("b", scheme, target="cuda")) == []
    rows = weights.weights(made("c", scheme, 1.25), made("d", scheme, target="cuda"))
    assert [row[0] for row in rows] == ["transformer.h.1.mlp.c_proj.weight", "tensors of equal content"]
    assert float(rows[0][2].split("RMSE ")[1].split(",")[0]) == pytest.approx(0.2, rel=0.05)


@pytest.mark.parametrize(
    ("scheme", "stored"), [("q4f16_1", "4 bits/32 float16"), ("q0f16", "float16"), ("e4m3_f16", "float8_e4m3fn")]
)
def test_a_changed_tensor_is_named_with_its_distance(made, scheme: str, stored: str):
    rows = weights.weights(made("a", scheme), made("b", scheme, 1.25))
    described = f"{stored} [64, 96]"
    assert [row[:2] for row in rows] == [
        ("transformer.h.1.mlp.c_proj.weight", described),
        ("tensors of equal content", "16 of 17"),
    ]
    distance = float(rows[0][2].split("RMSE ")[1].split(",")[0])
    assert distance == pytest.approx(0.25, rel=0.03)


def test_other_scales_and_schemes_are_said(made):
    rows = weights.weights(made("a"), made("b", scales="mse"))
    assert rows[0] == ("scales", "max", "mse")
    rows = weights.weights(made("c", "q4f16_1"), made("d", "q8f16_1"))
    assert rows[0] == ("scheme", "q4f16_1", "q8f16_1")
    errors = [float(row[2].split("RMSE ")[1].split(",")[0]) for row in rows[1:-1]]
    assert all(0.05 < error < 0.15 for error in errors)
    assert errors == sorted(errors, reverse=True)


def test_pictures_need_matplotlib_and_say_so(made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    report = json.loads(made("a")["report.json"].read_text())
    with pytest.raises(picture.PlotError, match=r"drawn as \.png or \.svg"):
        error_plot.draw(report, tmp_path / "errors.pdf")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(picture.PlotError, match=r"pip install 'stagegraph\[plot\]'"):
        error_plot.draw(report, tmp_path / "errors.png")


@pytest.mark.parametrize("suffix", picture.FORMATS)
def test_pictures_are_drawn(made, tmp_path: Path, suffix: str):
    pytest.importorskip("matplotlib")
    report = json.loads(made("a")["report.json"].read_text())
    error_plot.draw(report, tmp_path / f"errors{suffix}")
    start = (tmp_path / f"errors{suffix}").read_bytes()[:200]
    assert start.startswith(b"\x89PNG") if suffix == ".png" else b"<?xml" in start


def test_lines_are_grouped_by_kind():
    lines = [
        {"name": "model.layers.3.mlp.down_proj.weight", "kind": "linear", "rmse": 0.1},
        {"name": "model.layers.4.mlp.down_proj.weight", "kind": "linear", "rmse": 0.2},
        {"name": "lm_head.weight", "kind": "head", "rmse": 0.3},
    ]
    assert error_plot._by_kind(lines) == {"mlp.down_proj": [(3, 0.1), (4, 0.2)], "head": [(-1, 0.3)]}
