"""Sensitivity: how much the original's output changes when a single matrix is quantized, for each of several rows.

Measured is the divergence in one row, as verify's advice does it (:mod:`stages.verification.advice`), on pieces from
all over the text; that in another is taken to be in proportion to the squares by which what the matrix computes of them
moves, which is what a small change of it comes to. In both, scales are chosen as quantize will choose them. This runs
in a process of its own, as ``python -m stages.calibration.sensitivity``. Tensors that are stored together are
judged together, and a pass begins with the first layer that it changes (:mod:`stages.calibration.skipping`).
"""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from threadpoolctl import threadpool_limits

from stages.calibration import skipping
from stages.calibration.moments import names_of
from stages.quantization.calibrated import Calibrated
from stages.quantization.schemes import SCHEMES
from stages.verification import advice, apart, original, streaming

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from stages.documents.files import JsonObject
    from stages.quantization.schemes import Scheme
    from stages.verification.apart import Progress

MEASURED = "q3k"  # the row that divergences are measured in: enough to stand out from the rounding of logits
TOKENS = 4096  # of the text, from all over which the pieces are taken
PIECES, LENGTH = 4, 64  # that a matrix is judged by, and the tokens of each
TOGETHER = 4  # parameters that are judged in one pass: those of a layer
SAMPLED = 64  # rows of a matrix whose loss is compared


@dataclass(frozen=True)
class SensitivityRequest:
    """The ``original``'s own request, the names of ``schemes`` whose rows of the body are compared, how ``scales`` are
    chosen, where calibrate's ``importance`` and ``feedback`` are, if they count, and which tensors of the checkpoint
    are ``joined`` to one parameter.
    """

    original: JsonObject
    schemes: Sequence[str]
    scales: str = "max"
    importance: str = ""
    feedback: str = ""
    joined: Sequence[Sequence[str]] = ()


def compute(request: SensitivityRequest, progress: Progress) -> dict[str, np.ndarray]:
    """Return the divergence float32 [schemes] of each tensor of the checkpoint that is a matrix, by its name."""
    import torch

    original_request = original.OriginalRequest(**request.original)
    mapped, model, _ = streaming.load(
        original_request.root, original_request.files, original_request.config, original_request.scratch
    )
    matrices, places = advice.matrices_of(model), names_of(model, mapped.tensors)
    tensors = {name: places[id(of[0].weight)] for name, (_, of) in matrices.items() if id(of[0].weight) in places}
    paths = [Path(path) if path else None for path in (request.importance, request.feedback)]
    calibrated = Calibrated.read(request.scales, *paths)
    ids = torch.tensor(spread(original_request.pieces))
    losses = Losses([SCHEMES[each] for each in request.schemes], calibrated)
    head = model.get_output_embeddings()

    def run() -> Any:
        with streaming.weights_in_float32(model, mapped, progress):
            return advice.log_probs(model, ids)

    with torch.inference_mode():
        # Entered first, here and below, for it reads the weights while they are lent.
        with _compared(losses, matrices, tensors):
            wanted, layers = skipping.recorded(model, run)
        units = _units([name for name in tensors if name in losses.found], tensors, request.joined)
        divergences: list[float] = []
        groups = [units[start : start + TOGETHER] for start in range(0, len(units), TOGETHER)]
        for done, chosen in enumerate(groups, start=1):
            modules = [[module for name in unit for module in matrices[name][1]] for unit in chosen]
            alone = [(each, _stored(calibrated, places)) for each in modules]
            count = layers.before([module for each in modules for module in each], last=head)
            with (
                advice.each_alone(alone, len(ids)),
                layers.skipped(count, len(chosen)),
                streaming.weights_in_float32(model, mapped),
            ):
                found = advice.log_probs(model, ids.repeat(len(chosen), 1))
            divergences += advice.divergence(wanted, found.unflatten(0, (-1, len(ids)))).mean((1, 2)).tolist()
            progress(done, len(groups), "passes for sensitivities")
    found_by_tensor = dict[str, np.ndarray]()
    for unit, kl in zip(units, divergences, strict=True):  # tensors that are judged together share alike
        share = (kl * np.mean([losses.found[name] for name in unit], axis=0)).astype(np.float32)
        owners = sorted({tensors[name] for name in unit})
        for tensor in owners:
            found_by_tensor[tensor] = found_by_tensor.get(tensor, 0) + share / np.float32(len(owners))
    return found_by_tensor


