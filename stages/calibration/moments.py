"""Runs the original model on sample text and computes the mean square of each matrix's input, by channel.

An error e of a weight in column i costs about e ** 2 times the mean square of the i-th input (llama.cpp's importance
matrix). transformers runs the checkpoint as for verify (:mod:`stages.verification.streaming`): weights stay in their
files, and all tokens go through a module before the next one is looked at. This runs in a process of its own, as
``python -m stages.calibration.moments``.
"""

from __future__ import annotations

import bisect
import json
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stages.calibration.curvature import Curvatures
from stages.verification import apart, streaming
from stages.verification.original import OriginalRequest

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from stages.verification.apart import Progress

ENOUGH = 64  # tokens that a matrix must have read: of fewer, an expert's, the mean says little


def compute(request: OriginalRequest, progress: Progress, feedback: Path | None = None) -> dict[str, np.ndarray]:
    """Return float32 [k] of each tensor of the checkpoint that is a matrix which reads k channels, by its name; with
    ``feedback``, write into that folder what error feedback takes, too.

    Tables that are looked up read nothing, and are left out, as are matrices that read fewer than :data:`ENOUGH` tokens
    and those that transformers joins to larger ones as it loads them.
    """
    import torch

    mapped, model, _ = streaming.load(request.root, request.files, request.config, request.scratch)
    longest = max(map(len, request.pieces))
    padded = torch.tensor([[*piece, *[0] * (longest - len(piece))] for piece in request.pieces])
    valid = torch.tensor([[at < len(piece) for at in range(longest)] for piece in request.pieces])
    names, sums = names_of(model, mapped.tensors), _Sums(valid, Curvatures(feedback) if feedback else None)
    with (
        torch.inference_mode(),
        _watched(model, names, sums),
        streaming.weights_in_float32(model, mapped, progress),
    ):
        states = getattr(model, model.base_model_prefix)(padded, use_cache=False).last_hidden_state
    head = model.get_output_embeddings()
    if head is not None and id(head.weight) in names:  # which has not run: its logits would take the most memory of all
        sums.add(names[id(head.weight)], states)
    return sums.finish()


class _Sums:
    """Sums of squares by channel of the rows where ``valid`` bool [b, s] is."""

    def __init__(self, valid: Any, curvatures: Curvatures | None) -> None:
        self._valid = valid
        self._curvatures = curvatures
        self._sums: dict[str, Any] = {}
        self._counts: dict[str, int] = {}

    def add(self, name: str, read: Any) -> None:
        """Add ``read`` [b, s, k], or rows [n, k] that were chosen from it, to what the tensor ``name`` has read."""
        import torch

        rows = read[self._valid] if read.shape[:2] == self._valid.shape else read.reshape(-1, read.shape[-1])
        total = rows.float().square().sum(0, dtype=torch.float64)
        self._sums[name] = self._sums[name] + total if name in self._sums else total
        self._counts[name] = self._counts.get(name, 0) + len(rows)
        if self._curvatures and len(rows) >= ENOUGH:
            self._curvatures.add(name, read, rows)

    def finish(self) -> dict[str, np.ndarray]:
        """Return the mean squares of what was read often enough."""
        if self._curvatures:
            self._curvatures.finish()
        return {
            name: (total / self._counts[name]).float().numpy()
            for name, total in sorted(self._sums.items())
            if self._counts[name] >= ENOUGH
        }


def names_of(model: Any, tensors: Mapping[str, Any]) -> dict[int, str]:
    """Return which tensor of the checkpoint each parameter lies in, by the parameter's identity: parameters are the
    checkpoint's tensors or parts of them, whatever transformers calls them.
    """
    begins = sorted((tensor.data_ptr(), name) for name, tensor in tensors.items())
    found = {}
    for parameter in model.parameters():
        at = bisect.bisect_right(begins, (parameter.data_ptr(), "\U0010ffff")) - 1
        begin, name = begins[at] if at >= 0 else (0, "")
        if name and parameter.data_ptr() < begin + tensors[name].nbytes:
            found[id(parameter)] = name
    return found


@contextmanager
def _watched(model: Any, names: Mapping[int, str], sums: _Sums) -> Iterator[None]:
    """Sum up what each module with a matrix of the checkpoint reads."""
    import torch

    def note(name: str) -> Any:
        def before(_module: Any, inputs: Any) -> None:
            sums.add(name, inputs[0])

        return before

    hooks = []
    for module in model.modules():
        weight = getattr(module, "weight", None)
        matrix = isinstance(weight, torch.nn.Parameter) and weight.ndim == 2 and id(weight) in names
        if matrix and not isinstance(module, torch.nn.Embedding):
            hooks.append(module.register_forward_pre_hook(note(names[id(weight)])))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def main(request_path: str, result_path: str) -> None:
    """Run the request in a file; write the result to another."""
    request = json.loads(Path(request_path).read_text("utf-8"))
    folder = request.pop("feedback")
    found = compute(OriginalRequest(**request), apart.say, Path(folder) if folder else None)
    np.savez(result_path, **found)  # type: ignore[arg-type]


if __name__ == "__main__":
    main(*sys.argv[1:])
