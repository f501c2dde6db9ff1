"""config.json against transformers' own classes: what they read and take for granted, and what is built of each key."""

from __future__ import annotations

import ast
import copy
import dataclasses
import importlib
import importlib.util
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from stages.checkpoint.errors import ConfigError
from stages.models import FAMILIES, decoder, load_family
from stages.models.config_reader import FULL, SHARED, SLIDING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

transformers = pytest.importorskip("transformers")
CLASSES = {
    "llama": "LlamaConfig", "mistral": "MistralConfig", "qwen2": "Qwen2Config", "qwen3": "Qwen3Config",
    "gpt_neox": "GPTNeoXConfig", "rwkv": "RwkvConfig",
}  # fmt: skip
BASE = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
# Values to try by the type of a key's default, besides none at all, null and the default itself.
CHANGED: dict[type, list[Any]] = {
    int: [8, 16, 32],
    float: [1e-3, 0.5, 1],
    bool: [True, False],
    str: ["swish", "relu", "gelu", "gelu_new", "gelu_accurate", "tanh", "nonsense"],
    type(None): [2, 8, [FULL] * 3, [SLIDING] * 3, ["attention"] * 3, [FULL] * 2],
}
# Keys beyond the fields of a class that the library reads in any config.json, or did once, or that others write there.
BESIDES: dict[str, list[Any]] = {
    "is_causal": [None, True, False], "is_encoder_decoder": [False, True], "attention_chunk_size": [None, 8],
    "kv_sharing_modes": [None, ["reuse", None, None]], "per_layer_config": [None, {}],
    "sliding_window": [None, 64, 128, 4096], "layer_types": [None, [FULL] * 3, [SLIDING] * 3], "head_dim": [8, 16],
    "rope_theta": [10000.0, 5000.0], "rotary_emb_base": [10000, 5000], "rotary_pct": [..., 0.25, 0.5],
    "rope_interleaved": [True], "use_mrope": [True], "sliding_window_size": [8], "temperature": [0.7],
    "id2label": [{"0": "a"}], "tie_encoder_decoder": [True], "pruned_heads": [{"0": [1]}], "dtype": ["float16"],
    "torch_dtype": ["bfloat16"], "hidden_dropout_prob": [0.5], "unsloth_fixed": [True], "num_labels": [5],
}  # fmt: skip
# What is not built although the library reads it, so that it is refused.
ATTENTION = {
    "is_causal = None", "is_causal = False", "attention_chunk_size = 8", "kv_sharing_modes = ['reuse', None, None]",
}  # fmt: skip
GELUS = {"hidden_act = gelu", "hidden_act = gelu_new", "hidden_act = gelu_accurate"}
OTHERS = {"hidden_act = tanh", "hidden_act = nonsense"}  # the library finds out when it makes the model
REFUSED = {
    "llama": ATTENTION | GELUS | OTHERS | {"hidden_act = relu", "sliding_window = 64"},
    "mistral": ATTENTION | GELUS | OTHERS | {"hidden_act = relu"},
    "qwen2": ATTENTION | GELUS | OTHERS | {"hidden_act = relu"},
    "qwen3": ATTENTION | GELUS | OTHERS | {"hidden_act = relu"},
    # Heads of one channel, which has no other to be rotated against, besides.
    "gpt_neox": ATTENTION
    | OTHERS
    | {"head_dim = 8", "sliding_window = 64", "num_attention_heads = 64", "no num_attention_heads"},
    "rwkv": {"tie_word_embeddings = True"},
}  # fmt: skip
# What the library refuses although there is one thing that it can mean.
LENIENT = {
    "rms_norm_eps = 1", "layer_norm_eps = 1", "layer_norm_epsilon = 1", "num_key_value_heads = None", "head_dim = None",
    "max_window_layers = None",
}  # fmt: skip


def module(family: str) -> Any:
    return importlib.import_module(FAMILIES[family].partition(":")[0])


def fields(family: str) -> dict[str, Any]:
    """Return the fields of transformers' class that its base has not, with their defaults."""
    own = getattr(transformers, CLASSES[family])
    base = {field.name for field in dataclasses.fields(transformers.PreTrainedConfig)}
    return {field.name: field.default for field in dataclasses.fields(own) if field.name not in base}


# What is read


@pytest.mark.parametrize("family", CLASSES)
def test_the_defaults_are_those_of_transformers_class(family):
    keys, defaults = load_family(family).keys, module(family).DEFAULTS
    apart = {*SHARED.split(), "rope_parameters"}  # generation's, and the rotary positions'
    found = fields(family)
    assert found.keys() <= keys.keys()
    assert defaults == {key: found[key] for key in found if keys[key] == "honoured" and key not in apart}


