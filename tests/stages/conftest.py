"""Bundles and tokenizers that several modules use; each is built once in a session."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from stages.tokenizers.proof import equality as proof
from tests.support import bundles, tokenizer_folders
from tests.support.local_context import LocalContext

FEWER_POINTS, FEWER_DRAWN = proof.code_points()[::60], proof.generated_corpus()[::20]


@pytest.fixture(autouse=True)
def _fewer_texts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prove tokenizers on a part of the texts, but in slow tests and where a whole pipeline runs."""
    if request.node.get_closest_marker("slow") is None:
        monkeypatch.setattr(proof, "code_points", lambda: FEWER_POINTS)
        monkeypatch.setattr(proof, "generated_corpus", lambda: FEWER_DRAWN)


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> bundles.Built:
    """A q0f32 bundle whose checkpoint has a recorded reference."""
    built = bundles.build(tmp_path_factory.mktemp("q0f32"), "q0f32")
    bundles.record(built)
    return built


@pytest.fixture(scope="session")
def certified(recorded: bundles.Built, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LocalContext]:
    """A bundle as `export` lays it out, and what its verify said."""
    folder = tmp_path_factory.mktemp("certified")
    context = bundles.verify(recorded, folder / "verify", reference="recorded")
    shutil.copytree(recorded.bundle, folder / "bundle")
    shutil.copy(folder / "verify" / "certificate.json", folder / "bundle")
    return folder / "bundle", context


@pytest.fixture(scope="session")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> bundles.Built:
    """A q4f32_1 bundle that embeds inside prefill and decode, for one sequence, with chunks shorter than prompts."""
    return bundles.build(tmp_path_factory.mktemp("q4f32_1"), "q4f32_1", sep_embed=False, max_batch=1, prefill_chunk=24)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[LocalContext, Path]]:
    """By name of a tokenizer folder: what tokenizer-bundle said of it, and the directory that it wrote."""
    found = {}

    def get(name: str) -> tuple[LocalContext, Path]:
        if name not in found:
            files, family, eos = tokenizer_folders.FOLDERS[name]
            found[name] = tokenizer_folders.build(tmp_path_factory.mktemp("folder"), files, family, eos)
        return found[name]

    return get


@pytest.fixture(scope="session")
def emitted(built: Callable[[str], tuple[LocalContext, Path]]) -> Callable[[str], Path]:
    """By name of a tokenizer folder: the directory that tokenizer-bundle wrote."""
    return lambda name: built(name)[1]
