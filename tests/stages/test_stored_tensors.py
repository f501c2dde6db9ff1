"""Checkpoints whose tensors are named, typed or distributed otherwise: what is built is what transformers loads."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from stagegraph.stage import StageError
from stages.checkpoint.headers import read_headers
from stages.checkpoint.tensors import Weights
from stages.conversion import model as conversion
from stages.models import load_family
from stages.quantization.schemes import SCHEMES
from stages.runtime import tensor_cache
from stages.runtime.folder import Folder
from stages.verification import weights
from tests.stages.test_quantize import quantize, register
from tests.support import family_models
from tests.support.checkpoints import write_json

Tensors = dict[str, torch.Tensor]
LLAMA = family_models.Case("Llama", {**family_models.SIZES, "num_hidden_layers": 1, "num_key_value_heads": 2})
TIED = family_models.Case("Qwen3", {**LLAMA.config, "head_dim": 16, "tie_word_embeddings": True})
NEOX = family_models.Case("GPTNeoX", {**family_models.NEOX, "num_hidden_layers": 1})
LAYER = "model.layers.0"


def prefixed(old: str, new: str) -> Callable[[str], str]:
    return lambda name: new + name.removeprefix(old) if name.startswith(old) else name


def write(
    folder: Path, case: family_models.Case, change: Callable[[Tensors], Tensors] = lambda tensors: tensors
) -> Path:
    """Write a checkpoint of one file, its tensors changed."""
    family_models.write(folder, case, shards=1)
    tensors = change(load_file(folder / "model.safetensors"))
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def loaded(folder: Path) -> dict[str, np.ndarray]:
    """Return what transformers makes of a checkpoint, in float32; everything must be there."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def built(checkpoint: Path, work: Path, scheme: str = "q0f32", memo: Path | None = None) -> dict[str, np.ndarray]:
    """Return what the stages store, in transformers' names; verify's own look at the checkpoint finds no difference."""
    inputs = register(checkpoint, work, scheme)
    quantize(checkpoint, work / "out", scheme, inputs, memo)
    registry = json.loads(inputs["params"].read_text())
    records = tensor_cache.records(Folder(work / "out" / "weights"))
    files = {path.name: path for path in checkpoint.iterdir()}
    seen = read_headers(files).table()  # as verify does
    assert weights.mismatched(registry, seen) == []
    assert weights.differences(registry, records, Weights(files, seen), SCHEMES[scheme].scales) == []
    held = {tensor.name: tensor.values() for tensor in weights.bundled_tensors(registry, records)}
    model = json.loads((work / "parsed/model.json").read_text())
    family = load_family(model["family"])
    return family.to_reference(family.config(**model["config"]), held)[2]


