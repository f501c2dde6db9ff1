"""Qwen's config in both generations of its keys, its parameters, and its equality with Qwen2 as the reference."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import pytest

from stages.checkpoint.errors import ConfigError
from stages.models import FAMILIES, load_family, transforms
from tests.support.checkpoints import qwen_config, qwen_tensors

if TYPE_CHECKING:
    import torch

QWEN = load_family("qwen")
SIZES = {"hidden": 64, "layers": 2, "heads": 2, "ff": 96, "rows": 128}
CONFIG = qwen_config(**SIZES, dtype="float32")
# The keys of the first published checkpoint of 7B parameters; later ones use those of CONFIG.
EARLY = {
    "activation": "swiglu", "apply_residual_connection_post_layernorm": False, "architectures": ["QWenLMHeadModel"],
    "attn_pdrop": 0.0, "bf16": False, "bias_dropout_fusion": True, "bos_token_id": 151643, "embd_pdrop": 0.1,
    "eos_token_id": 151643, "ffn_hidden_size": 22016, "fp16": False, "fp32": False, "initializer_range": 0.02,
    "kv_channels": 128, "layer_norm_epsilon": 1e-05, "model_type": "qwen", "n_embd": 4096, "n_head": 32,
    "n_layer": 32, "n_positions": 6144, "no_bias": True, "onnx_safe": None, "padded_vocab_size": 151936,
    "params_dtype": "torch.bfloat16", "pos_emb": "rotary", "resid_pdrop": 0.1, "rotary_emb_base": 10000,
    "rotary_pct": 1.0, "scale_attn_weights": True, "seq_length": 2048, "tie_word_embeddings": False,
    "tokenizer_type": "QWenTokenizer", "transformers_version": "4.31.0", "use_cache": True, "use_flash_attn": "auto",
    "vocab_size": 151851, "use_dynamic_ntk": True, "use_logn_attn": True,
}  # fmt: skip


def test_both_generations_of_keys_are_read():
    early = QWEN.parse(EARLY)
    renamed = {"n_embd": "hidden_size", "n_head": "num_attention_heads", "n_layer": "num_hidden_layers",
               "ffn_hidden_size": "intermediate_size"}  # fmt: skip
    assert QWEN.parse({renamed.get(key, key): value for key, value in EARLY.items()}) == early
    assert dataclasses.asdict(early) == {
        "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 11008, "num_layers": 32, "num_heads": 32,
        "head_dim": 128, "rms_eps": 1e-05, "rope_theta": 10000.0, "seq_length": 2048, "use_dynamic_ntk": True,
        "use_logn_attn": True, "log_n": 0,
    }  # fmt: skip


def test_the_config_survives_json():
    config = QWEN.parse(CONFIG)
    assert QWEN.config(**dataclasses.asdict(config)) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 65}, "hidden_size 65 is not 2 attention heads x 32 channels"),
        ({"intermediate_size": 191}, "intermediate_size = 191 is odd"),
        ({"intermediate_size": -4}, "intermediate_size / ffn_hidden_size = -4; expected a positive integer"),
        ({"num_hidden_layers": True}, "num_hidden_layers / n_layer = True; expected a positive integer"),
        ({"seq_length": None}, "seq_length is null; expected a positive integer"),
        ({"rotary_pct": 0.25}, "rotary_pct = 0.25; only 1.0 is supported"),
        ({"rotary_pct": True}, "rotary_pct = True; only 1.0 is supported"),
        ({"no_bias": False}, "no_bias = False; only True is supported"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings = True; only False is supported"),
        ({"n_embd": 128}, "contradiction: hidden_size = 64, n_embd = 128"),
        ({"padded_vocab_size": 64}, "padded_vocab_size 64 is smaller than vocab_size 128"),
        ({"layer_norm_epsilon": "small"}, "layer_norm_epsilon = 'small'; expected a positive number"),
        ({"use_dynamic_ntk": "yes"}, "use_dynamic_ntk = 'yes'; expected true or false"),
        ({"rope_scaling": {"factor": 2}}, "rope_scaling = {'factor': 2} is not supported for model_type 'qwen'"),
        ({"layer_norm_epsilon": None}, "layer_norm_epsilon is null; expected a positive number"),
    ],
)  # fmt: skip
def test_a_contradiction_is_named(change, message):
    with pytest.raises(ConfigError) as caught:
        QWEN.parse({**CONFIG, **change})
    assert [message in problem for problem in caught.value.problems] == [True]


def test_all_problems_come_at_once():
    with pytest.raises(ConfigError) as caught:
        QWEN.parse({**CONFIG, "no_bias": False, "rotary_pct": 0.5, "num_attention_heads": 3, "quantization_bit": 4})
    assert len(caught.value.problems) == 4


def test_context_window_ends_with_what_the_options_are_for():
    config = QWEN.parse(CONFIG)
    assert QWEN.context_window(config, 0) == 512
    assert QWEN.context_window(config, 300) == 300
    assert QWEN.context_window(config, 32767) == 32767
    with pytest.raises(ConfigError, match=r"context_window = 32768 exceeds seq_length = 512.*no logarithms beyond"):
        QWEN.context_window(config, 32768)
    assert QWEN.context_window(QWEN.parse({**CONFIG, "use_logn_attn": False}), 40000) == 40000
    plain = QWEN.parse({**CONFIG, "use_dynamic_ntk": False})
    with pytest.raises(ConfigError, match=r"not trained, without use_dynamic_ntk: choose context_window <= 512"):
        QWEN.context_window(plain, 513)


@pytest.mark.parametrize(("window", "alpha"), [(512, 1), (513, 3), (1024, 3), (1025, 7), (2048, 7), (2049, 15)])
def test_the_base_beyond_seq_length_is_that_of_dynamic_ntk(window, alpha):
    """In powers of two of the context, as the published ``get_ntk_alpha`` has them."""
    config, said = QWEN.for_context(QWEN.parse(CONFIG), window)
    assert config.rope_theta == pytest.approx(10000 * alpha ** (32 / 30))
    assert config.log_n == (512 if window > 512 else 0)
    assert bool(said) == (window > 512)


def test_every_family_row_names_a_family():
    for model_type in FAMILIES:
        family = load_family(model_type)
        assert family.name == model_type
        assert set(family.keys.values()) <= {"honoured", "irrelevant", "refused"}


def test_transforms_are_undone_by_their_inverse():
    random = np.random.default_rng(0)
    parts = [random.standard_normal((rows, 3)) for rows in (2, 5, 1)]
    shapes = [part.shape for part in parts]
    whole = transforms.apply("concat0", parts)
    assert whole.shape == (8, 3)
    assert [part.tolist() for part in transforms.invert("concat0", whole, shapes)] == [part.tolist() for part in parts]
    assert transforms.invert("copy", transforms.apply("copy", parts[:1]), shapes[:1])[0] is parts[0]
    with pytest.raises(ValueError, match="has 8 rows, not 7"):
        transforms.invert("concat0", whole[:7], shapes)
    with pytest.raises(ValueError, match="unknown transform 'shuffle'"):
        transforms.apply("shuffle", parts)


def test_parameters_lead_to_the_reference_and_equal_the_original_model():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = QWEN.parse(CONFIG)
    tensors = qwen_tensors(SIZES["hidden"], SIZES["layers"], SIZES["ff"], SIZES["rows"], seed=4)
    restored = {}
    for parameter in QWEN.params(config):  # through the packed form and back
        packed = transforms.apply(parameter.transform, [tensors[source] for source in parameter.sources])
        assert packed.shape == parameter.shape
        parts = transforms.invert(parameter.transform, packed, parameter.source_shapes)
        restored.update(zip(parameter.sources, parts, strict=True))
    assert restored.keys() == tensors.keys()
    gate_up = next(parameter for parameter in QWEN.params(config) if "gate_up" in parameter.name)
    assert gate_up.sources == ("transformer.h.0.mlp.w2.weight", "transformer.h.0.mlp.w1.weight")

    class_name, keywords, state = QWEN.to_reference(config, restored)
    model = getattr(transformers, class_name)(transformers.Qwen2Config(**keywords)).eval()
    model.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in state.items()}, strict=True)
    ids = torch.tensor([np.random.default_rng(5).integers(0, SIZES["rows"], 40).tolist()])
    original = {name: torch.from_numpy(array) for name, array in tensors.items()}
    with torch.no_grad():
        expected, found = qwen_forward(original, ids[0]), model(ids).logits[0]
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5
    swapped = {name.replace("w1", "?").replace("w2", "w1").replace("?", "w2"): t for name, t in original.items()}
    with torch.no_grad():  # the comparison sees a wrong gate
        assert float((found - qwen_forward(swapped, ids[0])).abs().max() / expected.abs().max()) > 0.05


def qwen_forward(weights: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """The first-generation model restated: logits [seq, vocab] of one sequence, from checkpoint tensors alone."""
    import torch
    from torch.nn.functional import silu, softmax

    heads, eps, base = CONFIG["num_attention_heads"], CONFIG["layer_norm_epsilon"], CONFIG["rotary_emb_base"]

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weights[name]

    def rotate(x: torch.Tensor) -> torch.Tensor:  # [seq, heads, d]
        d = x.shape[-1]
        angle = torch.arange(len(x))[:, None] / base ** (torch.arange(0, d, 2) / d)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        a, b = x[..., : d // 2], x[..., d // 2 :]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    x = weights["transformer.wte.weight"][ids]
    future = torch.ones(len(ids), len(ids)).triu(1).bool()
    for i in range(CONFIG["num_hidden_layers"]):
        block = f"transformer.h.{i}"
        fused = norm(x, f"{block}.ln_1.weight") @ weights[f"{block}.attn.c_attn.weight"].T
        fused = fused + weights[f"{block}.attn.c_attn.bias"]
        q, k, v = (part.reshape(len(ids), heads, -1) for part in fused.split(x.shape[-1], dim=-1))
        scores = torch.einsum("qhd,khd->hqk", rotate(q), rotate(k)) / q.shape[-1] ** 0.5
        mixed = torch.einsum("hqk,khd->qhd", softmax(scores.masked_fill(future, -torch.inf), -1), v)
        x = x + mixed.reshape(len(ids), -1) @ weights[f"{block}.attn.c_proj.weight"].T
        y = norm(x, f"{block}.ln_2.weight")
        gated = y @ weights[f"{block}.mlp.w1.weight"].T * silu(y @ weights[f"{block}.mlp.w2.weight"].T)
        x = x + gated @ weights[f"{block}.mlp.c_proj.weight"].T
    return norm(x, "transformer.ln_f.weight") @ weights["lm_head.weight"].T
