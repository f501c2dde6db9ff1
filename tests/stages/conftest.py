"""Bundles that several modules use; each is built once in a session."""

from __future__ import annotations

import pytest

from tests.stages import bundles


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> bundles.Built:
    """A q0f32 bundle whose checkpoint has a recorded reference."""
    built = bundles.build(tmp_path_factory.mktemp("q0f32"), "q0f32")
    bundles.record(built)
    return built


@pytest.fixture(scope="session")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> bundles.Built:
    """A q4f32_1 bundle that embeds inside prefill and decode, for one sequence, with chunks shorter than prompts."""
    return bundles.build(tmp_path_factory.mktemp("q4f32_1"), "q4f32_1", sep_embed=False, max_batch=1, prefill_chunk=24)
