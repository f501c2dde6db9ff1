"""Small fake stages, and pipeline files written and read in a directory of the test."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

import pytest

from stagegraph import registry
from stagegraph.errors import SpecError
from stagegraph.spec.load import load
from stagegraph.spec.model import NodeSpec, PipelineSpec
from stagegraph.stage import Source, Stage, param, source

HEAD = "version: 1\nname: demo"
TARGETS = {"llvm": 1, "cuda": 2}


class Fetch(Stage):
    """Reads a checkpoint."""

    id = "fetch"

    @dataclass(frozen=True)
    class Params:
        checkpoint: Source = source("directory to read", include=("*.json",))
        extra: Source = source("more files", include=("*.txt",), optional=True)
        files: tuple[Source, ...] = param("several files", default=())


class Shape(Stage):
    """Has a parameter of every type."""

    id = "shape"

    @dataclass(frozen=True)
    class Params:
        target: str = param("what to build for", choices="tests.support.spec_files:TARGETS")
        size: int = param("how large", default=1, minimum=1)
        ratio: float = param("how much", default=0.5)
        fast: bool = param("hurry", default=False)
        mode: str = param("in which way", default="auto", choices=("auto", "manual"))
        archs: list[int] = param("architectures", default=(80, 86), minimum=50)
        tags: tuple[str, ...] = param("labels", default=())
        limit: int | None = param("at most", default=None)


class Plain(Stage):
    """Has no parameters."""

    id = "plain"

    @dataclass(frozen=True)
    class Params:
        pass


class SpecFiles:
    """Pipeline files in the working directory, where the fake stages are the shipped ones."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        monkeypatch.chdir(root)
        shipped = {cls.id: f"{__name__}:{cls.__name__}" for cls in (Fetch, Shape, Plain)}
        provider = registry.Provider(stages=shipped)
        monkeypatch.setattr(registry, "shipped", lambda: provider)
        for cached in (registry.get_stage, registry.stage_reference):
            cached.cache_clear()

    def write(self, name: str, text: str) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    def load(self, text: str, *overrides: str, env: Mapping[str, str] | None = None) -> PipelineSpec:
        self.write("p.yaml", text)
        return load(Path("p.yaml"), overrides, env or {})

    def problems(self, text: str, *overrides: str, env: Mapping[str, str] | None = None) -> list[str]:
        with pytest.raises(SpecError) as caught:
            self.load(text, *overrides, env=env)
        return list(caught.value.problems)

    def entries(self, body: str, *overrides: str, env: Mapping[str, str] | None = None) -> dict[str, NodeSpec]:
        """Return the nodes by name of the head followed by ``body``, whose first line is the file's third."""
        return {node.name: node for node in self.load(HEAD + dedent(body), *overrides, env=env).nodes}

    def wrong(self, body: str, *overrides: str, env: Mapping[str, str] | None = None) -> list[str]:
        """Return the problems of the head followed by ``body``, whose first line is the file's third."""
        return self.problems(HEAD + dedent(body), *overrides, env=env)
