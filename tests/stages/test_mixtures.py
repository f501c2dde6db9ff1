"""Mixtures of experts, built through the stages and held against transformers on the same files."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")

from stagegraph.stage import StageError
from tests.stages import families, test_traced, traced
from tests.stages.test_traced import kernels

__all__ = ["kernels"]

QUICK = {("qwen3_moe", "q4f16_1")}  # the others wait for `-m slow`
BUILDS = [
    pytest.param(name, scheme, marks=[] if (name, scheme) in QUICK else pytest.mark.slow, id=f"{name}-{scheme}")
    for name in traced.MIXTURES
    for scheme in ("q0f32", "q4f16_1", "q8f16_1")
]


@pytest.mark.parametrize(("model_type", "scheme"), BUILDS)
def test_a_mixture_says_what_transformers_says(tmp_path: Path, kernels: Path, model_type: str, scheme: str) -> None:
    test_traced.check(test_traced.built(tmp_path, model_type, scheme, kernels))


@pytest.mark.slow
@pytest.mark.parametrize("model_type", traced.REFUSED)
def test_a_router_of_unproven_operators_is_refused_by_name(tmp_path: Path, model_type: str) -> None:
    checkpoint = traced.write(tmp_path / "checkpoint", model_type)
    with pytest.raises(StageError, match=r"a mixture of experts beside (gather|max|polar)"):
        families.parse_and_register(tmp_path, checkpoint, "q0f32", frontend="traced")