def reads(path: Path) -> Iterator[str]:
    """Yield the names that a source file reads of something called a config."""
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Attribute(value=holder, attr=name, ctx=ast.Load()):
                pass
            case ast.Call(func=ast.Name(id="getattr" | "hasattr"), args=[holder, ast.Constant(value=str(name)), *_]):
                pass
            case _:
                continue
        held = holder.id if isinstance(holder, ast.Name) else holder.attr if isinstance(holder, ast.Attribute) else ""
        if held == "config" or held.endswith("_config"):
            yield name


# Of the library's own running, none of a file's keys.
INTERNAL = {
    "_attn_implementation", "_experts_implementation", "_name_or_path", "get_text_config", "to_dict",
    "is_heterogeneous", "output_attentions", "output_hidden_states", "return_dict", "num_labels", "model_type",
    "name_or_path",
}  # fmt: skip


@pytest.mark.parametrize("family", CLASSES)
def test_the_model_of_transformers_reads_no_other_keys(family):
    root = Path(importlib.util.find_spec("transformers").origin).parent  # type: ignore[union-attr, arg-type]
    found = set(reads(root / "models" / family / f"modeling_{family}.py"))
    assert "hidden_size" in found
    assert found - INTERNAL <= load_family(family).keys.keys()


def test_masks_and_caches_of_transformers_read_no_other_keys():
    root = Path(importlib.util.find_spec("transformers").origin).parent  # type: ignore[union-attr, arg-type]
    found = {name for file in ("masking_utils.py", "cache_utils.py") for name in reads(root / file)}
    assert {"is_causal", "sliding_window", "attention_chunk_size"} <= found
    other_kinds = {"number_of_conv_states", "num_kv_shared_layers"}  # of layers that are not attention
    caches_of_others = {"cache_dtype"}
    for family in CLASSES:
        if load_family(family).state == "kv":
            assert found - INTERNAL - other_kinds - caches_of_others <= load_family(family).keys.keys()


# What is built


def built(family: str, raw: Mapping[str, Any]) -> Any:
    """Return transformers' config of what is built of ``raw``; ConfigError."""
    record = load_family(family)
    config = record.parse(raw)
    names = {name: None for parameter in record.params(config) for name in parameter.sources}
    _, keywords, _ = record.to_reference(config, names)
    return getattr(transformers, CLASSES[family])(**keywords)


