"""Sensitivity: how far the original's output moves when one matrix alone is quantized, for each of several rows.

Measured is the divergence in one row, as verify's advice does it (:mod:`stages.verification.advice`); that of another
is taken to be in proportion to the squares of what it loses, which is what a small change of a matrix comes to. This
runs in a process of its own, as ``python -m stages.calibration.sensitivity``.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stages.calibration.moments import names_of
from stages.quantization.parameter import quantize, restored
from stages.quantization.schemes import SCHEMES
from stages.verification import advice, apart, original, streaming

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stages.documents.files import JsonObject
    from stages.quantization.schemes import Scheme
    from stages.verification.apart import Progress

MEASURED = "q3k"  # the row that divergences are measured in: enough to stand out from the rounding of logits
TOKENS = 64  # that a matrix is judged by
SAMPLED = 64  # rows of a matrix whose loss is compared


@dataclass(frozen=True)
class Request:
    """The ``original``'s own request, and the names of ``schemes`` whose rows of the body are compared."""

    original: JsonObject
    schemes: Sequence[str]


def compute(request: Request, progress: Progress) -> dict[str, np.ndarray]:
    """Return the divergence float32 [schemes] of each tensor of the checkpoint that is a matrix, by its name."""
    import torch

    asked = original.Request(**request.original)
    mapped, model, _ = streaming.load(asked.root, asked.files, asked.config, asked.scratch)
    matrices, measured = advice.matrices_of(model), SCHEMES[MEASURED]
    ids = torch.tensor(asked.pieces[0][:TOKENS])[None]
    names = [*matrices]
    groups = [names[start : start + advice.TOGETHER] for start in range(0, len(names), advice.TOGETHER)]
    divergences: list[float] = []
    with torch.inference_mode():
        with streaming.weights_in_float32(model, mapped):
            wanted = advice.log_probs(model, ids)[0]
        for done, chosen in enumerate(groups, start=1):
            # Entered first, for it reads the weights while they are lent.
            alone = advice.each_alone(
                [advice.storing_one("linear", matrices[name][1], measured, "max") for name in chosen]
            )
            with alone, streaming.weights_in_float32(model, mapped):
                found = advice.log_probs(model, ids.expand(len(chosen), -1))
            divergences += advice.divergence(wanted, found).mean(-1).tolist()
            progress(done, len(groups), "passes for sensitivities")
    places, found_by_tensor = names_of(model, mapped.tensors), dict[str, np.ndarray]()
    for name, kl in zip(names, divergences, strict=True):
        weight = matrices[name][1][0].weight
        if id(weight) in places:  # parts of one tensor cost together what each of them does
            tensor, costs = places[id(weight)], kl * losses(weight, [SCHEMES[each] for each in request.schemes])
            found_by_tensor[tensor] = found_by_tensor.get(tensor, 0) + costs.astype(np.float32)
    return found_by_tensor


def losses(weight: Any, schemes: Sequence[Scheme]) -> np.ndarray:
    """Return the squares of what each row loses of some rows of ``weight``, as multiples of what the measured loses."""
    some = weight.detach()[:: max(1, len(weight) // SAMPLED)].float().numpy()

    def lost(scheme: Scheme) -> float:
        assert scheme.body
        row = scheme.body.fitting(some.shape[1])
        left = restored(quantize(some, row, "max"), row, some.shape[1])
        return float(np.square(left - some, dtype=np.float64).sum())

    return np.array([lost(each) for each in schemes]) / max(lost(SCHEMES[MEASURED]), 1e-30)


def main(request_path: str, result_path: str) -> None:
    """Compute the request in the one file into the other."""
    request = Request(**json.loads(Path(request_path).read_text("utf-8")))
    np.savez(result_path, **compute(request, apart.say))  # type: ignore[arg-type]


if __name__ == "__main__":
    main(*sys.argv[1:])
