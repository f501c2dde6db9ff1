"""Calibration: what matrices read, against transformers run plainly, and what quantization makes of it."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from stagegraph.stage import StageError
from stages.calibration import asking, moments
from stages.config_parse import ConfigParse
from stages.conversion.model import Plan
from stages.quantization.parameter import quantize, restored
from stages.quantization.schemes import SCHEMES
from stages.quantize import Quantize, _importance, _uncalibrated
from stages.verification import probes
from stages.verification.original import Request
from tests.local_context import LocalContext, run_stage

EXAMPLES = Path(__file__).parents[2] / "examples"
PIECES = [[*range(5, 95)], [*range(40, 70)]]


def measured(example: str, work: Path) -> dict[str, np.ndarray]:
    folder = EXAMPLES / example
    parsed = run_stage(ConfigParse(), work / "parsed", {"checkpoint": str(folder)}).out
    files = {path.name: path for path in folder.glob("*.safetensors")}
    return moments.compute(Request(folder, files, parsed / "model.json", PIECES, 0, work), lambda *_: None)


def test_moments_are_those_of_transformers(tmp_path):
    """Piece by piece and unpadded, with hooks of the test's own, and the head run as transformers runs it."""
    found = measured("tiny-llama", tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(EXAMPLES / "tiny-llama", dtype=torch.float32)
    read = defaultdict(list)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, x, name=name: read[f"{name}.weight"].append(x[0][0].double()))
    with torch.inference_mode():
        for piece in PIECES:
            model(torch.tensor([piece]), use_cache=False)
    assert found.keys() == read.keys()
    for name, rows in read.items():
        wanted = torch.cat(rows).square().mean(0).numpy()
        assert np.allclose(found[name], wanted, rtol=1e-4, atol=1e-6 * wanted.max()), name


def test_parts_of_a_tensor_are_known_by_where_they_lie(tmp_path):
    """The first Qwen has q, k and v in one tensor, which transformers' class takes apart and calls otherwise."""
    found = measured("tiny-qwen", tmp_path)
    block = {"attn.c_attn": 128, "attn.c_proj": 128, "mlp.w1": 128, "mlp.w2": 128, "mlp.c_proj": 352}
    wanted = {f"transformer.h.{i}.{name}.weight": k for i in range(4) for name, k in block.items()}
    assert {name: len(values) for name, values in found.items()} == {**wanted, "lm_head.weight": 128}
    assert (found["transformer.h.0.mlp.w1.weight"] == found["transformer.h.0.mlp.w2.weight"]).all()


def test_the_samples_are_none_of_the_probes():
    """Calibrated on what it is judged by, a scheme would be better than it is."""

    def sentences(path: Path) -> set[str]:
        texts = [json.dumps(content, ensure_ascii=False) for _, content in probes.segments(path)]
        return {part.strip() for text in texts for part in text.split(". ") if len(part) > 40}

    samples, judged = sentences(asking.DEFAULT), sentences(probes.DEFAULT)
    assert len(samples) > 50
    assert len(judged) > 50
    assert not samples & judged


@pytest.mark.parametrize("name", ["q4s32", "q4a64", "q4k"])
def test_errors_count_by_importance(name):
    """The weighted error is less than that of the plain search, and weights of one change nothing much."""
    rng = np.random.default_rng(7)
    weight = rng.standard_normal((64, 512)).astype(np.float32)
    importance = np.exp(3 * rng.standard_normal(512)).astype(np.float32)
    row = SCHEMES[name].body

    def cost(scales: str, counts: np.ndarray | None) -> float:
        rest = restored(quantize(weight, row, scales, counts), row, 512) - weight
        return float((rest**2 * importance).sum())

    plain, weighted, even = cost("mse", None), cost("importance", importance), cost("importance", np.ones(512))
    assert weighted < 0.9 * plain
    assert even < 1.05 * plain


def plan(importance: dict[str, np.ndarray], **row) -> Plan:
    stored = {"kind": "group", "bits": 4, "group_size": 32, "scale_dtype": "float16", "minimum": True, "levels": False}
    entry = {"name": "qkv.weight", "kind": "linear", "sources": ["q", "k"], "shape": [8, 64], "quantize": stored | row}
    return Plan({"logical": [entry]}, {}, {}, {}, "importance", 1, {}, importance)


def test_what_has_no_importance_is_named():
    one, three = np.full(64, 1, np.float32), np.full(64, 3, np.float32)
    whole = plan({"q": one, "k": three})
    scales, counts = whole.how(whole.register["logical"][0])
    assert (scales, counts.tolist()) == ("importance", [2.0] * 64)
    assert [*_uncalibrated(whole)] == []
    for lacking in (plan({"q": one}), plan({"q": one, "k": one[:32]})):
        assert lacking.how(lacking.register["logical"][0]) == ("mse", None)
        (said,) = _uncalibrated(lacking)
        assert "1 matrices have no importance" in said
        assert "qkv.weight" in said
    eight = plan({}, bits=8, minimum=False)
    assert [*_uncalibrated(eight)] == []


def test_importance_is_asked_for_by_what_lacks_it(tmp_path):
    params = Quantize().resolve(Quantize.Params("x", "q4k", "llvm", scales="importance"))
    with pytest.raises(StageError, match="add the stage calibrate"):
        _importance(LocalContext(params, tmp_path, {}, {}))
