"""Rotary positions of every type: what config.json says, the frequencies beside transformers' own, the contexts."""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from stages import profiles
from stages.checkpoint.errors import ConfigError
from stages.config_parse import ConfigParse
from stages.models import load_family
from tests.support import family_models
from tests.support.checkpoints import write_qwen
from tests.support.family_models import DYNAMIC, LINEAR, SIZES, YARN, Case, error, longrope
from tests.support.local_context import run_stage

LLAMA = {
    "model_type": "llama", "vocab_size": 320, "hidden_size": 512, "intermediate_size": 64, "num_hidden_layers": 1,
    "num_attention_heads": 4, "max_position_embeddings": 4096,
}  # fmt: skip
NEOX = {**LLAMA, "model_type": "gpt_neox"}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ORIGINAL = "original_max_position_embeddings"


def parse(config: Mapping[str, Any], window: int = 0) -> Any:
    """Return the config that is built for a context, as config-parse makes it."""
    family = load_family(config["model_type"])
    parsed = family.parse(copy.deepcopy(dict(config)))
    return family.for_context(parsed, family.context_window(parsed, window))[0]


def transformers_own(config: Mapping[str, Any], positions: int) -> tuple[np.ndarray, float]:
    """Return the frequencies and the factor that transformers' model turns a sequence of so many positions by."""
    import torch
    import transformers

    values = {key: value for key, value in copy.deepcopy(dict(config)).items() if key != "model_type"}
    module, prefix = {"llama": ("llama", "Llama"), "gpt_neox": ("gpt_neox", "GPTNeoX")}[config["model_type"]]
    modeling = getattr(transformers.models, module)
    rotary = getattr(getattr(modeling, f"modeling_{module}"), f"{prefix}RotaryEmbedding")(
        getattr(transformers, f"{prefix}Config")(**values)
    )
    rotary(torch.zeros(1), torch.tensor([[positions - 1]]))
    return rotary.inv_freq.numpy(), float(rotary.attention_scaling)


def assert_as_transformers(config: Mapping[str, Any], window: int = 0) -> None:
    """Compare to the last bits of float32, of which an angle at position p takes p times as many."""
    found = parse(config, window).attention
    expected, factor = transformers_own(config, window or config["max_position_embeddings"])
    np.testing.assert_allclose(np.array(found.frequencies, np.float32), expected, rtol=2.5e-6)
    # Most are equal bit for bit; where one is rounded otherwise, the power is that of another library.
    assert np.mean(np.abs(np.array(found.frequencies, np.float32) / expected - 1) > 2**-22) < 0.1
    assert found.attention_factor == pytest.approx(factor, rel=1e-12)


SCALINGS = [
    {},
    *({"rope_type": "linear", "factor": factor} for factor in (2, 2.7)),
    *(
        {**LLAMA3, "factor": factor, "low_freq_factor": low, ORIGINAL: original}
        for factor, low, original in itertools.product((8.0, 32.0), (1.0, 1.3), (512, 8192))
    ),
    *(
        {"rope_type": "yarn", "factor": factor, ORIGINAL: original, **more}
        for factor, original in itertools.product((4.0, 40, None), (256, 4096))
        for more in (
            {},
            {"attention_factor": 1.25, "beta_fast": None, "mscale": 2.0},
            {"beta_fast": 16, "beta_slow": 2.5, "truncate": False},
            {"beta_fast": 0, "beta_slow": 0, "truncate": None},
            {"mscale": 0.707, "mscale_all_dim": 1.0},
            {"mscale": 0.707, "mscale_all_dim": 0, "attention_factor": None},
        )
    ),
]


