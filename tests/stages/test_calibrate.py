"""Calibration: what matrices read, against transformers run plainly, and what quantization makes of it."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from threadpoolctl import threadpool_info, threadpool_limits

from stagegraph.stage import StageError
from stages.calibrate import Calibrate
from stages.calibration import asking, curvature, moments
from stages.config_parse import ConfigParse
from stages.conversion import columns
from stages.conversion.plan import Plan
from stages.quantization import refinement
from stages.quantization.feedback import INDEX, load
from stages.quantization.parameter import quantize, restored
from stages.quantization.schemes import SCHEMES
from stages.quantize import Quantize, _importance, _uncalibrated
from stages.runtime import tensor_cache
from stages.runtime.folder import Folder
from stages.targets import processor
from stages.verification import probes, weights
from stages.verification.original import OriginalRequest
from tests.support import family_models
from tests.support.local_context import LocalContext, run_stage

EXAMPLES = Path(__file__).parents[2] / "examples"
PIECES = [[*range(5, 95)], [*range(40, 70)]]


def measured(example: str, work: Path, feedback: Path | None = None) -> dict[str, np.ndarray]:
    folder = EXAMPLES / example
    parsed = run_stage(ConfigParse(), work / "parsed", {"checkpoint": str(folder)}).out
    files = {path.name: path for path in folder.glob("*.safetensors")}
    return moments.compute(
        OriginalRequest(folder, files, parsed / "model.json", PIECES, 0, work), lambda *_: None, feedback
    )


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


@pytest.mark.parametrize("name", ["q4f16_1", "q4a64", "q3k"])
def test_feedback_costs_less_on_what_is_read(tmp_path, name, monkeypatch):
    """Of inputs that go together the outputs are nearer, nearer still once refined; scales move with levels only."""
    rng = np.random.default_rng(3)
    inputs = (rng.standard_normal((600, 40)) @ rng.standard_normal((40, 256))).astype(np.float32)
    inputs += 0.1 * rng.standard_normal(inputs.shape).astype(np.float32)
    weight, row = rng.standard_normal((48, 256)).astype(np.float32), SCHEMES[name].row("linear", 256)
    curvatures = curvature.Curvatures(tmp_path)
    read = torch.from_numpy(inputs)
    for tensor in ("q", "k"):
        curvatures.add(tensor, read, read)
    curvatures.add("v", read.clone(), read)
    curvatures.add("v", read.clone(), read)  # reads twice: what it read first is gone
    curvatures.finish()
    files = json.loads((tmp_path / INDEX).read_text())
    assert files.keys() == {"q", "k"}
    assert files["q"] == files["k"]
    importance = np.square(inputs).mean(0)
    feedback = load(tmp_path / files["q"])
    plain, fed = (quantize(weight, row, "importance", importance, each) for each in (None, feedback))
    monkeypatch.setattr(refinement, "PASSES", 0)
    unrefined = quantize(weight, row, "importance", importance, feedback)
    assert all((one == other).all() for one, other in zip(plain[1:], unrefined[1:], strict=True))
    assert [(one != other).any() for one, other in zip(plain[1:], fed[1:], strict=True)] == [row.levels] * (
        len(fed) - 1
    )

    def cost(stored) -> float:
        return float(np.square(inputs @ (restored(stored, row, 256) - weight).T).sum())

    assert cost(unrefined) < 0.5 * cost(plain)
    assert cost(fed) < 0.97 * cost(unrefined)


def test_feedback_solves_for_the_columns_behind():
    """Whatever error the first column is left with, the others are moved to where least squares have them."""
    rng = np.random.default_rng(4)
    inputs = rng.standard_normal((500, 6)) @ rng.standard_normal((6, 6))
    found = curvature.feedback_of(torch.from_numpy(inputs))
    assert (np.diff(np.square(inputs).mean(0)[found.order]) <= 0).all()
    first, *rest = found.order
    square = inputs.T @ inputs / len(inputs)
    square[~np.eye(6, dtype=bool)] *= 500 / 506  # of 500 rows, six columns
    square += curvature.DAMPING * np.trace(square) / 6 * np.eye(6)
    wanted = np.linalg.solve(square[np.ix_(rest, rest)], square[rest, first])
    assert np.allclose(found.shares[0, 1:], wanted, rtol=2e-3, atol=1e-5)
    assert np.allclose(found.curvature, square[np.ix_(found.order, found.order)], rtol=1e-4, atol=1e-5)


def test_feedback_is_the_same_whatever_threads_the_machine_has():
    """So wide that LAPACK adds up otherwise with three threads than with one."""
    inputs = torch.from_numpy(np.random.default_rng(5).standard_normal((64, 1536)).astype(np.float32))
    found, before = [], torch.get_num_threads()
    for count in (1, 3):
        torch.set_num_threads(count)
        found.append(curvature.feedback_of(inputs))
        assert torch.get_num_threads() == count
    torch.set_num_threads(before)
    assert found[0].order.tobytes() == found[1].order.tobytes()
    assert found[0].shares.tobytes() == found[1].shares.tobytes()


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
        assert "1 matrices are quantized without what calibrate has found" in said
        assert "qkv.weight" in said
    eight = plan({}, bits=8, minimum=False)
    assert [*_uncalibrated(eight)] == []


@pytest.mark.parametrize("feedback", [False, True])
def test_every_output_is_written_whatever_is_asked_for(tmp_path, feedback, monkeypatch):
    """The model itself is left out: it is compared with transformers elsewhere."""
    monkeypatch.setattr(asking.Original, "ask", lambda *_: {"q": np.ones(4, np.float32)})
    checkpoint = EXAMPLES / "tiny-llama"
    parsed = run_stage(ConfigParse(), tmp_path / "parsed", {"checkpoint": str(checkpoint)}).out
    inputs = {"config": parsed / "model.json", "tokenizer": tmp_path}
    out = run_stage(Calibrate(), tmp_path / "out", {"checkpoint": str(checkpoint), "feedback": feedback}, inputs).out
    assert all((out / each.path).exists() for each in Calibrate.outputs.values())
    assert (out / "feedback" / curvature.INDEX).read_text() == "{}"


def test_what_is_made_of_several_inputs_has_no_feedback(tmp_path):
    counts, files = dict.fromkeys("qk", np.ones(64, np.float32)), (tmp_path / "1.npz", tmp_path / "2.npz")
    for second, how, said in ((files[0], "gptq", 0), (files[1], "importance", 1)):
        both = replace(plan(counts), scales="gptq", feedback={"q": files[0], "k": second})
        assert both.how(both.register["logical"][0])[0] == how
        assert len([*_uncalibrated(both)]) == said


def test_quantize_stores_what_feedback_chooses(tmp_path, monkeypatch):
    """From the model's inputs to the stored words of a parameter that is made of several tensors, q, k and v."""
    checkpoint, feedback = EXAMPLES / "tiny-llama", tmp_path / "feedback"
    feedback.mkdir()
    counts = measured("tiny-llama", tmp_path, feedback)
    np.savez(tmp_path / "importance.npz", **counts)
    files = json.loads((feedback / curvature.INDEX).read_text())
    assert files.keys() == counts.keys()
    ports = family_models.parse_and_register(tmp_path / "stages", checkpoint, "q3k")
    inputs = {name: ports[name] for name in ("params", "tensors")} | {"importance": tmp_path / "importance.npz"}
    choice = {"scheme": "q3k", "target": "llvm", "checkpoint": str(checkpoint), "scales": "gptq"}
    (tmp_path / curvature.INDEX).write_text("{}")
    with pytest.raises(StageError, match="give calibrate feedback: true"):
        run_stage(Quantize(), tmp_path / "refused", choice, {**inputs, "feedback": tmp_path})
    threads, refined = set(), refinement.codes

    def noting(*given):
        threads.update(each["num_threads"] for each in threadpool_info() if each["user_api"] == "blas")
        return refined(*given)

    with threadpool_limits(3, user_api="blas"), monkeypatch.context() as patch:
        patch.setattr(refinement, "codes", noting)
        ctx = run_stage(Quantize(), tmp_path / "made", choice, {**inputs, "feedback": feedback}, tmp_path / "parts")
    assert threads == {1}, "sums depend on the number of threads"
    assert ctx.warnings == []
    logical = json.loads(ports["params"].read_text())["logical"]
    read = [entry for entry in logical if entry["quantize"] and {*entry["sources"]} & files.keys()]
    fed = [entry for entry in read if entry["quantize"]["bits"] < 8]
    monkeypatch.setattr(processor, "exact_cpu", lambda: "another")
    there = run_stage(Quantize(), tmp_path / "there", choice, {**inputs, "feedback": feedback}, tmp_path / "parts")
    assert there.memo.counts["tensor"] == {"made": len(fed), "reused": len(logical) - len(fed)}
    registry = json.loads(ports["params"].read_text())
    records = tensor_cache.records(Folder(tmp_path / "made" / "weights"))
    found = {tensor.source: tensor for tensor in weights.bundled_tensors(registry, records)}
    tensors = safetensors.numpy.load_file(checkpoint / "model.safetensors")
    for name in ("model.layers.1.self_attn.k_proj.weight", "model.layers.0.mlp.down_proj.weight"):
        weight, row = tensors[name].astype(np.float32), found[name].row
        wanted = quantize(weight, row, "gptq", counts[name], load(feedback / files[name]))
        assert (found[name].values() == restored(wanted, row, weight.shape[1])).all(), name
        plain = quantize(weight, row, "importance", counts[name])
        assert (found[name].values() != restored(plain, row, weight.shape[1])).any()
    assert weights.differences(registry, records, tensors, "gptq") == []


