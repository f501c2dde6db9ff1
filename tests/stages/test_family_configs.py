"""Real config.json files of every family: what is read, registered and exported without weights, what is refused."""

from __future__ import annotations

import json
import math
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from stagegraph.planning.code import CodeDigests
from stagegraph.stage import SourceFiles, StageError
from stagegraph.store.index import Index
from stages import profiles
from stages.checkpoint.errors import ConfigError
from stages.config_parse import ConfigParse
from stages.graph import FUNCTIONS
from stages.graph_build import GraphBuild
from stages.models import FAMILIES, load_family
from stages.param_register import ParamRegister
from stages.provider import PROVIDER
from tests.support.local_context import LocalContext, run_stage

CONFIGS = {path.stem: path for path in sorted((Path(__file__).parents[1] / "data" / "configs").glob("*.json"))}
# Buffers that old files hold beside the weights.
BUFFERS = {"rotary_emb.inv_freq": "F32", "masked_bias": "F16", "bias": "BOOL"}


def raw(name: str, **changes: Any) -> dict[str, Any]:
    config = {**json.loads(CONFIGS[name].read_text()), **changes}
    return {key: value for key, value in config.items() if value is not ...}


def parse(config: Mapping[str, Any]) -> Any:
    return load_family(config["model_type"]).parse(config)


def refused(config: Mapping[str, Any]) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        parse(config)
    return caught.value.problems


# Without weights, in full size