@pytest.mark.parametrize(("head_dim", "theta"), [(32, 1e4), (80, 123456.7), (128, 5e5)])
def test_frequencies_are_those_of_transformers(head_dim, theta):
    plain = {**LLAMA, "head_dim": head_dim}
    for scaling in SCALINGS:
        assert_as_transformers({**plain, "rope_parameters": {"rope_theta": theta, **scaling}})
        assert_as_transformers({**plain, "rope_theta": theta, "rope_scaling": scaling or None})
    for factor, window in itertools.product((2.0, 2.7), (1000, 4096, 4097, 8192)):
        dynamic = {"rope_type": "dynamic", "rope_theta": theta, "factor": factor}
        assert_as_transformers({**plain, "rope_parameters": dynamic}, window)
    lists = {
        f"{name}_factor": [1 + i * slope for i in range(head_dim // 2)]
        for name, slope in (("short", 0.1), ("long", 0.37))
    }
    for more, window in itertools.product(({}, {"factor": 4.0}, {"attention_factor": 1.1}), (256, 1024, 1025, 4096)):
        scaling = {"rope_type": "longrope", "rope_theta": theta, ORIGINAL: 1024, **lists, **more}
        assert_as_transformers({**plain, "rope_parameters": scaling}, window)
        assert_as_transformers({**plain, "rope_parameters": {**scaling, ORIGINAL: 9}, ORIGINAL: 1024}, window)


@pytest.mark.parametrize(
    "config",
    [
        {**LLAMA, "rope_theta": 5e5, "rope_scaling": LLAMA3},  # the original context is that of the config
        {**LLAMA, "rope_theta": 5e5, "rope_scaling": LLAMA3, ORIGINAL: 1024},
        {**LLAMA, "rope_theta": 5e5, "rope_scaling": {**LLAMA3, ORIGINAL: 512}, ORIGINAL: 1024},
        {**LLAMA, "rope_scaling": {"type": "yarn", "factor": 4.0}},
        {**LLAMA, "rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 2.0, "mscale": 3, ORIGINAL: 9}},
        {**LLAMA, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "factor": 2.0}},
        {**LLAMA, "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "type": "default"}},
        {**LLAMA, "rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_theta": 500.0,
         "rope_parameters": {"type": "linear", "factor": 2, "rope_theta": 500}},
        {**LLAMA, "rope_scaling": {}, "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
        {**LLAMA, "partial_rotary_factor": 1.0, "rope_scaling": {**LLAMA3, "partial_rotary_factor": 1}},
        NEOX,
        {**NEOX, "rotary_pct": 0.2},  # of 25 channels, which are 13 pairs
        {**NEOX, "rotary_pct": 0.5, "rotary_emb_base": 25000, "rope_scaling": {"type": "yarn", "factor": 4.0}},
        {**NEOX, "rotary_pct": 1.0, "rope_scaling": {"type": "linear", "factor": 4.0, "partial_rotary_factor": 1.0}},
        {**NEOX, "rope_theta": 25000, "partial_rotary_factor": 0.5},  # which are read in no release
        {**NEOX, "rope_parameters": {**LLAMA3, "rope_theta": 25000, "partial_rotary_factor": 0.5}},
    ],
)  # fmt: skip
def test_keys_mean_what_they_mean_to_transformers(config):
    assert_as_transformers(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing; expected a positive number"),
        ({"rope_scaling": {"type": "linear", "factor": None}}, "rope_scaling.factor is missing; expected a positive"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "rope_scaling.factor = '2'; expected a positive"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling.factor is missing; expected a positive number"),
        ({"rope_scaling": {"type": "yarn", "factor": 4, ORIGINAL: None}}, f"rope_scaling.{ORIGINAL} = None; expected"),
        ({"rope_scaling": {"type": "yarn", "factor": 4, "beta_fast": -1}}, "rope_scaling.beta_fast = -1; expected"),
        ({"rope_scaling": {"type": "yarn", "factor": 4}, ORIGINAL: None}, f"json: {ORIGINAL} = None; expected"),
        ({"rope_theta": 10**400}, "expected a positive number"),
        ({"rope_theta": 1, "rope_scaling": {"type": "yarn", "factor": 4}}, "no frequencies of rope_type 'yarn' can be"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 64}}, "rope_scaling.long_factor = None; expec"),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 64, "long_factor": [1.0] * 63}},
            "expected a list of 64 positive numbers",
        ),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}}, "low_freq_factor must be below high_freq_factor"),
        ({"rope_scaling": {"type": "su", "factor": 2}}, "transformers knows it as 'longrope'"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1]}}, "rope_type 'mrope' is not implemented"),
        ({"rope_scaling": {"type": ["linear"]}}, "rope_type ['linear'] is not implemented"),
        ({"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2}}, "has a type 'linear' and another"),
        ({"rope_scaling": [2]}, "rope_scaling = [2]; expected an object"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_parameters.full_attention is an object"),
        ({"rope_theta": 1, "rope_parameters": {"rope_theta": 2}}, "contradiction: rope_theta = 1, rope_param"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"type": "linear", "factor": 4}},
            "contradiction: rope_scaling = {'type': 'linear', 'factor': 2} and rope_parameters = ",
        ),
        (  # transformers forgets the other's rope_theta
            {"rope_scaling": {"type": "linear", "factor": 2},
             "rope_parameters": {"type": "linear", "factor": 2, "rope_theta": 5e5}},
            "describe different positions",
        ),
        (
            {"partial_rotary_factor": 0.5, "rope_scaling": {"type": "linear", "factor": 2}},
            "partial_rotary_factor = 0.5; only 1.0 is supported: all channels",
        ),
        (
            {"rope_parameters": {"type": "yarn", "factor": 2, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor = 0.5; only 1.0 is supported",
        ),
        ({"model_type": "gpt_neox", "rotary_pct": 0.001}, "0 of 128 channels of a head are rotated; expected pairs"),
        ({"model_type": "gpt_neox", "rotary_pct": 1.5}, "192 of 128 channels of a head are rotated"),
    ],
)  # fmt: skip
def test_what_cannot_be_right_is_refused_by_name(change, message):
    with pytest.raises(ConfigError) as caught:
        parse({**LLAMA, **change})
    assert [message in problem for problem in caught.value.problems] == [True], caught.value.problems


@pytest.mark.parametrize(
    ("scaling", "longest", "reason"),
    [
        ({}, 4096, "beyond which the model was not trained: choose context_window <= 4096"),
        ({**LLAMA3, ORIGINAL: 2048}, 4096, "beyond which the model was not trained: choose context_window <= 4096"),
        ({"type": "linear", "factor": 2.5}, 10240, "which rope_type 'linear' stretches to 10240: choose context"),
        ({"type": "dynamic", "factor": 2.0}, 8192, "which rope_type 'dynamic' stretches to 8192: choose context"),
        ({"type": "yarn", "factor": 4.0}, 16384, "which rope_type 'yarn' stretches to 16384: choose context_window <="),
        ({"type": "yarn", "factor": 4.0, ORIGINAL: 1024}, 4096, "beyond which the model was not trained: choose"),
        ({"type": "longrope", "factor": 4.0, ORIGINAL: 2048, "short_factor": [1] * 64, "long_factor": [2] * 64}, 8192,
         "which rope_type 'longrope' stretches to 8192: choose context_window <= 8192"),
    ],
)  # fmt: skip
def test_the_context_ends_where_training_and_scaling_do(scaling, longest, reason):
    family, config = load_family("llama"), parse({**LLAMA, "rope_scaling": scaling})
    assert family.context_window(config, 0) == 4096
    assert family.context_window(config, longest) == longest
    with pytest.raises(ConfigError, match="exceeds max_position_embeddings = 4096 of config") as caught:
        family.context_window(config, longest + 1)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("parameters", "said", "ends"),
    [
        (DYNAMIC, {64: "", 128: "within max_position_embeddings = 64, set context_window to that"}, 64),
        ({**longrope(16)}, {32: "", 33: f"within {ORIGINAL} = 32, set context_window to that"}, 32),
        (YARN, {64: "", 128: ""}, 64),
        (LINEAR, {64: "", 128: ""}, 64),
    ],
)
def test_config_parse_says_whose_frequencies_depend_on_the_context(tmp_path, parameters, said, ends):
    case = Case("Llama", {**SIZES, "head_dim": 32, "max_position_embeddings": 64, "rope_parameters": parameters})
    checkpoint = family_models.write(tmp_path / "checkpoint", case)
    for window, expected in said.items():
        context = run_stage(
            ConfigParse(), tmp_path / str(window), {"checkpoint": str(checkpoint), "context_window": window}
        )
        assert [expected in warning for warning in context.warnings] == ([True] if expected else [])
        built = json.loads((context.out / "model.json").read_text())["config"]["rope_parameters"]
        assert (built == parameters) == (window <= ends or not expected)


