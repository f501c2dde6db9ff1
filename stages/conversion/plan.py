"""What is to be converted: the parameters of a model, what they are made of, and how their scales are chosen."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from stages.checkpoint.tensors import Weights
from stages.quantization.calibrated import BY_CALIBRATION, KEPT_ANYWAY, Calibrated

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    import numpy as np

    from stages.documents.model import CheckpointTensor
    from stages.documents.params import Parameter, Register


@dataclass(frozen=True)
class Plan:
    """What to convert: the register's parameters, the checkpoint's tensors, files and their digests, and how.

    ``threads`` 0 takes one per processor; ``tools`` are versions of what compiles kernels. ``importance`` is float32
    [k] of tensors that are matrices reading k channels, ``feedback`` the file of what error feedback takes; ``factors``
    float32 [k], by parameter, is what awq multiplies columns by.
    """

    register: Register
    tensors: Mapping[str, CheckpointTensor]
    files: Mapping[str, Path]
    digests: Mapping[str, str]
    scales: str
    threads: int
    tools: Mapping[str, str]
    importance: Mapping[str, np.ndarray] = field(default_factory=dict)
    feedback: Mapping[str, Path] = field(default_factory=dict)
    factors: Mapping[str, np.ndarray] = field(default_factory=dict)

    def how(self, entry: Parameter) -> tuple[str, np.ndarray | None]:
        """Return how the scales of a parameter are chosen, and how much an error of each of its columns counts."""
        return self._chosen(entry)[:2]

    def feedback_of(self, entry: Parameter) -> Path | None:
        """Return the error feedback of a parameter, whose sources must all read the same input; else None."""
        return self._chosen(entry)[2]

    def _chosen(self, entry: Parameter) -> tuple[str, np.ndarray | None, Path | None]:
        row = entry["quantize"]
        if row is None:
            return self.scales, None, None
        found = Calibrated(self.scales, self.importance, self.feedback)
        scales, counts, feedback = found.how(entry["sources"], row["bits"], entry["shape"][-1])
        factor = self.factors.get(entry["name"])  # an error of a multiplied column is divided again
        return scales, counts if counts is None or factor is None else counts / factor**2, feedback

    def batches(self, size: int) -> list[list[Parameter]]:
        """Split the parameters, in the checkpoint's order, into lists that are made of about ``size`` bytes each."""
        return Weights(self.files, self.tensors).batches(self.register["logical"], size)

    def files_of(self, entries: Iterable[Parameter]) -> set[str]:
        """Return the checkpoint's files that parameters are made of."""
        weights = Weights(self.files, self.tensors)
        return {file for entry in entries for name in entry["sources"] for file in weights.files(name)}

    def uncalibrated(self) -> list[str]:
        """Return the names of layers that are quantized as calibration says but for its not having seen them."""
        return [
            entry["name"]
            for entry in self.register["logical"]
            if self.scales in BY_CALIBRATION
            and entry["kind"] == "linear"
            and entry["quantize"]
            and entry["quantize"]["bits"] < KEPT_ANYWAY
            and self.how(entry)[0] != ("importance" if self.scales == "awq" else self.scales)
        ]
