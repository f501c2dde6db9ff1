"""Rows of so many bits a weight: the choice against trying every one, and what param-register makes of it."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from stagegraph.stage import StageError
from stages.allocate import ROWS, Allocate
from stages.config_parse import ConfigParse
from stages.param_register import ParamRegister
from stages.quantization.budget import Choice, allocate, stored_bits
from stages.quantization.schemes import SCHEMES
from tests.support.checkpoints import write_qwen
from tests.support.local_context import run_stage

DOWN = "transformer.h.0.mlp.c_proj.weight"


def choices(seed: int) -> list[Choice]:
    """Matrices that cost differently much, each four times less with each bit."""
    rng = np.random.default_rng(seed)
    found = []
    for i, values in enumerate(rng.integers(1, 5, 5) * 100):
        cost, bits = rng.lognormal(0, 2), [int(values) * each for each in (2.5, 3.5, 4.5, 8.5)]
        found.append(Choice(f"m{i}", int(values), bits, [cost * 4.0**-each for each in (2.5, 3.5, 4.5, 8.5)]))
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
    assert taken == {"q2k": 2.5, "q3k": 3.5, **four, "q5k": 5.5, "q6k": 6.5, "q8f16_1": 8.5}


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


def test_bits_that_no_rows_come_to_are_refused():
    with pytest.raises(StageError, match=r"from 2\.5 to 8\.5"):
        Allocate().resolve(Allocate.Params("x", 2.0))