# The kernels that turn heads

POSITIONS = np.array([0, 1, 17, 4095, 65537, 131071], np.int32)
MODEL = {**LLAMA, "hidden_size": 192, "num_key_value_heads": 2, "max_position_embeddings": 131072}


def turned_by_transformers(config: Mapping[str, Any], heads: np.ndarray) -> np.ndarray:
    """Return float32 heads [n, h, d] at :data:`POSITIONS` turned by transformers' own functions."""
    import torch
    import transformers
    from transformers.models.llama import modeling_llama

    values = {key: value for key, value in config.items() if key != "model_type"}
    rotary = modeling_llama.LlamaRotaryEmbedding(transformers.LlamaConfig(**values))
    tensor = torch.tensor(heads).transpose(0, 1)[None]
    tables = rotary(tensor, torch.tensor(POSITIONS[None].astype(np.int64)))
    return modeling_llama.apply_rotary_pos_emb(tensor, tensor, *tables)[0][0].transpose(0, 1).numpy()


@pytest.mark.parametrize(
    ("head_dim", "dtype", "bound"), [(48, "float32", 2e-6), (24, "float32", 2e-6), (24, "float16", 8e-3)]
)
@pytest.mark.parametrize(
    ("parameters", "log_n"),
    [
        ({"rope_theta": 1e4}, 0),
        ({**LINEAR, "factor": 3.0}, 4000),
        ({**LLAMA3, "rope_theta": 5e5, ORIGINAL: 8192}, 0),
        ({**YARN, ORIGINAL: 512}, 0),
    ],
)
def test_heads_are_turned_alike_at_any_position(head_dim, dtype, bound, parameters, log_n):
    """However large the angle, whose error would grow with the position; but for a frequency with another last bit."""
    profiles.compiler()
    import tvm

    from stages.kernels.cpu import kv_cache
    from stages.kernels.gpu.rotary import rotary_kernel

    config = {**MODEL, "head_dim": head_dim, "rope_parameters": parameters}
    cache = parse(config).attention
    numbers = cache.num_heads, cache.num_kv_heads, head_dim
    turning = int(max(POSITIONS)) + 1, cache.rotary_dim, cache.attention_factor, log_n
    if dtype == "float32":
        kernel = kv_cache.rope(kv_cache.Heads(*numbers), *turning)
    else:
        kernel = rotary_kernel(*numbers, dtype, *turning)
    module = tvm.IRModule({"main": kernel.with_attr("global_symbol", "main")})
    qkv = np.random.default_rng(1).standard_normal((len(POSITIONS), 8, head_dim)).astype(dtype)
    parts = [tvm.runtime.tensor(np.zeros((len(POSITIONS), count, head_dim), dtype)) for count in (4, 2, 2)]
    arguments = [tvm.runtime.tensor(array) for array in (qkv, POSITIONS)]
    frequencies = tvm.runtime.tensor(np.array(cache.frequencies, np.float32))
    tvm.compile(module, target="llvm")["main"](*arguments, *parts, frequencies)
    q, k, v = (part.numpy() for part in parts)
    expected = turned_by_transformers(config, qkv[:, :6].astype(np.float32))
    if log_n:
        expected[:, :4] *= np.maximum(np.log(POSITIONS + 1.0) / math.log(log_n), 1).astype(np.float32)[:, None, None]
    other = np.abs(np.array(cache.frequencies, np.float32) - transformers_own(config, 1)[0]).max()
    errors = np.abs(np.concatenate([q, k], 1) - expected).max((1, 2))
    assert (errors < bound + 8 * other * POSITIONS).all(), errors
    assert np.array_equal(v, qkv[:, 6:])


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_on_a_gpu_queries_outside_the_context_are_not_a_number(dtype):
    profiles.compiler()
    import tvm

    from stages.kernels.gpu.rotary import rotary_kernel

    kernel = rotary_kernel(2, 1, 8, dtype, 5, 8, 1.0).with_attr("global_symbol", "main")
    positions = np.array([4, 5, 0, 6], np.int32)
    arrays = np.ones((4, 4, 8), dtype), positions, *(np.zeros((4, heads, 8), dtype) for heads in (2, 1, 1))
    arguments = [tvm.runtime.tensor(array) for array in (*arrays, np.ones(4, np.float32))]
    tvm.compile(tvm.IRModule({"main": kernel}), target="llvm")["main"](*arguments)
    q, k, v = (argument.numpy() for argument in arguments[2:5])
    assert np.array_equal(np.isnan(q), np.broadcast_to((positions > 4)[:, None, None], q.shape))
    assert np.isfinite(k).all()
    assert np.isfinite(v).all()