def test_awq_leaves_the_model_as_it_is_and_loses_less(tmp_path):
    """Its norms times its matrices are the checkpoint's, and it finds again what a few columns were divided by."""
    checkpoint, counts = tmp_path / "outliers", measured("tiny-llama", tmp_path)
    shutil.copytree(EXAMPLES / "tiny-llama", checkpoint)
    tensors = safetensors.numpy.load_file(checkpoint / "model.safetensors")
    for name, tensor in tensors.items():  # the same model, whose norms have outliers
        if name.endswith("layernorm.weight"):
            tensor[7::40] *= 32
        elif name.split(".")[-2] in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
            tensor[:, 7::40] /= 32
            counts[name][7::40] *= 32**2
    safetensors.numpy.save_file(tensors, checkpoint / "model.safetensors")
    np.savez(tmp_path / "importance.npz", **counts)
    ports = family_models.parse_and_register(tmp_path / "stages", checkpoint, "q4s32")
    inputs = {name: ports[name] for name in ("params", "tensors")} | {"importance": tmp_path / "importance.npz"}
    choice = {"scheme": "q4s32", "target": "llvm", "checkpoint": str(checkpoint)}
    registry, held = json.loads(ports["params"].read_text()), {}
    for scales in ("awq", "importance", "mse"):
        ctx = run_stage(Quantize(), tmp_path / scales, {**choice, "scales": scales}, inputs, tmp_path / "parts")
        assert ctx.warnings == []
        records = tensor_cache.records(Folder(tmp_path / scales / "weights"))
        assert weights.differences(registry, records, tensors, scales) == []
        held[scales] = {each.source: each.values() for each in weights.bundled_tensors(registry, records)}
    lost, divided = defaultdict(float), 0
    for entry in registry["logical"]:
        if "reads" in entry:
            norm = tensors[entry["reads"]].astype(np.float64)
            factor = norm / held["awq"][entry["reads"]]
            divided += int((np.abs(factor - 1) > 0.01).any())
            for name in entry["sources"]:
                weight = tensors[name].astype(np.float64)
                for scales, values in held.items():
                    found = values[name] * (values[entry["reads"]] / norm)
                    lost[scales] += float((np.square(found - weight) @ counts[name]).sum())
    assert divided > len([name for name in tensors if name.endswith("o_proj.weight")])  # of two norms a layer
    assert lost["awq"] < 0.6 * lost["importance"] < 0.6 * lost["mse"], lost
    swapped = registry["logical"][1]["name"], "model.norm.weight"
    stored = tmp_path / "awq" / "weights"
    records = tensor_cache.records(Folder(stored))
    spoilt = {**records, swapped[0]: records[swapped[1]]}
    assert any("q_proj" in problem for problem in weights.differences(registry, spoilt, tensors, "awq"))