def equal(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert np.array_equal(found[name], array), name


NAMES = {
    "base model alone": (TIED, prefixed("model.", ""), "lack the prefix 'model.'"),
    "base model and head": (LLAMA, prefixed("model.", ""), "lack the prefix 'model.'"),
    "DDP": (LLAMA, lambda name: f"module.{name}", "begin with 'module.model.'"),
    "compiled": (LLAMA, lambda name: f"_orig_mod.{name}", "without their parts _orig_mod"),
    "compiled layers": (LLAMA, lambda n: n.replace("layers.0.", "layers.0._orig_mod."), "without their parts _orig"),
    "PEFT": (LLAMA, lambda name: f"base_model.model.{name}", "begin with 'base_model.model.model.'"),
    "within a vision model": (LLAMA, lambda name: f"language_model.{name}", "begin with 'language_model.model.'"),
    "vision model, new form": (TIED, prefixed("model.", "model.language_model."), "begin with 'model.language_model.'"),
    "tied, saved as its head": (TIED, prefixed("model.embed_tokens", "lm_head"), "stored as the output head"),
    "tied, saved as its head, wrapped": (
        TIED,
        lambda name: "module." + prefixed("model.embed_tokens", "lm_head")(name),
        "tied to, module.lm_head.weight",
    ),
    "head as transformers 5 calls it": (NEOX, prefixed("embed_out", "lm_head"), ""),
}  # fmt: skip


@pytest.mark.parametrize(("case", "rename", "note"), NAMES.values(), ids=NAMES)
def test_names_of_another_form_are_the_models(tmp_path: Path, case, rename, note):
    checkpoint = write(tmp_path / "checkpoint", case, lambda tensors: {rename(n): t for n, t in tensors.items()})
    equal(built(checkpoint, tmp_path / "work"), loaded(write(tmp_path / "plain", case)))
    said = parsed(checkpoint, tmp_path)
    assert len([text for text in said if note and note in text]) == bool(note)
    assert len(said) <= 2


@pytest.mark.parametrize("name", ["base model alone", "base model and head", "tied, saved as its head"])
def test_transformers_takes_the_same_names(tmp_path: Path, name):
    case, rename, _ = NAMES[name]
    checkpoint = write(tmp_path / "checkpoint", case, lambda tensors: {rename(n): t for n, t in tensors.items()})
    equal(built(checkpoint, tmp_path / "work"), loaded(checkpoint))


def parsed(checkpoint: Path, work: Path) -> list[str]:
    """Return what config-parse warns of."""
    from stages.config_parse import ConfigParse
    from tests.support.local_context import run_stage

    return run_stage(ConfigParse(), work / "warned", {"checkpoint": str(checkpoint)}).warnings


def test_names_that_fit_twice_or_never_are_one_line(tmp_path: Path):
    def twice(tensors: Tensors) -> Tensors:
        return {prefix + name: tensor.clone() for name, tensor in tensors.items() for prefix in ("a.", "b.")}

    with pytest.raises(StageError) as caught:
        register(write(tmp_path / "twice", LLAMA, twice), tmp_path / "1", "q0f32")
    (problem,) = caught.value.problems
    assert problem.endswith(
        "the checkpoint holds the model's tensors more than once, below 'a.model.' and 'b.model.'; remove those that "
        "are not meant"
    )

    def foreign(tensors: Tensors) -> Tensors:
        return {f"blk.{number}.weight": tensor for number, tensor in enumerate(tensors.values())}

    with pytest.raises(StageError) as caught:
        register(write(tmp_path / "never", LLAMA, foreign), tmp_path / "2", "q0f32")
    (problem,) = caught.value.problems
    assert "12 tensors (blk.0.weight, blk.1.weight, blk.10.weight, ...) are not named as those of a llama" in problem


def mixed_cases() -> list[Any]:
    schemes, default = sorted(SCHEMES), ("q0f32", "q4f16_1", "e4m3_f16")
    plain = [pytest.param(s, 1 << 40, marks=() if s in default else pytest.mark.slow, id=f"{s}-numpy") for s in schemes]
    kernels = [pytest.param(s, 0, marks=pytest.mark.slow, id=f"{s}-kernels") for s in schemes]
    return [*plain, *kernels]


@pytest.mark.parametrize(("scheme", "kernels"), mixed_cases())
def test_stacked_tensors_of_several_dtypes_are_widened(
    tmp_path: Path, scheme: str, kernels: int, monkeypatch: pytest.MonkeyPatch, tmp_path_factory
):
    """float16, bfloat16, float32 and float64 side by side: what is stored is that of the same values in float32."""
    dtypes = {
        "q_proj": torch.float16, "gate_proj": torch.float16, "v_proj": torch.float32, "down_proj": torch.float64,
        "input_layernorm": torch.float64,
    }  # fmt: skip

    def mixed(tensors: Tensors) -> Tensors:
        chosen = {name: [d for part, d in dtypes.items() if part in name] or [torch.bfloat16] for name in tensors}
        return {name: tensor.to(chosen[name][0]) for name, tensor in tensors.items()}

    monkeypatch.setattr(conversion, "KERNELS_FROM", kernels)
    memo = tmp_path_factory.getbasetemp() / "kernels of mixed dtypes"
    checkpoint = write(tmp_path / "mixed", LLAMA, mixed)
    wide = write(tmp_path / "wide", LLAMA, lambda tensors: {n: t.float() for n, t in mixed(tensors).items()})
    found = built(checkpoint, tmp_path / "work", scheme, memo)
    if scheme == "q0f32":
        equal(found, loaded(checkpoint))
    equal(found, built(wide, tmp_path / "work of wide", scheme))
    report = json.loads((tmp_path / "work/out/report.json").read_text())
    (stacked,) = (line for line in report["tensors"] if line["name"] == f"{LAYER}.self_attn.qkv_proj.weight")
    assert stacked["source_dtype"] == "bfloat16, float16, float32"


def test_what_no_parameter_is_made_of_is_left_out_or_refused(tmp_path: Path):
    heads = {
        f"{LAYER}.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "v_head.summary.weight": torch.ones(1, 96),
        "model.mtp_layers.0.weight": torch.ones(2, 2),
        f"{LAYER}.mlp.up_proj.bias": torch.zeros(160),
    }
    beside = ["model.mtp_layers.0.weight", "v_head.summary.weight"]
    checkpoint = write(tmp_path / "checkpoint", LLAMA, lambda tensors: tensors | heads)
    equal(built(checkpoint, tmp_path / "work"), loaded(checkpoint))
    assert parsed(checkpoint, tmp_path) == [
        f"2 tensors are of no part of a llama model and are left out, as transformers does: {', '.join(beside)}",
        f"1 biases that config.json does not have are zero and left out: {LAYER}.mlp.up_proj.bias",
    ]
    heads[f"{LAYER}.mlp.up_proj.bias"][7] = 1e-6
    with pytest.raises(StageError, match=rf"^tensor {LAYER}.mlp.up_proj.bias \[160\] is in the checkpoint, but no par"):
        register(write(tmp_path / "biased", LLAMA, lambda tensors: tensors | heads), tmp_path / "w", "q0f32")
    adapter = {f"base_model.model.{LAYER}.self_attn.q_proj.lora_A.weight": torch.ones(2, 96)}
    with pytest.raises(StageError, match=r"lora_A\.weight is of an adapter \(LoRA\), .*merge_and_unload"):
        register(write(tmp_path / "adapted", LLAMA, lambda tensors: tensors | adapter), tmp_path / "l", "q0f32")


DEEP = {"num_hidden_layers": 4}


@pytest.mark.parametrize("case", [LLAMA, NEOX], ids=lambda c: c.prefix)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_layers_beyond_the_models_are_left_out_in_one_line(tmp_path: Path, case, prefix):
    """As a checkpoint has them whose last layers predict further tokens, or that was cut in config.json alone."""
    deep = write(tmp_path / "deep", family_models.Case(case.prefix, {**case.config, **DEEP}))
    config = json.loads((deep / "config.json").read_text())
    write_json(deep / "config.json", {**config, "num_hidden_layers": 2, "layer_types": None})
    expected = loaded(deep)
    tensors = load_file(deep / "model.safetensors")
    save_file({prefix + name: tensor for name, tensor in tensors.items()}, deep / "model.safetensors")
    equal(built(deep, tmp_path / "work"), expected)
    (said,) = [text for text in parsed(deep, tmp_path) if "prefix" not in text and "begin with" not in text]
    count = len([name for name in tensors if ".2." in name or ".3." in name])
    assert said == (
        f"layers 2 to 3 of the checkpoint ({count} tensors) are not read, as transformers does: config.json's "
        "num_hidden_layers is 2"
    )


@pytest.mark.parametrize("scheme", ["q0f32", "q4f16_1"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_without_scales_is_read_for_the_numbers_that_it_is(tmp_path: Path, dtype, scheme):
    def small(tensors: Tensors) -> Tensors:
        return {name: tensor.to(dtype) if "proj" in name else tensor for name, tensor in tensors.items()}

    checkpoint = write(tmp_path / "checkpoint", LLAMA, small)
    wide = write(tmp_path / "wide", LLAMA, lambda tensors: {n: t.float() for n, t in small(tensors).items()})
    found = built(checkpoint, tmp_path / "work", scheme)
    if scheme == "q0f32":
        equal(found, loaded(checkpoint))
    equal(found, built(wide, tmp_path / "work of wide", scheme))
    assert parsed(checkpoint, tmp_path) == []
    config = json.loads((checkpoint / "config.json").read_text())
    write_json(checkpoint / "config.json", {**config, "quantization_config": {"quant_method": "fp8"}})
    with pytest.raises(StageError, match=r"quantized by a method that stores fp8 \(7 tensors"):
        parsed(checkpoint, tmp_path / "declared")


@pytest.mark.parametrize("scheme", ["q0f16", "q4f16_1"])
@pytest.mark.parametrize(
    ("case", "name", "value", "place", "said"),
    [
        (LLAMA, f"{LAYER}.self_attn.v_proj.weight", np.nan, (5, 9), "is nan"),
        (LLAMA, f"{LAYER}.mlp.up_proj.weight", -np.inf, (0, 3), "is -inf"),
        (LLAMA, f"{LAYER}.self_attn.k_proj.weight", 1e7, (31, 0), "is 1e+07"),
        (LLAMA, f"{LAYER}.self_attn.q_proj.weight", 1e300, (1, 2), "is 1e+300, which does not fit float32"),
        (NEOX, "gpt_neox.layers.0.attention.query_key_value.weight", np.nan, (300, 4), "is nan"),
    ],
    ids=["third of a stack", "second of a stack", "too large", "float64", "reordered"],
)
def test_a_value_that_cannot_be_stored_is_located_in_its_own_tensor(
    tmp_path: Path, scheme: str, case, name: str, value: float, place: tuple[int, int], said: str
):
    def spoiled(tensors: Tensors) -> Tensors:
        dtype = torch.float64 if value == 1e300 else torch.float32
        tensors = {other: tensor.to(dtype) for other, tensor in tensors.items()}
        tensors[name][place] = value
        return tensors

    with pytest.raises(StageError) as caught:
        built(write(tmp_path / "checkpoint", case, spoiled), tmp_path / "work", scheme)
    (problem,) = caught.value.problems
    assert problem.startswith(f"model.safetensors: tensor {name}")
    assert f": the value at {[*place]} {said}" in problem


def test_a_sharded_save_beside_a_whole_one_is_what_transformers_reads(tmp_path: Path):
    checkpoint = family_models.write(tmp_path / "checkpoint", LLAMA, shards=2)
    other = write(tmp_path / "other", LLAMA, lambda tensors: {name: 2 * tensor for name, tensor in tensors.items()})
    (checkpoint / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    with pytest.raises(StageError, match=r"there are two checkpoints, .* and they differ: tensor"):
        register(checkpoint, tmp_path / "both", "q0f32")
    for shard in checkpoint.glob("model-*.safetensors"):
        shard.unlink()
    equal(built(checkpoint, tmp_path / "work"), loaded(checkpoint))
    equal(built(checkpoint, tmp_path / "again"), loaded(other))


def test_a_config_of_a_billion_layers_is_refused_before_they_are_listed(tmp_path: Path):
    checkpoint = write(tmp_path / "checkpoint", LLAMA)
    config = json.loads((checkpoint / "config.json").read_text())
    write_json(checkpoint / "config.json", {**config, "num_hidden_layers": 10**9})
    with pytest.raises(StageError, match="asks for 1,000,000,000 layers, but the checkpoint has only 12 tensors"):
        register(checkpoint, tmp_path / "work", "q0f32")
