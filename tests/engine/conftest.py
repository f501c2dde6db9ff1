"""The demo pipeline of fake stages, ready to run in a directory of the test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.demo import STAGES, Demo, forget, provide


@pytest.fixture
def demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Demo]:
    built = Demo(tmp_path, capsys)
    monkeypatch.syspath_prepend(str(tmp_path / "lib"))
    monkeypatch.setenv("COUNT_FILE", str(built.counter))
    provide(monkeypatch, {name: f"fakes.{name}:{name.title()}" for name in STAGES})
    yield built
    forget()