def test_awq_divides_the_bias_of_a_norm_too(tmp_path):
    """What GPT-NeoX's matrices make of their norms' results, by plain products of what is stored."""
    checkpoint = family_models.write(tmp_path / "checkpoint", family_models.CASES["gpt_neox"])
    tensors, chance = {}, np.random.default_rng(9)
    for file in checkpoint.glob("*.safetensors"):
        held = safetensors.numpy.load_file(file)
        for name, tensor in held.items():
            if "layernorm" in name:
                tensor[5::23] *= 24  # columns that carry most
        safetensors.numpy.save_file(held, file, {"format": "pt"})
        tensors |= held
    ports = family_models.parse_and_register(tmp_path / "stages", checkpoint, "q4s32")
    registry = json.loads(ports["params"].read_text())
    reads = {entry["sources"][0]: entry["reads"] for entry in registry["logical"] if "reads" in entry}
    assert len(reads) == 2 * family_models.NEOX["num_hidden_layers"]

    def result(values, matrix: str) -> np.ndarray:
        weight, bias = (values[f"{reads[matrix].removesuffix('weight')}{each}"] for each in ("weight", "bias"))
        return (normed * weight + bias).astype(np.float64)

    normed = chance.standard_normal((64, family_models.NEOX["hidden_size"])).astype(np.float32)
    counts = {matrix: np.square(result(tensors, matrix)).mean(0).astype(np.float32) for matrix in reads}
    np.savez(tmp_path / "importance.npz", **counts)
    inputs = {name: ports[name] for name in ("params", "tensors")} | {"importance": tmp_path / "importance.npz"}
    choice, lost = {"scheme": "q4s32", "target": "llvm", "checkpoint": str(checkpoint)}, defaultdict(float)
    for scales in ("awq", "importance"):
        run_stage(Quantize(), tmp_path / scales, {**choice, "scales": scales}, inputs, tmp_path / "parts")
        records = tensor_cache.records(Folder(tmp_path / scales / "weights"))
        assert weights.differences(registry, records, tensors, scales) == []
        values = {each.source: each.values() for each in weights.bundled_tensors(registry, records)}
        for matrix in reads:
            error = result(values, matrix) @ values[matrix].T - result(tensors, matrix) @ tensors[matrix].T
            lost[scales] += float(np.square(error).sum())
    assert lost["awq"] < 0.6 * lost["importance"], lost
    bias = reads[min(reads)].replace("weight", "bias")
    spoilt = {**tensors, bias: tensors[bias] * 1.01}
    records = tensor_cache.records(Folder(tmp_path / "awq" / "weights"))
    assert [problem.split(":")[0] for problem in weights.differences(registry, records, spoilt, "awq")] == [bias]


