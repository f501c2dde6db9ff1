"""The reference computed now: transformers in float32 on the weights that the bundle holds.

torch never shares a process with the runtime that is being checked: :func:`reference` runs this module as
``python -m stages.verification.live REQUEST.json RESULT.npz``.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stages.models import described
from stages.runtime import tensor_cache
from stages.runtime.folder import Folder
from stages.tracing import hollow
from stages.verification import apart, rounding, weights
from stages.verification import original as original_model
from stages.verification.checks import difference

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from stages.verification.apart import Progress


@dataclass(frozen=True)
class Request:
    """What to compute.

    ``bundle``, ``params`` and ``config`` are where the weights and their description are. The logits after each of
    ``tokens`` are wanted, and how far the roundings of ``arithmetic`` move them (see
    :mod:`stages.verification.rounding`). Each of ``continued`` is a prompt and a continuation, as ids: wanted is the id
    that the reference picks greedily in place of each of the continuation's, among those below ``active_vocab_size``.
    ``original`` asks for the original model's probabilities as well (see :mod:`stages.verification.original`).
    """

    bundle: Path
    params: Path
    config: Path
    tokens: Sequence[int]
    arithmetic: str
    continued: Sequence[tuple[Sequence[int], Sequence[int]]]
    active_vocab_size: int
    original: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Answer:
    """What the reference gives for a :class:`Request`.

    ``logits`` float32 [n, V], of which row i follows ``tokens[: i + 1]``; ``spread``: how far rounding moved them, as
    :func:`~stages.verification.checks.difference`; ``picks``: for each continuation as many ids as it has.
    """

    origin: str
    logits: np.ndarray
    spread: float
    picks: Sequence[Sequence[int]]
    original: Mapping[str, np.ndarray] | None = None


def answer(request: Request, progress: Progress) -> Answer:
    """Compute ``request`` in a process of its own; :class:`LiveError` if that fails."""
    result = apart.call(__name__, asdict(request), progress)
    picks = [result[f"picks_{i}"].tolist() for i in range(len(request.continued))]
    origin = f"{result['origin']} in float32 on the bundle's own weights"
    original = {name: result[name] for name in original_model.ARRAYS} if request.original else None
    return Answer(origin, result["logits"], float(result["spread"]), picks, original)


def compute(request: Request, progress: Progress = lambda *_: None) -> dict[str, Any]:
    """Return the fields of :class:`Answer` for ``request``, each of ``picks`` as ``picks_0`` and so on."""
    import torch
    import transformers

    # The original goes first and is gone before the other model comes: there is never room for both.
    result: dict[str, Any] = {}
    if request.original:
        result |= original_model.compute(original_model.Request(**request.original), progress)
    model = load(request, progress)
    passes = 2 + len(request.continued)

    def forward(ids: Sequence[int], number: int) -> np.ndarray:
        with torch.inference_mode():
            logits: np.ndarray = model(torch.tensor([[*ids]]), use_cache=False).logits[0].float().numpy()
        progress(number, passes, "passes of the reference")
        return logits

    logits = forward(request.tokens, 1)
    with rounding.rounded(model, request.arithmetic):
        spread = difference(forward(request.tokens, 2), logits)
    origin = f"transformers {transformers.__version__} and torch {torch.__version__}"
    result |= {"origin": origin, "logits": logits, "spread": spread}
    for i, (prompt, ids) in enumerate(request.continued):
        rows = forward([*prompt, *ids[:-1]], 3 + i)[len(prompt) - 1 :, : request.active_vocab_size]
        result[f"picks_{i}"] = rows.argmax(-1)
    return result


def load(request: Request, progress: Progress = lambda *_: None) -> Any:
    """Return transformers' model in float32 with the weights that the bundle holds, dequantized."""
    import torch
    import transformers

    registry = json.loads(Path(request.params).read_text("utf-8"))
    records = tensor_cache.records(Folder(Path(request.bundle)))  # verify has checked them
    tensors: dict[str, np.ndarray] = {}
    total = sum(len(entry["sources"]) for entry in registry["logical"])
    for done, tensor in enumerate(weights.held(registry, records), start=1):
        tensors[tensor.name] = tensor.values()
        progress(done, total, "tensors of the reference")
    family, config = described(json.loads(Path(request.config).read_text("utf-8")))
    name, keywords, state = family.to_reference(config, tensors)
    cls = getattr(transformers, name)
    with hollow.parameters_without_memory():
        model = cls(cls.config_class(**keywords, attn_implementation="eager")).eval()
    # assign: the arrays become the parameters, so that the weights are in memory once.
    model.load_state_dict({key: torch.from_numpy(value) for key, value in state.items()}, strict=True, assign=True)
    model.tie_weights()
    return model


def main(request_path: str, result_path: str) -> None:
    """Compute the request in the one file into the other."""
    request = Request(**json.loads(Path(request_path).read_text("utf-8")))
    np.savez(result_path, **compute(request, apart.say))


if __name__ == "__main__":
    main(*sys.argv[1:])