def on_disk(config: Mapping[str, Any]) -> tuple[dict[str, tuple[int, ...]], int]:
    """Return the shapes of a checkpoint's tensors by name, and how many parameters transformers counts."""
    import torch
    import transformers

    if config["model_type"] == "qwen":
        return _of_qwen(config)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(**{k: v for k, v in config.items() if k != "architectures"})
        )
    renamed = {"lm_head.weight": "embed_out.weight"} if config["model_type"] == "gpt_neox" else {}
    shapes = {renamed.get(name, name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config["tie_word_embeddings"]:
        del shapes["lm_head.weight"]
    return shapes, sum(parameter.numel() for parameter in model.parameters())


def _of_qwen(config: Mapping[str, Any]) -> tuple[dict[str, tuple[int, ...]], int]:
    """Transformers has no such model: count its equal, and name the tensors as its published files do."""
    import torch
    import transformers

    h, ff, rows = config["hidden_size"], config["intermediate_size"] // 2, config["vocab_size"]
    block = {
        "ln_1.weight": (h,), "ln_2.weight": (h,), "attn.c_attn.weight": (3 * h, h), "attn.c_attn.bias": (3 * h,),
        "attn.c_proj.weight": (h, h), "mlp.w1.weight": (ff, h), "mlp.w2.weight": (ff, h), "mlp.c_proj.weight": (h, ff),
    }  # fmt: skip
    layers = range(config["num_hidden_layers"])
    shapes = {f"transformer.h.{i}.{name}": shape for i in layers for name, shape in block.items()}
    outside = {"wte.weight": (rows, h), "ln_f.weight": (h,)}
    shapes |= {f"transformer.{name}": shape for name, shape in outside.items()} | {"lm_head.weight": (rows, h)}
    equal = transformers.Qwen2Config(
        vocab_size=rows, hidden_size=h, intermediate_size=ff, num_hidden_layers=len(layers),
        num_attention_heads=config["num_attention_heads"], num_key_value_heads=config["num_attention_heads"],
    )  # fmt: skip
    with torch.device("meta"):
        return shapes, sum(p.numel() for p in transformers.Qwen2ForCausalLM(equal).parameters())


def header_alone(path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """Write a safetensors file whose weights are a hole."""
    entries, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * {"F16": 2, "F32": 4, "BOOL": 1}[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    header = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_real_model_is_registered_and_exported_without_its_weights(name, tmp_path):
    profiles.compiler()
    config = raw(name)
    shapes, count = on_disk(config)
    tensors = {tensor: ("F16", shape) for tensor, shape in shapes.items()}
    if config["model_type"] == "gpt_neox":
        where = "gpt_neox.layers.0.attention"
        tensors |= {f"{where}.{buffer}": (dtype, (1, 4)) for buffer, dtype in BUFFERS.items()}
    (tmp_path / "config.json").write_text(json.dumps(config))
    header_alone(tmp_path / "model.safetensors", tensors)
    stage, out = ConfigParse(), tmp_path / "config"
    out.mkdir()
    files = {path.name: path for path in tmp_path.iterdir() if path.is_file()}
    context_window = min(2048, config["max_position_embeddings"])
    params = stage.Params(checkpoint=str(tmp_path), context_window=context_window)
    stage.run(LocalContext(params, out, {}, {"checkpoint": SourceFiles(tmp_path, files, {})}))
    ports = {port: out / stage.outputs[port].path for port in ("config", "tensors")}
    choice = {"scheme": "q4f16_1", "target": "llvm"}
    registered = run_stage(ParamRegister(), tmp_path / "params", choice, ports)
    assert registered.summary_text.startswith(f"{count:,} parameters in ")
    inputs = {"config": ports["config"], "params": tmp_path / "params" / "params.json"}
    for function in FUNCTIONS:
        run_stage(GraphBuild(), tmp_path / function, {"target": "llvm", "function": function}, inputs)


# What the keys mean


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (
            raw("llama-3.1-8b"),
            raw("llama-3.1-8b", torch_dtype=..., dtype="bfloat16", rope_theta=..., rope_scaling=...,
                rope_parameters={"rope_theta": 500000.0, **raw("llama-3.1-8b")["rope_scaling"]}),
        ),
        (
            raw("redpajama-incite-3b", rotary_pct=0.25),
            raw("redpajama-incite-3b", rotary_emb_base=..., rotary_pct=...,
                rope_parameters={"rope_type": "default", "rope_theta": 10000, "partial_rotary_factor": 0.25}),
        ),
        (
            raw("qwen3-0.6b"),
            raw("qwen3-0.6b", rope_theta=..., rope_scaling=..., layer_types=["full_attention"] * 28,
                rope_parameters={"rope_type": "default", "rope_theta": 1000000}),
        ),
        (raw("mistral-7b-v0.1"), raw("mistral-7b-v0.1", sliding_window_size=..., sliding_window=4096)),
        (raw("mistral-7b-v0.1"), raw("mistral-7b-v0.1", sliding_window_size=...)),
    ],
)  # fmt: skip
def test_both_generations_of_keys_say_the_same(old, new):
    assert parse(old) == parse(new)


def test_what_the_real_configs_say():
    llama, qwen, neox = parse(raw("llama-3.1-8b")), parse(raw("qwen3-0.6b")), parse(raw("redpajama-incite-3b"))
    assert llama.rope_parameters == {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    assert qwen.rope_parameters == {"rope_type": "default", "rope_theta": 1e6}
    assert (qwen.head_dim, qwen.num_kv_heads, qwen.tied, qwen.qk_norm) == (128, 8, True, True)
    assert (neox.head_dim, neox.rotary_dim, neox.parallel_residual, neox.activation) == (80, 80, False, "gelu")
    assert parse(raw("mistral-7b-v0.1")).sliding_window == 4096
    assert parse(raw("mistral-7b-v0.1", sliding_window=None, sliding_window_size=...)).sliding_window == 0
    assert parse(raw("qwen2-0.5b")).sliding_window == 0
    sliding = parse(raw("qwen2-0.5b", use_sliding_window=True, sliding_window=1024, max_window_layers=20))
    assert (sliding.sliding_window, sliding.full_layers) == (1024, 20)
    assert parse(raw("qwen2-0.5b", use_sliding_window=True, max_window_layers=0, sliding_window=...)) == parse(
        raw("qwen2-0.5b", use_sliding_window=True, max_window_layers=0, sliding_window=4096)
    )


def test_layers_that_config_json_asks_for_are_not_listed_before_there_are_tensors_for_them() -> None:
    tracemalloc.start()
    try:
        parse(raw("qwen2-0.5b", num_hidden_layers=2_000_000, use_sliding_window=True, sliding_window=1024))
        assert tracemalloc.get_traced_memory()[1] < 4 << 20  # a list of them takes 15 MiB
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (raw("llama-2-7b", hidden_act="gelu"), "hidden_act = 'gelu'; expected one of those that are implemented: silu"),
        (raw("llama-2-7b", num_key_value_heads=5), "num_attention_heads = 32 is not a multiple of num_key_value_heads"),
        (raw("smollm2-135m", tie_word_embeddings="yes"), "tie_word_embeddings = 'yes'; expected true or false"),
        (raw("mistral-7b-v0.1", sliding_window=0), "sliding_window = 0; expected a positive integer"),
        (
            raw("mistral-7b-v0.1", layer_types=["full_attention"] + ["sliding_attention"] * 31),
            "layer_types is not supported beside sliding_window = 4096",
        ),
        (raw("llama-2-7b", sliding_window=1024), "sliding_window = 1024; expected null"),
        (raw("llama-2-7b", layer_types=["sliding_attention"] * 32), "layer_types has sliding_attention, which is not"),
        (raw("llama-2-7b", is_causal=False), "is_causal = False is not supported for model_type 'llama'"),
        (
            raw("qwen3-0.6b", layer_types=["sliding_attention"] * 28),
            "layer_types has sliding_attention, but use_sliding_window and",
        ),
        (
            raw("qwen2-0.5b", use_sliding_window=True, layer_types=["sliding_attention"] * 2 + ["full_attention"] * 22),
            "layer_types mixes its kinds",
        ),
        (
            raw("qwen2-0.5b", layer_types=["full_attention"]),
            "expected full_attention or sliding_attention for each of 24",
        ),
        (
            raw("qwen2-0.5b", num_key_value_heads=...),
            "num_attention_heads = 14 is not a multiple of num_key_value_heads",
        ),
        (
            raw("redpajama-incite-3b", hidden_act="tanh"),
            "hidden_act = 'tanh'; expected one of those that are implemented: gelu, ",
        ),
        (raw("redpajama-incite-3b", num_attention_heads=60), "hidden_size = 2560 is not a multiple of"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(config, message):
    assert [message in problem for problem in refused(config)] == [True]


@pytest.mark.parametrize("name", ["llama-3.1-8b", "redpajama-incite-3b"])
def test_the_context_ends_with_the_models_positions(name):
    config = parse(raw(name))
    family = load_family(raw(name)["model_type"])
    assert family.context_window(config, 0) == config.max_positions
    with pytest.raises(ConfigError, match=f"exceeds max_position_embeddings = {config.max_positions}"):
        family.context_window(config, config.max_positions + 1)


def test_a_context_beyond_the_window_is_refused_where_it_is_not_known_to_be_exact(tmp_path):
    config = parse(raw("mistral-7b-v0.1", num_hidden_layers=1))
    model = {
        "family": "mistral", "config": vars(config), "context_window": 8192,
        "vocab_size": 32000, "hidden_size": 4096, "num_layers": 1,
    }  # fmt: skip
    (tmp_path / "model.json").write_text(json.dumps(model))
    (tmp_path / "params.json").write_text(json.dumps({"scheme": "q4f16_1", "target": "cuda"}))
    inputs = {"config": tmp_path / "model.json", "params": tmp_path / "params.json"}
    profiles.compiler()
    with pytest.raises(
        StageError, match=r"sliding_window = 4096.* beyond it on target cuda cannot be built; set context"
    ):
        run_stage(GraphBuild(), tmp_path / "out", {"target": "cuda", "function": "kv"}, inputs)


# Families apart


@pytest.mark.parametrize("family", FAMILIES)
def test_no_stage_of_one_family_depends_on_the_code_of_another(family, tmp_path):
    """So that adding or editing a family leaves every node of the others as it is."""
    own = {row.partition(":")[0] for row in FAMILIES.values()}
    index = Index(tmp_path / "index")
    for reference in PROVIDER.stages.values():
        module, _, name = reference.partition(":")
        rows = {"stages.models:FAMILIES": family}
        reached = CodeDigests(index).closure(module, rows)
        assert not own & set(reached) - {FAMILIES[family].partition(":")[0]}, name
        tables = {part for part in reached if part.startswith("stages.models:FAMILIES")}
        assert tables <= {f"stages.models:FAMILIES[{family}]"}
    index.close()