def test_factors_are_exact_for_the_norm_that_is_stored():
    chance = np.random.default_rng(5)
    norm = chance.standard_normal(64).astype(np.float32)
    norm[:2] = 0, 1e-3
    factor = np.exp(3 * chance.standard_normal(64)).astype(np.float32)
    factor[1] = 1e4
    exact = columns.effective(norm, factor, "float16")
    held = (norm / exact).astype(np.float16).astype(np.float64)
    assert np.allclose(held * exact, norm, rtol=2.0**-22, atol=0)
    assert np.abs(exact[:2] - 1).max() < 2.0**-10  # nothing to divide, and what float16 would not hold
    assert np.abs(exact[2:] / factor[2:] - 1).max() < 2.0**-10


def test_nothing_is_multiplied_where_nothing_is_known():
    weight, row = np.random.default_rng(6).standard_normal((8, 64)).astype(np.float32), SCHEMES["q4s32"].body
    assert columns.searched([(weight, row)], np.zeros(64, np.float32)) is None
    carried = np.where(np.arange(64) == 5, 1e4, 1).astype(np.float32)
    factor = columns.searched([(weight, row)], carried)
    assert factor.argmax() == 5
    with pytest.raises(
        columns.NothingFoldsError, match="scales: awq divides norms, and of no matrix of the family rwkv"
    ):
        columns.factors({"logical": [], "family": "rwkv"}, {}, {})


def test_importance_is_asked_for_by_what_lacks_it(tmp_path):
    params = Quantize().resolve(Quantize.Params("x", "q4k", "llvm", scales="importance"))
    with pytest.raises(StageError, match="add the stage calibrate"):
        _importance(LocalContext(params, tmp_path, {}, {}))
