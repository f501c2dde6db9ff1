"""Checkpoints that other tools quantized: read to the values that each tool's format says, and built like any other.

The formats are written here by their descriptions, bit by bit, and the values computed from the codes themselves;
compressed-tensors is compared with its own library where it is installed.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from stagegraph.stage import StageError
from stages.checkpoint.headers import read_headers
from stages.checkpoint.tensors import Weights
from stages.config_parse import ConfigParse
from stages.quantize import Quantize
from stages.runtime import tensor_cache
from stages.runtime.folder import Folder
from stages.verification import original
from stages.verification.weights import bundled_tensors
from tests.support import family_models
from tests.support.checkpoints import write_json
from tests.support.local_context import run_stage

CONFIG = {**family_models.SIZES, "hidden_size": 96, "num_key_value_heads": 2, "vocab_size": 128}
NF4 = np.array(
    [-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0, 0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626,
     0.723, 1.0], np.float32,
)  # fmt: skip
Encoded = tuple[dict[str, np.ndarray], np.ndarray]  # parts, and the values that they are


def random(*shape: int) -> np.random.Generator:
    return np.random.default_rng([len(shape), *shape])


def stream(codes: np.ndarray, bits: int) -> np.ndarray:
    """Each row's codes as one number, the first lowest, cut into words of 32 bits."""
    width = -(-codes.shape[1] * bits // 32) * 4
    numbers = [sum(int(code) << (bits * place) for place, code in enumerate(row)) for row in codes]
    return np.stack([np.frombuffer(number.to_bytes(width, "little"), "<i4") for number in numbers])


def gptq(weight: np.ndarray, *, bits: int = 4, sym: bool = True, act: bool = False, v2: bool = False) -> Encoded:
    out, inputs = weight.shape
    draw, groups = random(out, inputs, bits), inputs // 32
    codes = draw.integers(0, 2**bits, (out, inputs))
    zeros = np.full((out, groups), 2 ** (bits - 1)) if sym else draw.integers(1, 2**bits, (out, groups))
    scales = draw.uniform(0.001, 0.01, (out, groups)).astype(np.float16)
    group = np.repeat(np.arange(groups), 32)
    if act:
        group = draw.permutation(group)
    values = ((codes - zeros[:, group]).astype(np.float16) * scales[:, group]).astype(np.float16)
    parts = {
        "qweight": stream(codes, bits).T,
        "qzeros": stream((zeros - (not v2)).T, bits),
        "scales": scales.T,
        "g_idx": group.astype(np.int32),
    }
    return parts, values


def awq(weight: np.ndarray) -> Encoded:
    out, inputs = weight.shape
    draw, groups = random(out, inputs), inputs // 32
    codes, zeros = draw.integers(0, 16, (inputs, out)), draw.integers(0, 16, (groups, out))
    scales = draw.uniform(0.001, 0.01, (groups, out)).astype(np.float16)
    values = (codes - np.repeat(zeros, 32, 0)).astype(np.float16) * np.repeat(scales, 32, 0)

    def packed(matrix: np.ndarray) -> np.ndarray:
        words = np.zeros((len(matrix), out // 8), np.uint32)
        for nibble, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):  # as AutoAWQ's WQLinear_GEMM
            words |= matrix[:, column::8].astype(np.uint32) << np.uint32(4 * nibble)
        return words.view(np.int32)

    return {"qweight": packed(codes), "qzeros": packed(zeros), "scales": scales}, values.T


def compressed(weight: np.ndarray, *, bits: int = 4, sym: bool = True, groups: int = 0) -> Encoded:
    out, inputs = weight.shape
    groups = groups or inputs // 32
    draw, half = random(out, inputs, groups), 2 ** (bits - 1)
    codes = draw.integers(-half, half, (out, inputs))
    scales = draw.uniform(0.001, 0.01, (out, groups)).astype(ml_dtypes.bfloat16)
    zeros = np.zeros((out, groups), int) if sym else draw.integers(-half, half, (out, groups))
    spread = functools.partial(np.repeat, repeats=inputs // groups, axis=1)
    values = (codes - spread(zeros)).astype(ml_dtypes.bfloat16) * spread(scales)
    parts = {
        "weight_packed": stream(codes + half, bits),
        "weight_scale": scales,
        "weight_shape": np.array([out, inputs], np.int64),
    }
    if not sym:
        parts["weight_zero_point"] = stream((zeros + half).T, bits).T
    return parts, values


def int8(weight: np.ndarray) -> Encoded:
    codes = random(*weight.shape).integers(-128, 128, weight.shape).astype(np.int8)
    scales = np.linspace(0.001, 0.002, len(weight), dtype=np.float32)[:, None].astype(ml_dtypes.bfloat16)
    return {"weight": codes, "weight_scale": scales}, codes.astype(ml_dtypes.bfloat16) * scales


def fp8(weight: np.ndarray, *, name: str = "weight_scale", shape: tuple[int, ...] = (1,)) -> Encoded:
    codes = weight.astype(ml_dtypes.float8_e4m3fn)
    scales = np.linspace(0.5, 1.5, int(np.prod(shape)), dtype=np.float32).reshape(shape)
    return {"weight": codes, name: scales}, codes.astype(np.float32) * scales


def blocks(weight: np.ndarray, side: int = 64, dtype: Any = np.float32) -> Encoded:
    """Blocks that do not divide the matrix, as the last of DeepSeek's; scales of ``dtype``, as Qwen's of bfloat16."""
    codes = weight.astype(ml_dtypes.float8_e4m3fn)
    grid = tuple(-(-size // side) for size in weight.shape)
    scales = random(*grid).uniform(0.5, 1.5, grid).astype(dtype)
    wide = scales.astype(np.float32).repeat(side, 0).repeat(side, 1)[: weight.shape[0], : weight.shape[1]]
    return {"weight": codes, "weight_scale_inv": scales}, codes.astype(np.float32) * wide


def nf4(weight: np.ndarray, *, nested: bool = False) -> Encoded:
    draw, size = random(*weight.shape), weight.size
    codes = draw.integers(0, 16, size)
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [*weight.shape]}
    largest = draw.uniform(0.01, 0.1, size // 64).astype(np.float32)
    parts: dict[str, np.ndarray] = {}
    if nested:
        table, codes8 = np.linspace(-1, 1, 256, dtype=np.float32), draw.integers(0, 256, size // 64).astype(np.uint8)
        outer = draw.uniform(0.01, 0.1, -(-size // 64 // 256)).astype(np.float32)
        largest = table[codes8] * outer[np.arange(size // 64) // 256] + np.float32(0.05)
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.05}
        parts |= {"weight.nested_absmax": outer, "weight.nested_quant_map": table, "weight.absmax": codes8}
    parts = {
        "weight.absmax": largest,
        "weight": (codes[::2] << 4 | codes[1::2]).astype(np.uint8)[:, None],
        "weight.quant_map": NF4,
        "weight.quant_state.bitsandbytes__nf4": np.frombuffer(json.dumps(state).encode(), np.uint8),
        **parts,
    }
    return parts, (NF4[codes] * largest.repeat(64)).astype(np.float16).reshape(weight.shape)


def llm_int8(weight: np.ndarray) -> Encoded:
    codes = random(*weight.shape).integers(-127, 128, weight.shape).astype(np.int8)
    largest = np.linspace(0.1, 0.2, len(weight), dtype=np.float32)
    parts = {"weight": codes, "SCB": largest, "weight_format": np.array(0, np.uint8)}
    return parts, codes.astype(np.float32) * largest[:, None] * np.float32(1 / 127)


def group_of(bits: int, sym: bool) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "symmetric": sym, "strategy": "group", "group_size": 32}
    return {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}, "format": "pack-quantized"}


def of(method: str, **more: Any) -> dict[str, Any]:
    return {"quant_method": method, **more}


def fp8_of(side: int) -> dict[str, Any]:
    return of("fp8", weight_block_size=[side, side], activation_scheme="dynamic")


FORMS: dict[str, tuple[Callable[..., Encoded], dict[str, Any], dict[str, Any]]] = {
    "gptq": (gptq, {}, of("gptq", bits=4, group_size=32, sym=True, desc_act=False)),
    "gptq 2 bits": (gptq, {"bits": 2, "sym": False}, of("gptq", bits=2, group_size=32, sym=False)),
    "gptq 3 bits": (gptq, {"bits": 3, "sym": False}, of("gptq", bits=3, group_size=32, sym=False)),
    "gptq 8 bits act-order": (gptq, {"bits": 8, "act": True}, of("gptq", bits=8, sym=True, desc_act=True)),
    "gptq asymmetric act-order": (gptq, {"sym": False, "act": True}, of("gptq", bits=4, sym=False, desc_act=True)),
    "gptq v2": (gptq, {"sym": False, "v2": True}, of("gptq", bits=4, sym=False, checkpoint_format="gptq_v2")),
    "gptq v2 that says v1": (gptq, {"v2": True}, of("gptq", bits=4, sym=True)),
    "awq": (awq, {}, of("awq", bits=4, group_size=32, zero_point=True, version="gemm")),
    "compressed W4A16": (compressed, {}, of("compressed-tensors", **group_of(4, True))),
    "compressed asymmetric": (compressed, {"sym": False}, of("compressed-tensors", **group_of(4, False))),
    "compressed 3 bits by row": (compressed, {"bits": 3, "groups": 1}, of("compressed-tensors", **group_of(3, True))),
    "compressed int8": (int8, {}, of("compressed-tensors", format="int-quantized")),
    "compressed fp8": (fp8, {}, of("compressed-tensors", format="float-quantized")),
    "fp8 blocks": (blocks, {}, fp8_of(64)),
    "fp8 blocks of 128": (blocks, {"side": 128}, fp8_of(128)),
    "fp8 blocks, scales in bfloat16": (blocks, {"side": 128, "dtype": ml_dtypes.bfloat16}, fp8_of(128)),
    "bitsandbytes int8": (llm_int8, {}, of("bitsandbytes", load_in_8bit=True)),
    "nf4": (nf4, {}, of("bitsandbytes", load_in_4bit=True, bnb_4bit_quant_type="nf4")),
    "nf4 twice": (nf4, {"nested": True}, of("bitsandbytes", load_in_4bit=True, bnb_4bit_use_double_quant=True)),
}


def write(folder: Path, form: str) -> dict[str, np.ndarray]:
    """Write a Llama whose layers' matrices are in a form; return the values of all its tensors, float32."""
    import torch
    import transformers
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG))
    encode, options, declared = FORMS[form]
    stored: dict[str, Any] = {}
    values: dict[str, np.ndarray] = {}
    for name, tensor in model.state_dict().items():
        if "_proj" not in name:
            stored[name], values[name] = tensor.clone(), tensor.numpy()
            continue
        parts, made = encode(tensor.numpy(), **options)
        values[name] = made.astype(np.float32)
        for part, array in parts.items():
            stored[f"{name.removesuffix('weight')}{part}"] = as_torch(array)
    folder.mkdir(exist_ok=True)
    save_file(stored, folder / "model.safetensors")
    config = {**model.config.to_dict(), "architectures": ["LlamaForCausalLM"], "quantization_config": declared}
    write_json(folder / "config.json", config)
    return values


def as_torch(array: np.ndarray) -> Any:
    import torch

    array = np.ascontiguousarray(array)
    kinds = {"bfloat16": (np.int16, torch.bfloat16), "float8_e4m3fn": (np.int8, torch.float8_e4m3fn)}
    if array.dtype.name in kinds:
        carrier, kind = kinds[array.dtype.name]
        return torch.from_numpy(array.view(carrier).copy()).view(kind)
    return torch.from_numpy(array.copy())


@pytest.mark.parametrize("form", FORMS)
def test_a_quantized_checkpoint_has_the_values_that_its_format_says(form: str, tmp_path: Path) -> None:
    """From the files to the weights of a bundle, and to the original that it is compared with."""
    values = write(tmp_path / "model", form)
    files = {path.name: path for path in (tmp_path / "model").iterdir()}
    table = read_headers(files).table()
    assert table.keys() == values.keys()
    weights = Weights(files, table)
    for name, wanted in values.items():
        np.testing.assert_array_equal(weights[name].astype(np.float32), wanted, err_msg=name)
    ports = family_models.parse_and_register(tmp_path / "stages", tmp_path / "model", "q0f32")
    choice = {"scheme": "q0f32", "target": "llvm", "checkpoint": str(tmp_path / "model")}
    ctx = run_stage(Quantize(), tmp_path / "made", choice, {name: ports[name] for name in ("params", "tensors")})
    assert ctx.warnings == []
    report = json.loads((tmp_path / "made" / "report.json").read_text())
    assert {line["rmse"] for line in report["tensors"]} == {0.0}
    compare_original(tmp_path, files, ports["config"], values)


def compare_original(tmp_path: Path, files: dict[str, Path], config: Path, values: dict[str, np.ndarray]) -> None:
    import torch

    pieces = [[1, 5, 77, 30, 2, 9, 120, 44]]
    found = original.compute(
        original.OriginalRequest(tmp_path / "model", files, config, pieces, 0, tmp_path), lambda *_: None
    )
    wanted = torch.from_numpy(logits_of(values, pieces[0]))[:-1].log_softmax(-1).topk(16).values.numpy()
    np.testing.assert_allclose(found["original_log_probs"][:, :16], wanted, atol=2e-5)
    assert "dequantized from" in str(found["original_origin"])


def logits_of(values: dict[str, np.ndarray], ids: list[int]) -> np.ndarray:
    """transformers' logits [n, V] on these tensors."""
    import torch
    import transformers

    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG)).eval()
    model.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in values.items()})
    with torch.no_grad():
        found: np.ndarray = model(torch.tensor([ids])).logits[0].numpy()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_a_bundle_of_a_quantized_checkpoint_has_the_logits_of_its_values(form: str, tmp_path: Path) -> None:
    values = write(tmp_path / "model", form)
    case = family_models.Case("Llama", CONFIG)
    session = family_models.build(tmp_path, case, "q0f32", checkpoint=tmp_path / "model").session()
    ids = [1, 5, 77, 30, 2, 9, 120, 44]
    sequence = session.add()
    found = [session.prefill(sequence, ids[:4]), *(session.decode(sequence, token) for token in ids[4:])]
    assert family_models.error(np.stack([*map(np.ravel, found)]), logits_of(values, ids)[3:]) < 1e-4


def test_int8_is_dequantized_as_by_bitsandbytes(tmp_path: Path) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    write(tmp_path, "bitsandbytes int8")
    files = {path.name: path for path in tmp_path.iterdir()}
    from safetensors.torch import load_file

    name = "model.layers.0.mlp.down_proj."
    stored = load_file(tmp_path / "model.safetensors")
    theirs = functional.int8_vectorwise_dequant(stored[f"{name}weight"], stored[f"{name}SCB"])
    np.testing.assert_array_equal(Weights(files, read_headers(files).table())[f"{name}weight"], theirs.numpy())


def write_mxfp4(folder: Path) -> dict[str, tuple[Any, Any]]:
    """Write a gpt_oss whose experts are in MXFP4; return blocks and scales by the names of what they are."""
    import torch
    from safetensors.torch import load_file, save_file

    from tests.support import traced_models

    traced_models.write(folder, "gpt_oss", hidden_size=64, intermediate_size=32)
    stored = load_file(folder / "model.safetensors")
    made = {}
    torch.manual_seed(1)
    for name in [name for name in stored if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, out = stored.pop(name).shape
        blocks = torch.randint(0, 256, (experts, out, inputs // 32, 16), dtype=torch.uint8)
        scales = torch.randint(119, 124, (experts, out, inputs // 32), dtype=torch.uint8)
        made[name] = stored[f"{name}_blocks"], stored[f"{name}_scales"] = blocks, scales
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", {**config, "quantization_config": of("mxfp4")})
    return made


def test_experts_in_mxfp4_are_what_transformers_makes_of_them(tmp_path: Path) -> None:
    from transformers.integrations import mxfp4

    made = write_mxfp4(tmp_path / "model")
    files = {path.name: path for path in (tmp_path / "model").iterdir()}
    weights = Weights(files, read_headers(files).table())
    assert len(made) == 4
    for name, (blocks, scales) in made.items():
        wanted = mxfp4.convert_moe_packed_tensors(blocks, scales).float().numpy()
        np.testing.assert_array_equal(weights[name].astype(np.float32), wanted, err_msg=name)
    ports = family_models.parse_and_register(tmp_path / "stages", tmp_path / "model", "q0f32", frontend="traced")
    choice = {"scheme": "q0f32", "target": "llvm", "checkpoint": str(tmp_path / "model")}
    run_stage(Quantize(), tmp_path / "made", choice, {name: ports[name] for name in ("params", "tensors")})
    report = json.loads((tmp_path / "made" / "report.json").read_text())
    assert {line["rmse"] for line in report["tensors"]} == {0.0}
    assert sum("BF16" in line["source_dtype"] or "bfloat16" in line["source_dtype"] for line in report["tensors"]) == 4


def test_a_scheme_of_mxfp4_keeps_experts_as_they_are_and_other_layers_in_eight_bits(tmp_path: Path) -> None:
    write_mxfp4(tmp_path / "model")
    ports = family_models.parse_and_register(tmp_path / "stages", tmp_path / "model", "mxfp4", frontend="traced")
    choice = {"scheme": "mxfp4", "target": "llvm", "checkpoint": str(tmp_path / "model")}
    ctx = run_stage(Quantize(), tmp_path / "made", choice, {name: ports[name] for name in ("params", "tensors")})
    assert ctx.warnings == []
    rows = {each["name"]: each["quantize"] for each in json.loads(ports["params"].read_bytes())["logical"]}
    kinds = {name: (row["kind"], row["bits"]) for name, row in rows.items() if row}
    report = {line["name"]: line for line in json.loads((tmp_path / "made" / "report.json").read_text())["tensors"]}
    exact = {name for name in kinds if report[name]["rmse"] == 0}
    assert len(exact) == 4
    assert {kinds[name] for name in exact} == {("mxfp4", 4)}
    assert {kinds[name] for name in kinds.keys() - exact} == {("group", 8)}


def test_a_layer_that_is_no_fp8_among_others_that_are_stays_floats(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    values = write(tmp_path / "model", "fp8 blocks of 128")
    stored, other = load_file(tmp_path / "model" / "model.safetensors"), "model.layers.1.mlp.down_proj.weight"
    stored[other] = as_torch(values[other])
    del stored[f"{other}_scale_inv"]
    save_file(stored, tmp_path / "model" / "model.safetensors")
    ports = family_models.parse_and_register(tmp_path / "stages", tmp_path / "model", "e4m3_128")
    entries = [each for each in json.loads(ports["params"].read_bytes())["logical"] if each["kind"] == "linear"]
    assert [each["name"] for each in entries if not each["quantize"]] == [other]
    assert {each["quantize"]["kind"] for each in entries if each["quantize"]} == {"float8"}


@pytest.mark.slow
def test_a_bundle_of_experts_in_mxfp4_says_what_transformers_says(tmp_path: Path) -> None:
    from tests.support import traced_models

    write_mxfp4(tmp_path / "model")
    options = {"checkpoint": tmp_path / "model", "frontend": "traced"}
    made = family_models.build(tmp_path, family_models.Case("", traced_models.SIZES), "mxfp4", **options)
    assert max(traced_models.differences(made)) < 2e-5


def test_a_scheme_on_quantized_weights_says_that_it_quantizes_twice(tmp_path: Path) -> None:
    write(tmp_path / "model", "awq")
    ports = family_models.parse_and_register(tmp_path / "stages", tmp_path / "model", "q4f16_1")
    choice = {"scheme": "q4f16_1", "target": "llvm", "checkpoint": str(tmp_path / "model")}
    ctx = run_stage(Quantize(), tmp_path / "made", choice, {name: ports[name] for name in ("params", "tensors")})
    (said,) = ctx.warnings
    assert said.startswith("8 matrices are quantized already (AWQ) and are quantized a second time as q4f16_1")


@pytest.mark.parametrize("form", ["compressed fp8", "fp8 blocks of 128", "fp8 blocks, scales in bfloat16"])
def test_float8_in_groups_holds_the_values_of_fp8_checkpoints(form: str, tmp_path: Path) -> None:
    values = write(tmp_path / "model", form)
    ports = family_models.parse_and_register(tmp_path / "stages", tmp_path / "model", "e4m3_128")
    choice = {"scheme": "e4m3_128", "target": "llvm", "checkpoint": str(tmp_path / "model")}
    ctx = run_stage(Quantize(), tmp_path / "made", choice, {name: ports[name] for name in ("params", "tensors")})
    assert ctx.warnings == []
    report = json.loads((tmp_path / "made" / "report.json").read_text())
    assert {line["rmse"] for line in report["tensors"] if "_proj" in line["name"]} == {0.0}
    records = tensor_cache.records(Folder(tmp_path / "made" / "weights"))
    held = {tensor.source: tensor for tensor in bundled_tensors(json.loads(ports["params"].read_bytes()), records)}
    for name in (name for name in values if "_proj" in name):
        np.testing.assert_array_equal(held[name].values(), values[name], err_msg=name)


def test_transformers_makes_the_same_of_blocks_with_scales_in_bfloat16() -> None:
    """For a model in float32, where products are exact."""
    import torch
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    model = torch.nn.Sequential(torch.nn.Linear(192, 128))
    parts, values = blocks(model[0].weight.detach().numpy(), side=64, dtype=ml_dtypes.bfloat16)
    given = {name: [as_torch(array)] for name, array in parts.items()}
    made = Fp8Dequantize(None).convert(given, full_layer_name="0.weight", model=model)["0.weight"]
    np.testing.assert_array_equal(made.numpy(), values)


@pytest.mark.parametrize(
    ("form", "change", "wanted"),
    [
        ("gptq", {"bits": 5}, "bits = 5; 2, 3, 4, 8 are read"),
        ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format = 'marlin'; gptq and gptq_v2 are read"),
        ("gptq", {"bits": 8}, "self_attn.k_proj: g_idx is I32 [96]; expected I32 [48]"),
        ("awq", {"version": "gemv"}, "version = 'gemv'; of AWQ, gemm is read"),
    ],
)
def test_what_a_format_does_not_say_is_refused(form: str, change: dict[str, Any], wanted: str, tmp_path: Path) -> None:
    write(tmp_path, form)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] |= change
    write_json(tmp_path / "config.json", config)
    with pytest.raises(StageError) as raised:
        run_stage(ConfigParse(), tmp_path / "out", {"checkpoint": str(tmp_path)})
    assert any(wanted in said for said in raised.value.problems), raised.value.problems


def other_format(folder: Path) -> None:
    """Say of the same weights that their zeros are stored otherwise."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["checkpoint_format"] = "gptq_v2"
    write_json(folder / "config.json", config)


def other_scales(folder: Path) -> None:
    """Change a file of scales, and not the one with their codes."""
    from safetensors.numpy import load_file, save_file

    path = folder / "scales.safetensors"
    save_file({name: array * np.float16(2) for name, array in load_file(path).items()}, path)


@pytest.mark.parametrize("change", [other_format, other_scales])
def test_a_tensor_is_made_again_when_what_it_is_dequantized_by_changes(
    change: Callable[[Path], None], tmp_path: Path
) -> None:
    """The file that a packed tensor is listed in stays as it is."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    write(folder, "gptq asymmetric act-order")
    tensors = load_file(folder / "model.safetensors")
    scales = {name: tensors.pop(name) for name in [*tensors] if name.endswith(".scales")}
    (folder / "model.safetensors").unlink()
    files = {"codes.safetensors": tensors, "scales.safetensors": scales}
    for file, found in files.items():
        save_file(found, folder / file)
    weight_map = {name: file for file, found in files.items() for name in found}
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    choice = {"scheme": "q0f32", "target": "llvm", "checkpoint": str(folder)}

    def shards(name: str, memo: Path | None = None) -> tuple[list[bytes], Any]:
        ports = family_models.parse_and_register(tmp_path / f"{name} stages", folder, "q0f32")
        inputs = {port: ports[port] for port in ("params", "tensors")}
        ctx = run_stage(Quantize(), tmp_path / name, choice, inputs, memo)
        return [path.read_bytes() for path in sorted((ctx.out / "weights").glob("*.bin"))], ctx.memo

    first, _ = shards("first", tmp_path / "memo")
    again, memo = shards("again", tmp_path / "memo")
    assert again == first
    assert not memo.counts["tensor"]["made"]
    change(folder)
    changed, memo = shards("changed", tmp_path / "memo")
    assert memo.counts["tensor"]["reused"]  # what is not packed
    assert changed == shards("fresh")[0] != first


@pytest.mark.slow
@pytest.mark.parametrize("form", [form for form in FORMS if form.startswith("compressed")])
def test_compressed_tensors_dequantizes_the_same(form: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import IntQuantizationCompressor, PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    encode, options, _ = FORMS[form]
    weight = np.random.default_rng(0).normal(0, 0.02, (64, 96)).astype(np.float32)
    parts, values = encode(weight, **options)
    kind = "float" if "fp8" in form else "int"
    strategy = {"fp8": "tensor", "int8": "channel"}.get(form.split()[1], "group" if "row" not in form else "channel")
    arguments = QuantizationArgs(
        num_bits=options.get("bits", 8 if kind == "float" or "int8" in form else 4),
        type=kind,
        symmetric=options.get("sym", True),
        strategy=strategy,
        group_size=32 if strategy == "group" else None,
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    library = PackedQuantizationCompressor if "weight_packed" in parts else IntQuantizationCompressor
    theirs = library.decompress({name: as_torch(array) for name, array in parts.items()}, scheme)["weight"]
    np.testing.assert_array_equal(theirs.float().numpy(), values.astype(np.float32))
