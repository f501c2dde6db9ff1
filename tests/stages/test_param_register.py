"""param-register: the register's contents, and every disagreement with a checkpoint listed at once."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from stagegraph.stage import StageError
from stages.config_parse import ConfigParse
from stages.param_register import ParamRegister
from stages.quantization import layouts
from tests.support.checkpoints import write_qwen
from tests.support.local_context import LocalContext, run_stage

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def parsed(tmp_path: Path) -> Path:
    checkpoint = write_qwen(tmp_path / "checkpoint", layers=1)
    run_stage(ConfigParse(), tmp_path / "parsed", {"checkpoint": str(checkpoint)})
    return tmp_path / "parsed"


def register(parsed: Path, scheme: str, target: str = "llvm") -> LocalContext:
    inputs = {"config": parsed / "model.json", "tensors": parsed / "tensors.json"}
    return run_stage(ParamRegister(), parsed.parent / scheme, {"scheme": scheme, "target": target}, inputs)


def test_each_matrix_has_the_row_of_its_kind_and_length(parsed: Path):
    register(parsed, "q4k")
    document = json.loads((parsed.parent / "q4k/params.json").read_text())
    rows = {entry["kind"]: entry["quantize"] for entry in document["logical"]}
    assert (rows["embedding"]["bits"], rows["head"]["bits"], rows["norm"]) == (8, 8, None)
    assert (rows["linear"]["bits"], rows["linear"]["levels"]) == (4, True)
    assert {entry["name"].rpartition(".")[2] for entry in document["params"]} >= {"q_weight", "q_scale", "q_outer"}


def test_a_row_that_a_target_has_no_schedule_for_is_refused(parsed: Path):
    with pytest.raises(StageError, match=r"q4k stores scales in two levels.*target cuda.*q4a64"):
        register(parsed, "q4k", "cuda")
    register(parsed, "q4a64", "cuda")


def change_tensors(parsed: Path, **changes: Any) -> None:
    """Replace entries of the tensor table; ``...`` removes one."""
    document = json.loads((parsed / "tensors.json").read_text())
    tensors = {**document["tensors"], **changes}
    document["tensors"] = {name: entry for name, entry in tensors.items() if entry is not ...}
    (parsed / "tensors.json").write_text(json.dumps(document))


def test_quantized_weights_are_stored_as_words_and_scales_in_place(parsed: Path):
    ctx = register(parsed, "q4f16_1")
    document = json.loads((parsed.parent / "q4f16_1/params.json").read_text())
    names = [entry["name"] for entry in document["params"]]
    block = "transformer.h.0"
    assert names == [
        "transformer.wte.q_weight", "transformer.wte.q_scale", f"{block}.ln_1.weight", f"{block}.attn.c_attn.q_weight",
        f"{block}.attn.c_attn.q_scale", f"{block}.attn.c_attn.bias", f"{block}.attn.c_proj.q_weight",
        f"{block}.attn.c_proj.q_scale", f"{block}.ln_2.weight", f"{block}.mlp.gate_up_proj.q_weight",
        f"{block}.mlp.gate_up_proj.q_scale", f"{block}.mlp.c_proj.q_weight", f"{block}.mlp.c_proj.q_scale",
        "transformer.ln_f.weight", "lm_head.q_weight", "lm_head.q_scale",
    ]  # fmt: skip
    stored = {entry["name"]: (entry["dtype"], entry["shape"], entry["of"]) for entry in document["params"]}
    assert stored["lm_head.q_weight"] == ("uint32", [16, 8, 32], "lm_head.weight")
    assert stored["lm_head.q_scale"] == ("float16", [16, 2, 32], "lm_head.weight")
    assert stored[f"{block}.attn.c_attn.bias"] == ("float16", [192], f"{block}.attn.c_attn.bias")
    logical = {entry["name"]: entry for entry in document["logical"]}
    assert logical[f"{block}.mlp.gate_up_proj.weight"] == {
        "name": f"{block}.mlp.gate_up_proj.weight", "shape": [192, 64], "kind": "linear", "transform": "concat0",
        "reads": f"{block}.ln_2.weight",
        "sources": [f"{block}.mlp.w2.weight", f"{block}.mlp.w1.weight"],
        "source_names": [f"{block}.mlp.w2.weight", f"{block}.mlp.w1.weight"], "source_shapes": [[96, 64], [96, 64]],
        "quantize": {
            "kind": "group", "bits": 4, "group_size": 32, "scale_dtype": "float16", "minimum": False, "levels": False
        },
        "dtype": "float16", "layout": "n32",
        "stored": [f"{block}.mlp.gate_up_proj.q_weight", f"{block}.mlp.gate_up_proj.q_scale"],
    }  # fmt: skip
    assert [name for entry in document["logical"] for name in entry["stored"]] == names
    head = {key: document[key] for key in document if key not in ("params", "logical")}
    assert head == {"schema": 1, "family": "qwen", "scheme": "q4f16_1", "target": "llvm", "layout": "n32"}
    assert ctx.facts == {"family": "qwen", "scheme": "q4f16_1", "target": "llvm"}
    assert "| concat0: transformer.h.0.mlp.w2.weight, " in ctx.views["params"]
    assert ctx.views["params"].count("\n") == 2 + len(document["logical"])


@pytest.mark.parametrize(("scheme", "dtype"), [("q0f32", "float32"), ("q0f16", "float16")])
def test_unquantized_weights_keep_their_names(parsed: Path, scheme, dtype):
    register(parsed, scheme)
    document = json.loads((parsed.parent / scheme / "params.json").read_text())
    for stored, logical in zip(document["params"], document["logical"], strict=True):
        matrix = logical["kind"] in ("linear", "embedding", "head")
        shape = layouts.shape("n32", logical["shape"]) if matrix else logical["shape"]
        assert stored == {"name": logical["name"], "shape": shape, "dtype": dtype, "of": logical["name"]}


def test_every_disagreement_is_listed_at_once(parsed: Path):
    change_tensors(
        parsed,
        **{
            "transformer.ln_f.weight": ...,
            "transformer.h.0.mlp.w1.weight": ...,
            "transformer.wte.weight": {"dtype": "BF16", "shape": [640, 64], "file": "x"},
            "transformer.h.0.attn.c_proj.weight": {"dtype": "I8", "shape": [64, 65], "file": "x"},
            "transformer.h.1.ln_1.weight": {"dtype": "BF16", "shape": [64], "file": "x"},
        },
    )
    with pytest.raises(StageError) as caught:
        register(parsed, "q4f32_1")
    assert caught.value.problems == (
        "tensor transformer.h.0.mlp.w1.weight [96, 64] is missing from the checkpoint",
        "tensor transformer.ln_f.weight [64] is missing from the checkpoint",
        "tensor transformer.wte.weight is [640, 64], the config asks for [512, 64]: config.json says vocab_size = 512",
        "tensor transformer.h.0.attn.c_proj.weight is I8; only F32, F16, BF16, F64, F8_E4M3, F8_E5M2 can be read",
        "tensor transformer.h.0.attn.c_proj.weight is [64, 65], the config asks for [64, 64]",
        "tensor transformer.h.1.ln_1.weight [64] is in the checkpoint, but no parameter of the model is made of it",
    )


def test_thousands_of_problems_of_a_kind_are_counted(parsed: Path):
    change_tensors(parsed, **{f"x.{i}": {"dtype": "F32", "shape": [1], "file": "x"} for i in range(1000)})
    change_tensors(parsed, **{"lm_head.weight": ...})
    with pytest.raises(StageError) as caught:
        register(parsed, "q0f32")
    assert caught.value.problems[0] == "tensor lm_head.weight [512, 64] is missing from the checkpoint"
    assert len(caught.value.problems) == 22
    assert caught.value.problems[-1] == "and 980 more of this kind"


@pytest.mark.parametrize(("scheme", "words", "groups"), [("q4f16_1", 12, 3), ("q3f16_1", 8, 2)])
def test_a_short_last_group_takes_the_words_of_a_full_one(tmp_path: Path, scheme: str, words: int, groups: int):
    """As in MLC-LLM's format; 80 values are two groups and a half of 32, and two of 40."""
    checkpoint = write_qwen(tmp_path / "checkpoint", layers=1, ff=80)
    run_stage(ConfigParse(), tmp_path / "parsed", {"checkpoint": str(checkpoint)})
    register(tmp_path / "parsed", scheme)
    stored = {
        entry["name"]: entry["shape"] for entry in json.loads((tmp_path / scheme / "params.json").read_text())["params"]
    }
    assert stored["transformer.h.0.mlp.c_proj.q_weight"] == [64, words]
    assert stored["transformer.h.0.mlp.c_proj.q_scale"] == [64, groups]


def test_rows_name_scheme_and_family():
    params = ParamRegister.Params(scheme="q0f32", target="llvm")
    expected = {
        "stages.quantization.schemes:SCHEMES": "q0f32",
        "stages.targets.table:TARGETS": "llvm",
        "stages.models:FAMILIES": "qwen",
    }
    assert ParamRegister().rows(params, {"family": "qwen"}) == expected
