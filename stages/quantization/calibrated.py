"""How the scales of a matrix are chosen where calibration may decide: what is known of what the matrix is made of."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from stages.quantization.feedback import INDEX, load
from stages.quantization.parameter import quantize, restored

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from stages.quantization.rows import Row

BY_CALIBRATION = ("importance", "gptq", "awq")  # scales that are chosen by what calibrate has found
KEPT_ANYWAY = 8  # bits of which nothing more can be had


@dataclass(frozen=True)
class Calibrated:
    """How ``scales`` are chosen and, by tensor of the checkpoint, the ``importance`` [k] of its columns and the file of
    its ``feedback``.
    """

    scales: str
    importance: Mapping[str, np.ndarray] = field(default_factory=dict)
    feedback: Mapping[str, Path] = field(default_factory=dict)

    @classmethod
    def read(cls, scales: str, importance: Path | None, feedback: Path | None) -> Calibrated:
        """Return what calibrate wrote into the file ``importance`` and the folder ``feedback``."""
        counts, files = dict[str, np.ndarray](), dict[str, Path]()
        if importance:
            with np.load(importance) as found:
                counts = dict(found)
        if feedback:
            files = {name: feedback / file for name, file in json.loads((feedback / INDEX).read_bytes()).items()}
        return cls(scales, counts, files)

    def how(self, tensors: Sequence[str], bits: int, k: int) -> tuple[str, np.ndarray | None, Path | None]:
        """Return how scales are chosen of a matrix made of ``tensors`` with rows of ``k`` values, kept in ``bits``, how
        much an error of each column counts, and the file of its feedback.

        By plain squares (mse) where eight bits are kept, and where there is no importance; by importance alone where
        its parts do not read the same, and of what awq multiplies.
        """
        if self.scales not in BY_CALIBRATION:
            return self.scales, None, None
        found = [self.importance.get(name) for name in tensors]
        known = [each for each in found if each is not None and each.shape == (k,)]
        if bits >= KEPT_ANYWAY or len(known) < len(found):
            return "mse", None, None
        counts: np.ndarray = np.stack(known).mean(axis=0, dtype=np.float32)
        files = {self.feedback.get(name) for name in tensors}
        file = files.pop() if len(files) == 1 and self.scales == "gptq" else None
        return "gptq" if file else "importance", counts, file

    def left(self, weight: np.ndarray, row: Row, tensor: str) -> np.ndarray:
        """Return what is left of a float32 ``weight`` [n, k], some rows of ``tensor``, once ``row`` has stored it."""
        k = weight.shape[1]
        scales, counts, file = self.how([tensor], row.bits, k)
        return restored(quantize(weight, row, scales, counts, _loaded(file) if file else None), row, k)


_loaded = functools.lru_cache(maxsize=1)(load)  # one matrix is stored in several rows, one after the other