# Every type in every form, from the checkpoint's folder, beyond the original context and the longest chunk

IDS = [int(token) for token in np.random.default_rng(9).integers(3, family_models.ODD_VOCAB, 256)]
FORMS = {
    "Llama": ({"num_key_value_heads": 2, "head_dim": 32}, 16, {}),
    "Qwen2": ({"num_key_value_heads": 2}, 8, {}),
    "Qwen3": ({"num_key_value_heads": 2, "head_dim": 32}, 16, {}),
    "Mistral": ({"num_key_value_heads": 2, "head_dim": 24, "sliding_window": None}, 12, {}),
    "GPTNeoX": (family_models.NEOX, 20, {"partial_rotary_factor": 0.5}),
}
KINDS = {
    "linear": lambda _: {**LINEAR, "factor": 4.0},
    "dynamic": lambda _: DYNAMIC,
    "yarn": lambda _: {**YARN, ORIGINAL: 64},
    "yarn-mscale": lambda _: {**YARN, ORIGINAL: 64, "mscale": 1.2, "mscale_all_dim": 0.3, "truncate": False},
    "longrope": lambda pairs: {**longrope(pairs), ORIGINAL: 64},
    "llama3": lambda _: {**family_models.LLAMA3},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_a_model_beyond_its_original_context_is_that_of_transformers(tmp_path, form, kind):
    sizes, pairs, more = FORMS[form]
    window = 128 if kind == "llama3" else 256
    positions = 128 if kind == "llama3" else 64
    config = {**SIZES, **sizes, "max_position_embeddings": positions, "rope_parameters": {**KINDS[kind](pairs), **more}}
    built = family_models.build(tmp_path, Case(form, config, context_window=window), "q0f32")
    ids, session = IDS[:window], built.session()
    logits, sequence, prompt = built.reference(ids), session.add(), window - 48
    found = [session.prefill(sequence, ids[:prompt])]
    found += [session.decode(sequence, token) for token in ids[prompt:]]
    assert max(error(have, want) for have, want in zip(found, logits[prompt - 1 :], strict=True)) < 1e-4


@pytest.mark.parametrize("factors", [("short_factor", 32), ("long_factor", 128)])
def test_longrope_takes_one_set_of_factors_for_every_sequence(factors):
    name, window = factors
    scaling = longrope(16)
    config = {**LLAMA, "head_dim": 32, "max_position_embeddings": 128, "rope_parameters": scaling}
    assert parse(config, window).reference()["short_factor"] == scaling[name]


@pytest.mark.slow
def test_the_first_qwen_beyond_seq_length_has_the_base_and_the_queries_of_its_published_code(tmp_path):
    """A Qwen2 with another base, whose attention stretches queries, stands for the code that nobody may run."""
    import torch
    import transformers
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
    from transformers.models.qwen2.modeling_qwen2 import ALL_ATTENTION_FUNCTIONS, eager_attention_forward

    checkpoint = write_qwen(tmp_path / "checkpoint", dtype="float32", seq_length=64)
    (checkpoint / "generation_config.json").unlink()  # its stop ids are of another tokenizer than the bundle's here
    rows = json.loads((checkpoint / "config.json").read_text())["vocab_size"]
    built = family_models.build(
        tmp_path, Case("Qwen2", {"vocab_size": rows}, context_window=200), "q0f32", checkpoint=checkpoint
    )
    described = json.loads(built.config.read_text())
    qwen, ids = load_family("qwen"), [token % rows for token in IDS[:200]]
    _, keywords, state = qwen.to_reference(qwen.config(**described["config"]), built.held)
    keywords["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0 * 7 ** (32 / 30)}

    def log_n(module, query, key, value, mask, **options):
        table = [math.log(i, 64) if i > 64 else 1.0 for i in range(1, query.shape[2] + 1)]
        return eager_attention_forward(module, query * torch.tensor(table)[:, None], key, value, mask, **options)

    ALL_ATTENTION_FUNCTIONS.register("log_n", log_n)
    ALL_MASK_ATTENTION_FUNCTIONS.register("log_n", eager_mask)
    logits = {}
    for attention in ("log_n", "eager"):
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**keywords, attn_implementation=attention))
        model.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in state.items()})
        with torch.no_grad():
            logits[attention] = model.eval()(torch.tensor([ids])).logits[0].numpy()
    session = built.session()
    sequence = session.add()
    found = [session.prefill(sequence, ids[:150]), *(session.decode(sequence, token) for token in ids[150:])]
    errors = {name: max(map(error, found, each[149:])) for name, each in logits.items()}
    assert errors["log_n"] < 1e-4
    assert errors["eager"] > 1e-2