def _units(names: Sequence[str], tensors: Mapping[str, str], joined: Sequence[Sequence[str]]) -> list[list[str]]:
    """Return ``names`` of matrices in order, those together whose ``tensors`` are in one of ``joined``."""
    first = {tensor: group[0] for group in joined for tensor in group}
    units = dict[str, list[str]]()
    for name in names:
        tensor = tensors[name]
        units.setdefault(first.get(tensor, name), []).append(name)
    return [*units.values()]


def spread(pieces: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return the first :data:`LENGTH` tokens of :data:`PIECES` of ``pieces``, far from each other, of those that have
    so many; of the longest where none has.
    """
    long = [piece for piece in pieces if len(piece) >= LENGTH] or [max(pieces, key=len)]
    count = min(PIECES, len(long))
    return [[*long[number * len(long) // count][:LENGTH]] for number in range(count)]


def _stored(calibrated: Calibrated, places: Mapping[int, str]) -> Callable[[Any, Any], Any]:
    """Return what a module computes with its weight, some rows of the tensor that ``places`` has by the weight's
    identity, as :data:`MEASURED` stores it.
    """
    import torch

    body = SCHEMES[MEASURED].body
    assert body

    def compute(module: Any, x: Any) -> Any:
        weight = module.weight.data.numpy()
        with threadpool_limits(1, user_api="blas"):
            left = calibrated.left(weight, body.fitting(weight.shape[1]), places[id(module.weight)])
        made = torch.from_numpy(left)
        return made[x] if type(module) is torch.nn.Embedding else torch.nn.functional.linear(x, made, module.bias)

    return compute


@dataclass
class Losses:
    """Squares of what each row of ``schemes`` loses of matrices, as multiples of what :data:`MEASURED` does; ``found``
    by name.
    """

    schemes: Sequence[Scheme]
    calibrated: Calibrated
    found: dict[str, np.ndarray] = field(default_factory=dict)

    def add(self, name: str, tensor: str, weight: np.ndarray, read: np.ndarray | None) -> None:
        """Compare rows of a ``weight`` [n, k] by its outputs on ``read`` [tokens, k]; an embedding by its values."""
        some = np.ascontiguousarray(weight[:: max(1, len(weight) // SAMPLED)], np.float32)

        def lost(scheme: Scheme) -> float:
            assert scheme.body
            error = self.calibrated.left(some, scheme.body.fitting(some.shape[1]), tensor) - some
            moved = error if read is None else read @ error.T
            return float(np.square(moved, dtype=np.float64).sum())

        with threadpool_limits(1, user_api="blas"):  # sums depend on their number, and choices on sums
            measured = max(lost(SCHEMES[MEASURED]), 1e-30)
            self.found[name] = np.array([*map(lost, self.schemes)]) / measured


@contextmanager
def _compared(
    losses: Losses, matrices: Mapping[str, tuple[str, list[Any]]], tensors: Mapping[str, str]
) -> Iterator[None]:
    """Compare each of ``tensors``, by the names of ``matrices``, while the model runs: a layer on what it reads."""
    import torch

    def hook(name: str) -> Any:
        def after(module: Any, inputs: Any, _output: Any) -> None:
            if name not in losses.found:  # the first run is the one of the whole model
                table = type(module) is torch.nn.Embedding
                read = None if table else inputs[0].reshape(-1, inputs[0].shape[-1]).numpy()
                losses.add(name, tensors[name], module.weight.data.numpy(), read)

        return after

    # Of a table that is the head too the head is compared: it is where most of what the table costs is lost.
    hooks = [matrices[name][1][-1].register_forward_hook(hook(name)) for name in tensors]
    try:
        yield
    finally:
        for each in hooks:
            each.remove()


def main(request_path: str, result_path: str) -> None:
    """Compute the request in the one file into the other."""
    request = SensitivityRequest(**json.loads(Path(request_path).read_text("utf-8")))
    np.savez(result_path, **compute(request, apart.say))  # type: ignore[arg-type]


if __name__ == "__main__":
    main(*sys.argv[1:])
