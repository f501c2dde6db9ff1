"""Rows of so many bits a weight: the choice against trying every one, and what param-register makes of it."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from threadpoolctl import threadpool_limits

from stagegraph.stage import StageError
from stages.allocate import ROWS, Allocate, _calibrated
from stages.calibration import asking, moments, sensitivity, skipping
from stages.config_parse import ConfigParse
from stages.param_register import ParamRegister
from stages.quantization.budget import RowChoices, allocate, stored_bits
from stages.quantization.calibrated import Calibrated
from stages.quantization.feedback import INDEX
from stages.quantization.schemes import SCHEMES
from stages.verification.original import OriginalRequest
from tests.support.checkpoints import write_qwen
from tests.support.local_context import LocalContext, run_stage

EXAMPLES = Path(__file__).parents[2] / "examples"
DOWN = "transformer.h.0.mlp.c_proj.weight"
PIECES = [[*range(5, 70)], [7, 9, 11], [*range(150, 260)]]  # the second is too short to judge by


def choices(seed: int) -> list[RowChoices]:
    """Matrices that cost differently much, each four times less with each bit."""
    rng = np.random.default_rng(seed)
    found = []
    for i, values in enumerate(rng.integers(1, 5, 5) * 100):
        cost, bits = rng.lognormal(0, 2), [int(values) * each for each in (2.5, 3.5, 4.5, 8.5)]
        found.append(RowChoices(f"m{i}", int(values), bits, [cost * 4.0**-each for each in (2.5, 3.5, 4.5, 8.5)]))
    return found


@pytest.mark.parametrize("seed", range(6))
def test_the_choice_is_within_its_bits_and_hardly_worse_than_the_best_there_is(seed):
    given = choices(seed)
    values = sum(each.values for each in given)

    def outcome(ways) -> tuple[float, float]:
        pairs = [*zip(given, ways, strict=True)]
        return sum(each.bits[way] for each, way in pairs) / values, sum(each.loss[way] for each, way in pairs)

    for budget in (2.5, 3.5, 4.25, 6, 9):
        taken = allocate(given, budget)
        bits, loss = outcome([taken[each.name] for each in given])
        assert bits <= budget
        # No way that leaves room for one step of the largest matrix, of all there are, is better.
        room = max(each.values for each in given) * 4 / values
        tried = (outcome(ways) for ways in itertools.product(range(4), repeat=len(given)))
        assert loss <= min((each[1] for each in tried if each[0] <= budget - room), default=np.inf) * (1 + 1e-9)
    with pytest.raises(ValueError, match=r"2.4 bits a weight are fewer than the 2.50"):
        allocate(given, 2.4)


def test_rows_take_the_bits_that_their_names_say():
    taken = {name: stored_bits(body, 64, 512) / (64 * 512) for name in ROWS if (body := SCHEMES[name].body)}
    four = {"q4a64": 4.5, "q4k": 4.5, "q4a32": 5.0}
    assert taken == {"q2k": 2.3125, "q3k": 3.3125, **four, "q5k": 5.5, "q6k": 6.5, "q8f16_1": 8.5}


def test_parameters_are_stored_in_the_rows_that_a_file_names(tmp_path):
    checkpoint = write_qwen(tmp_path / "checkpoint", layers=1, dtype="float16")
    parsed = run_stage(ConfigParse(), tmp_path / "parsed", {"checkpoint": str(checkpoint)}).out
    inputs = {"config": parsed / "model.json", "tensors": parsed / "tensors.json"}
    file = tmp_path / "rows.json"

    def register(rows: object, **more: str) -> dict[str, int | None]:
        file.write_text(json.dumps(rows))
        params = {"scheme": "q4k", "target": "llvm", "rows": str(file), **more}
        out = run_stage(ParamRegister(), tmp_path / "out", params, inputs).out
        logical = json.loads((out / "params.json").read_text())["logical"]
        return {entry["name"]: entry["quantize"] and entry["quantize"]["bits"] for entry in logical}

    plain = register({"rows": {}})
    assert plain[DOWN] == 4
    assert register({"rows": {DOWN: "q6k", "transformer.wte.weight": "q0f16"}}) == {
        **plain,
        DOWN: 6,
        "transformer.wte.weight": None,
    }
    with pytest.raises(StageError, match=r"no matrix transformer\.ln_f\.weight"):
        register({"rows": {"transformer.ln_f.weight": "q6k"}})
    with pytest.raises(StageError, match="there is no scheme q7"):
        register({"rows": {DOWN: "q7"}})
    with pytest.raises(StageError, match="expected"):
        register([])
    with pytest.raises(StageError, match="no schedule"):
        register({"rows": {DOWN: "q6k"}}, scheme="q4f16_1", target="cuda")


def sensitivities(work: Path, scales: str, **more: Any) -> dict[str, np.ndarray]:
    folder = EXAMPLES / "tiny-llama"
    parsed = run_stage(ConfigParse(), work / scales, {"checkpoint": str(folder)}).out
    shards = {path.name: path for path in folder.glob("*.safetensors")}
    asked = asdict(OriginalRequest(folder, shards, parsed / "model.json", PIECES, 0, work))
    return sensitivity.compute(sensitivity.SensitivityRequest(asked, ["q3k", "q4k"], scales, **more), lambda *_: None)


def test_what_a_row_costs_is_what_transformers_loses_by_it(tmp_path):
    """The model as it is, with one matrix after the other replaced by what quantize makes of it: measured in one row,
    with scales of any kind, and foreseen to a factor of two in the other.
    """
    folder, ids = EXAMPLES / "tiny-llama", torch.tensor([[*range(5, 69)], [*range(150, 214)]])
    feedback, importance = tmp_path / "feedback", tmp_path / "importance.npz"
    feedback.mkdir()
    parsed = run_stage(ConfigParse(), tmp_path / "parsed", {"checkpoint": str(folder)}).out
    files = {path.name: path for path in folder.glob("*.safetensors")}
    request = OriginalRequest(folder, files, parsed / "model.json", [[*range(5, 300)]], 0, tmp_path)
    np.savez(importance, **moments.compute(request, lambda *_: None, feedback))
    found = {
        "max": sensitivities(tmp_path, "max"),
        "gptq": sensitivities(tmp_path, "gptq", importance=str(importance), feedback=str(feedback)),
    }
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for scales, costs in found.items():
        calibrated = Calibrated.read(scales, importance, feedback)
        for name in ("model.layers.1.mlp.down_proj.weight", "lm_head.weight"):
            weight = model.get_parameter(name)
            kept = weight.data
            with torch.inference_mode():
                wanted = model(ids).logits.log_softmax(-1)
                measured = []
                for scheme in ("q3k", "q4k"):
                    row = SCHEMES[scheme].body.fitting(kept.shape[1])
                    weight.data = torch.from_numpy(calibrated.left(kept.numpy(), row, name))
                    lost = wanted - model(ids).logits.log_softmax(-1)
                    measured.append(float((wanted.exp() * lost).sum(-1).mean()))
            weight.data = kept
            assert costs[name][0] == pytest.approx(measured[0], rel=0.02), (scales, name)
            for foreseen, found_out in zip(costs[name], measured, strict=True):
                assert found_out / 2 < foreseen < 2 * found_out, (scales, name)
    assert sum(found["gptq"].values())[0] < 0.8 * sum(found["max"].values())[0]


def test_what_rows_cost_is_the_same_whatever_threads_the_machine_has():
    """So large that NumPy adds up otherwise with three threads than with one: a choice of rows may follow from that."""
    rng, found = np.random.default_rng(6), []
    weight, read = (rng.standard_normal((n, 576)).astype(np.float32) for n in (64, 256))
    for count in (1, 3):
        losses = sensitivity.Losses([SCHEMES[name] for name in ("q2k", "q4k")], Calibrated("max"))
        with threadpool_limits(count, user_api="blas"):
            losses.add("w", "w", weight, read)
        found.append(losses.found["w"].tolist())
    assert found[0] == found[1]


def test_tensors_that_are_stored_together_are_judged_together(tmp_path, monkeypatch):
    """What gate and up cost in one pass that begins with their layer, against transformers run on both."""
    names, skipped = [f"model.layers.2.mlp.{each}_proj.weight" for each in ("gate", "up")], []
    skip = skipping.Layers.skipped
    monkeypatch.setattr(skipping.Layers, "skipped", lambda *asked: skipped.append(asked[1]) or skip(*asked))
    costs = sensitivities(tmp_path, "max", joined=[names])
    assert {1, 2, 3} <= {*skipped[2:]}  # behind those that prove that layers can be skipped
    model = transformers.AutoModelForCausalLM.from_pretrained(EXAMPLES / "tiny-llama", dtype=torch.float32)
    ids = torch.tensor([[*range(5, 69)], [*range(150, 214)]])
    with torch.inference_mode():
        wanted = model(ids).logits.log_softmax(-1)
        for name in names:
            weight = model.get_parameter(name)
            row = SCHEMES["q3k"].body.fitting(weight.shape[1])
            weight.copy_(torch.from_numpy(Calibrated("max").left(weight.numpy(), row, name)))
        lost = wanted - model(ids).logits.log_softmax(-1)
    both = float((wanted.exp() * lost).sum(-1).mean())
    assert [float(costs[name][0]) for name in names] == pytest.approx([both / 2] * 2, rel=1e-3)


class Block(torch.nn.Module):
    """A layer that counts its runs and, where ``keeps`` is a list, leaves what it read there for the last one."""

    def __init__(self, keeps: list[torch.Tensor] | None) -> None:
        super().__init__()
        self.linear, self.keeps, self.runs = torch.nn.Linear(4, 4), keeps, 0

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.runs += 1
        if self.keeps is not None:
            self.keeps.append(hidden)
            hidden = hidden + self.keeps[0]
        return self.linear(hidden)


@pytest.mark.parametrize("shared", [False, True])
def test_layers_are_skipped_unless_a_later_one_reads_more_than_the_last_computed(shared):
    torch.manual_seed(0)
    keeps: list[torch.Tensor] | None = [] if shared else None
    blocks = torch.nn.ModuleList(Block(keeps) for _ in range(4))
    model, x = torch.nn.ModuleDict({"layers": blocks}), torch.randn(2, 3, 4)

    def run(x: torch.Tensor = x) -> torch.Tensor:
        if shared:
            blocks[0].keeps.clear()
        for block in blocks:
            x = block(x)
        return x

    with torch.inference_mode():
        found, layers = skipping.recorded(model, run)
        count = layers.before([blocks[2].linear, blocks[3].linear], last=None)
        assert count == (0 if shared else 2)
        runs = [block.runs for block in blocks]
        with layers.skipped(count, 3):
            again = run(x.repeat(3, 1, 1))
    assert torch.equal(again, found.repeat(3, 1, 1))
    assert [block.runs - before for block, before in zip(blocks, runs, strict=True)] == [int(shared)] * 2 + [1, 1]


def test_matrices_are_judged_by_text_from_all_over():
    pieces = [[number] * 512 for number in range(8)]
    assert sensitivity.spread(pieces) == [[number] * sensitivity.LENGTH for number in (0, 2, 4, 6)]
    assert sensitivity.spread([[1, 2], [3, 4, 5]]) == [[3, 4, 5]]


def test_the_stage_asks_on_the_corpus_that_is_named(tmp_path, monkeypatch):
    """The model itself is left out: what is asked of it is seen, and made up costs are answered."""
    checkpoint, corpus, asked = EXAMPLES / "tiny-llama", tmp_path / "mine.txt", []
    corpus.write_text("text")

    def ask(self, _module, request, *_):
        asked.append((self.corpus, request(OriginalRequest(tmp_path, {}, tmp_path, [], 0, tmp_path))["joined"]))
        return {
            name: np.array([2.0 ** -(bits + name.endswith("down_proj.weight")) for bits in range(len(ROWS))])
            for group in asked[-1][1]
            for name in group
        }

    monkeypatch.setattr(asking.Original, "ask", ask)
    parsed = run_stage(ConfigParse(), tmp_path / "parsed", {"checkpoint": str(checkpoint)}).out
    inputs = {"config": parsed / "model.json", "tensors": parsed / "tensors.json", "tokenizer": tmp_path}
    for own in (str(corpus), ""):
        params = {"checkpoint": str(checkpoint), "bits": 4.5, "corpus": own}
        out = run_stage(Allocate(), tmp_path / "out", params, inputs).out
    assert [used for used, _ in asked] == [corpus, asking.DEFAULT]
    layer = "model.layers.0.self_attn"
    assert [f"{layer}.{each}_proj.weight" for each in "qkv"] in asked[0][1]
    rows = json.loads((out / "rows.json").read_text())
    assert rows["bits"] <= 4.5
    assert f"{layer}.qkv_proj.weight" in rows["rows"]


def test_scales_by_calibration_ask_for_it(tmp_path):
    params = Allocate().resolve(Allocate.Params(str(EXAMPLES / "tiny-llama"), bits=4.5, scales="gptq"))
    with pytest.raises(StageError, match="add the stage calibrate, and name it under needs of allocate"):
        _calibrated(LocalContext(params, tmp_path, {}, {}))
    (tmp_path / INDEX).write_text("{}")
    with pytest.raises(StageError, match="give calibrate feedback: true"):
        _calibrated(LocalContext(params, tmp_path, {"importance": tmp_path, "feedback": tmp_path}, {}))


def test_bits_that_no_rows_come_to_are_refused():
    with pytest.raises(StageError, match=r"from 2\.3 to 8\.5"):
        Allocate().resolve(Allocate.Params("x", bits=2.0))