def effective(family: str, config: Any) -> dict[str, Any]:
    """Return what of a config of transformers its model and its cache depend on; ValueError if they fail on it."""
    keys, size = load_family(family).keys, config.num_hidden_layers
    apart = {"max_window_layers", "use_sliding_window"}  # which the class has turned into layer_types
    found = {
        key: getattr(config, key)
        for key in fields(family).keys() - apart
        if keys[key] == "honoured" and key not in SHARED
    }
    if family == "rwkv":
        return found
    heads, groups = config.num_attention_heads, getattr(config, "num_key_value_heads", 1)
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if heads % groups or (kinds and SLIDING in kinds and window is None):
        raise ValueError("the class takes what its model fails on")
    if family == "mistral" and kinds and SLIDING not in kinds:
        kinds = None  # which the model does not read, and the cache is only longer
    kinds = kinds or [FULL if window is None else SLIDING] * size
    if family in ("llama", "gpt_neox") and window is not None and window >= config.max_position_embeddings:
        kinds = [FULL] * size  # in a cache too long to matter
    aliases = getattr(module(family), "ACTIVATIONS", decoder.SILU)
    return found | {
        "head_dim": getattr(config, "head_dim", config.hidden_size // heads),
        "hidden_act": aliases.get(config.hidden_act, config.hidden_act),
        "layer_types": kinds,
        "sliding_window": window if SLIDING in kinds else None,
        "is_causal": bool(getattr(config, "is_causal", True)),
        **{key: getattr(config, key, None) for key in ("attention_chunk_size", "kv_sharing_modes")},
    }


def outcome(family: str, raw: dict[str, Any]) -> str:
    """Return same, refused or lenient (by us alone), neither (accepts it); a difference fails the test."""
    try:
        expected = effective(family, getattr(transformers, CLASSES[family]).from_dict(raw))
    except Exception:  # noqa: BLE001 -- whatever the library says no with
        expected = None
    try:
        found = built(family, raw)
    except ConfigError:
        return "refused" if expected else "neither"
    if not expected:
        return "lenient"
    assert effective(family, found) == expected, raw
    return "same"


def variants(family: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each key with a value, or without, and the config.json that says so."""
    base = {"model_type": family, **BASE}
    if family == "gpt_neox":
        base["rotary_pct"] = 1.0
    if family == "rwkv":  # whose context_length goes by the other name too
        del base["max_position_embeddings"]
    for key, default in fields(family).items():
        if key == "rope_parameters" or "token_id" in key or key in SHARED:
            continue
        yield f"no {key}", {name: value for name, value in base.items() if name != key}
        for value in [None, default, *CHANGED[type(default)]]:
            yield f"{key} = {value}", {**base, key: value}
    for key, values in BESIDES.items():
        for value in values:
            raw = {**base, key: value}
            yield f"{key} = {value}", {name: found for name, found in raw.items() if found is not ...}


@pytest.mark.parametrize("family", CLASSES)
def test_every_key_is_read_as_transformers_reads_it(family):
    outcomes = {label: outcome(family, raw) for label, raw in variants(family)}
    assert {label for label, found in outcomes.items() if found == "refused"} == REFUSED[family]
    irrelevant = {key for key, kind in load_family(family).keys.items() if kind == "irrelevant"}
    lenient = {label for label, found in outcomes.items() if found == "lenient"}
    assert {label for label in lenient if label.split()[0] not in irrelevant} <= LENIENT


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in CLASSES if name != "rwkv"])  # whose few keys have a test of logits
def test_the_models_of_both_configs_answer_alike(family):
    """Of equal random weights, whatever else the file says: so what ``effective`` leaves out does not matter either."""
    torch = pytest.importorskip("torch")
    compared = 0

    def logits(config: Any) -> Any:
        config.initializer_range = 0.3
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
        with torch.no_grad():
            return model.eval()(torch.arange(40)[None] % 8).logits

    seen = []
    for label, raw in variants(family):
        ours = built(family, raw) if outcome(family, raw) == "same" else None
        if ours is None or max(ours.hidden_size, ours.vocab_size) > 64 or ours.num_hidden_layers > 8:
            continue
        found, expected = logits(ours), logits(getattr(transformers, CLASSES[family]).from_dict(raw))
        # Two names of one activation are rounded otherwise; any other option of these shows in the first digits.
        assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5, label
        seen.append(found)
        compared += 1
    assert compared > 30
    assert any(not torch.equal(seen[0], other) for other in seen), "nothing that is compared depends on the config"


@pytest.mark.parametrize("table", [decoder.SILU, module("gpt_neox").ACTIVATIONS])
def test_every_name_of_an_activation_is_the_function_that_is_built(table):
    torch = pytest.importorskip("torch")
    from transformers.activations import ACT2FN

    x = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    for name, ours in table.items():
        assert float((ACT2FN[name](x) - ACT2FN[ours](x)).abs().max()) < 1e-12, name
    assert float((ACT2FN["gelu"](x) - ACT2FN["gelu_new"](x)).abs().max()) > 1e-4, "two that are not one"


MIXED = [SLIDING, FULL, FULL]
WINDOW: dict[str, list[Any]] = {
    "sliding_window": [..., None, 8, 4096],
    "layer_types": [..., None, *([FULL] * n + [SLIDING] * (3 - n) for n in range(4)), MIXED],
    "use_sliding_window": [..., True, False],
    "max_window_layers": [..., -1, 1, 5],
}


@pytest.mark.parametrize(
    ("family", "choices", "not_built"),
    [
        ("mistral", dict(itertools.islice(WINDOW.items(), 2)), [[FULL] + [SLIDING] * 2, [FULL] * 2 + [SLIDING], MIXED]),
        ("qwen2", WINDOW, [MIXED]),
        ("qwen3", WINDOW, [MIXED]),
    ],
)
def test_every_combination_of_window_keys_is_read_as_transformers_reads_it(family, choices, not_built):
    for values in itertools.product(*choices.values()):
        said = {key: value for key, value in zip(choices, values, strict=True) if value is not ...}
        found = outcome(family, {"model_type": family, **BASE, "max_position_embeddings": 8192, **said})
        assert found in ("same", "neither") or (found == "refused" and said["layer_types"] in not_built), (found, said)


# Rotary positions

ORIGINAL = "original_max_position_embeddings"
LISTS = {"short_factor": [1.0, 1.5] * 4, "long_factor": [2.0, 3.0] * 4}  # for heads of 16 channels
SCALINGS: list[Any] = [
    {"type": "default"}, {"rope_type": "default", "factor": 2.0}, {"type": "linear", "factor": 2.0},
    {"rope_type": "linear", "factor": 1.0}, {"rope_type": "linear", "factor": 2.0, "rope_theta": 7000.0},
    {"rope_type": "linear", "type": "linear", "factor": 4}, {"rope_type": "dynamic", "factor": 2.0},
    {"type": "yarn", "factor": 4.0}, {"rope_type": "yarn", "factor": 4.0, ORIGINAL: 32, "beta_fast": 16},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, ORIGINAL: 32},
    {"rope_type": "longrope", **LISTS, ORIGINAL: 32}, {"rope_type": "longrope", **LISTS, "factor": 4.0},
    {"rope_theta": 7000.0}, {"rope_type": "default", "rope_theta": 7000.0, "partial_rotary_factor": 0.5},
    {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 1.0}, {"type": "linear"}, {"rope_type": "su"},
]  # fmt: skip
ROPE: dict[str, list[Any]] = {
    "rope_theta": [None, 10000.0, 5000, 1e6],
    "rope_scaling": [None, {}, *SCALINGS],
    "rope_parameters": [None, {}, *SCALINGS],
    ORIGINAL: [None, 32, 128],
    "partial_rotary_factor": [None, 1.0, 0.5],
    "max_position_embeddings": [64, 256],
    "head_dim": [16, None],
    "rotary_pct": [None, 0.25, 0.5, 1.0],
    "rotary_emb_base": [None, 10000, 5000],
}


def turned(family: str, raw: Mapping[str, Any]) -> tuple[Any, float] | None:
    """Return the frequencies and the factor of transformers' model, None where it makes none that it can use."""
    import torch

    prefix = CLASSES[family].removesuffix("Config")
    modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    try:
        config = getattr(transformers, CLASSES[family]).from_dict(copy.deepcopy(dict(raw)))
        rotary = getattr(modeling, f"{prefix}RotaryEmbedding")(config)
        cos, _ = rotary(torch.zeros(1), torch.tensor([[config.max_position_embeddings - 1]]))
    except Exception:  # noqa: BLE001 -- whatever the library says no with
        return None
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if cos.shape[-1] != head and family != "gpt_neox":
        return None  # which its layers cannot multiply a head by
    return rotary.inv_freq.numpy(), float(rotary.attention_scaling)


def positions(family: str, raw: Mapping[str, Any]) -> str:
    """Return same, refused, lenient or neither, as :func:`outcome`; other positions fail the test."""
    expected, record = turned(family, raw), load_family(family)
    try:
        config = record.parse(copy.deepcopy(dict(raw)))
        found = record.for_context(config, record.context_window(config, 0))[0].attention
    except ConfigError:
        return "refused" if expected else "neither"
    if expected is None:
        return "lenient"
    np.testing.assert_allclose(np.array(found.frequencies, np.float32), expected[0], rtol=2.5e-6, err_msg=str(raw))
    assert found.attention_factor == pytest.approx(expected[1], rel=1e-12), raw
    return "same"


def pairs_of_rope_keys(family: str) -> Iterator[dict[str, Any]]:
    """Yield every two keys with every two values that they may have."""
    neox = {"rotary_pct", "rotary_emb_base"}
    keys = [key for key in ROPE if family == "gpt_neox" or key not in neox]
    for one, other in itertools.combinations(keys, 2):
        for values in itertools.product(ROPE[one], ROPE[other]):
            yield dict(zip((one, other), values, strict=True))


def contradictory(said: Mapping[str, Any]) -> bool:
    """Say whether keys describe two positions, of which transformers takes one without a word."""
    forms = [said[key] for key in ("rope_scaling", "rope_parameters") if said.get(key)]
    bases = [place.get(key) for place in (said, *forms) for key in ("rope_theta", "rotary_emb_base")]
    shares = [place.get(key) for place in (said, *forms) for key in ("partial_rotary_factor", "rotary_pct")]
    return len(forms) > 1 or any(len({value for value in found if value}) > 1 for found in (bases, shares))


@pytest.mark.parametrize("family", [name for name in CLASSES if name != "rwkv"])
def test_every_pair_of_rope_keys_is_read_as_transformers_reads_it(family):
    pytest.importorskip("torch")
    base = {"model_type": family, **BASE}
    outcomes: dict[str, list[dict[str, Any]]] = {"same": [], "refused": [], "lenient": [], "neither": []}
    for said in pairs_of_rope_keys(family):
        outcomes[positions(family, {**base, **said})].append(said)
    assert len(outcomes["same"]) > 300
    assert [said for said in outcomes["refused"] if not contradictory(said)] == []
    # null for the base, or for a size, says the usual here and nothing that the library can compute with.
    assert [said for said in outcomes["lenient"] if None not in said.values()] == []
