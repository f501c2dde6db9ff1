"""Mixtures of experts, built through the stages and compared with transformers on the same files."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")

from tests.stages import test_traced
from tests.support import traced_models

QUICK = {("qwen3_moe", "q4f16_1")}  # the others wait for `-m slow`
BUILDS = [
    pytest.param(name, scheme, marks=[] if (name, scheme) in QUICK else pytest.mark.slow, id=f"{name}-{scheme}")
    for name in traced_models.MIXTURES
    for scheme in ("q0f32", "q4f16_1", "q8f16_1")
]


@pytest.mark.parametrize(("model_type", "scheme"), BUILDS)
def test_a_mixture_says_what_transformers_says(tmp_path: Path, model_type: str, scheme: str) -> None:
    test_traced.check(test_traced.built(tmp_path, model_type, scheme))
