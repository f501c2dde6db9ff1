"""Keeps what benchmarks/quality.py has measured of a checkpoint, so that a table can be made in several runs."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from stages.verification.loss import Loss

ROOT = Path(__file__).resolve().parents[1]
# Code that figures depend on: another text of it measures again.
CODE = ("allocate.py", "calibration", "checkpoint", "conversion", "models", "quantization", "verification")


class Kept:
    """A folder for one checkpoint, number of tokens and text of :data:`CODE`, within ``folder``."""

    def __init__(self, folder: Path, checkpoint: Path, tokens: int) -> None:
        made_of = hashlib.blake2b(f"{checkpoint.resolve()} {tokens}".encode(), digest_size=8)
        weights = [path.stat() for path in sorted(checkpoint.glob("*.safetensors"))]
        made_of.update(repr([(stat.st_size, stat.st_mtime_ns) for stat in weights]).encode())
        paths = [path for name in CODE for path in [ROOT / "stages" / name, *(ROOT / "stages" / name).rglob("*")]]
        for path in sorted([*paths, *(ROOT / "benchmarks").glob("*.py")]):
            if path.suffix in (".py", ".jsonl"):
                made_of.update(path.read_bytes())
        self.folder = folder / made_of.hexdigest()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._figures = self.folder / "figures.json"

    def calibrated(self, write: Callable[[Path], None]) -> Path:
        """Return the folder of what the stage calibrate writes, which ``write`` fills the first time."""
        found = self.folder / "calibrated"
        if not found.exists():
            begun = self.folder / "calibrating"
            begun.mkdir(exist_ok=True)
            write(begun)
            begun.rename(found)
        return found

    def costs(self, measure: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """Return what each tensor costs in each row, which ``measure`` measures the first time."""
        path = self.folder / "costs.npz"
        if not path.exists():
            begun = self.folder / "measuring.npz"
            np.savez(begun, **measure())  # type: ignore[arg-type]
            begun.rename(path)
        with np.load(path) as found:
            return dict(found)

    def figures(self, label: str, measure: Callable[[], Loss]) -> Loss:
        """Return the figures of a way to store matrices, which ``measure`` measures the first time."""
        from stages.verification.loss import Loss

        if label not in self._known():
            found = asdict(measure())
            self._figures.write_text(json.dumps({**self._known(), label: found}, indent=1))
        return Loss(**self._known()[label])

    def _known(self) -> dict[str, dict[str, float]]:
        found: dict[str, dict[str, float]] = json.loads(self._figures.read_text()) if self._figures.exists() else {}
        return found
