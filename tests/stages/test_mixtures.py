"""Mixtures of experts, built through the stages and compared with transformers on the same files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

from stages.verification.rounding import in_bytes, rounded
from tests.stages import test_traced
from tests.support import family_models, traced_models

QUICK = {("qwen3_moe", "q4f16_1")}  # the others wait for `-m slow`
BUILDS = [
    pytest.param(name, scheme, marks=[] if (name, scheme) in QUICK else pytest.mark.slow, id=f"{name}-{scheme}")
    for name in traced_models.MIXTURES
    for scheme in ("q0f32", "q4f16_1", "q8f16_1")
]


@pytest.mark.parametrize(("model_type", "scheme"), BUILDS)
def test_a_mixture_says_what_transformers_says(tmp_path: Path, model_type: str, scheme: str) -> None:
    test_traced.check(test_traced.built(tmp_path, model_type, scheme))


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral"])
def test_experts_read_quantized_activations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str) -> None:
    """Beside transformers with what quantized layers read rounded: within a tenth of what that rounding does."""
    import torch
    import transformers

    made = test_traced.built(tmp_path, model_type, "q4f16_1", activations="int8")
    exact, moved = made.reference, []
    plain, load = torch.nn.functional.linear, transformers.AutoModelForCausalLM.from_pretrained
    routers = traced_models.MIXTURES[model_type].get("num_experts", 8)  # which read floats

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return plain(x if len(weight) == routers else in_bytes(x, 32), weight, bias)

    def in_turn(ids: list[int]) -> np.ndarray:
        before = exact(ids)
        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.functional, "linear", linear)
            eager = {"experts_implementation": "eager"}  # whose products are those of torch.nn.functional
            patch.setattr(
                transformers.AutoModelForCausalLM, "from_pretrained", lambda *a, **more: load(*a, **more, **eager)
            )
            wanted = exact(ids)
        moved.append(family_models.error(before, wanted))
        return wanted

    errors = traced_models.differences(made, reference=in_turn)
    assert max(errors) < max(moved) / 10, (max(errors), moved)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_what_experts_read_is_rounded_where_a_bound_is_measured(model_type: str) -> None:
    """By their own formula; GPT-OSS has its matrices turned, and limits what they give."""
    import torch
    import transformers

    sizes = {**traced_models.SIZES, **traced_models.MIXTURES[model_type]}
    config = transformers.AutoConfig.for_model(model_type, **sizes, experts_implementation="eager")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    name = "model.layers.1.mlp.experts"
    experts = model.get_submodule(name)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    x, chosen, share = torch.randn(5, 64), torch.tensor([[0, 3]] * 5), torch.rand(5, 2)
    groups = {f"{name}.gate_up_proj": 32, f"{name}.down_proj": 16}
    with torch.inference_mode(), rounded(model, "int8", groups):
        found = experts(x, chosen, share)
    exact = experts(x, chosen, share)

    wanted = torch.zeros_like(x)
    for place in range(2):
        for row in range(5):
            number = int(chosen[row, place])
            if model_type == "gpt_oss":
                inner = in_bytes(x[row], 32) @ experts.gate_up_proj[number] + experts.gate_up_proj_bias[number]
                inner = experts._apply_gate(inner)
                y = in_bytes(inner, 16) @ experts.down_proj[number] + experts.down_proj_bias[number]
            else:
                gate, up = (experts.gate_up_proj[number] @ in_bytes(x[row], 32)).chunk(2)
                y = experts.down_proj[number] @ in_bytes(experts.act_fn(gate) * up, 16)
            wanted[row] += share[row, place] * y
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)
    assert (found - exact).abs().max() > 20 * (found - wanted).abs().max()
