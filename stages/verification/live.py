"""Computes a live reference: transformers in float32 on the weights that the bundle holds.

torch never shares a process with the runtime that is being checked: :func:`reference` runs this module as
``python -m stages.verification.live REQUEST.json RESULT.npz``.
"""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stages.models import described
from stages.runtime import tensor_cache
from stages.runtime.folder import Folder
from stages.tracing import hollow
from stages.verification import apart, lending, rounding, weights
from stages.verification import original as original_model
from stages.verification.checks import difference

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from stages.documents.files import JsonObject
    from stages.verification.apart import Progress


@dataclass(frozen=True)
class LiveRequest:
    """The request to a live reference.

    ``bundle``, ``params`` and ``config`` are where the weights and their description are. The logits after each of
    ``tokens`` are wanted, and how far the roundings of ``arithmetic``, and of an ``int8_cache`` if the bundle has one,
    move them (see :mod:`stages.verification.rounding`). Each of ``continued`` is a prompt and a continuation, as ids:
    wanted is the id that the reference picks greedily in place of each of the continuation's, among those below
    ``active_vocab_size``. ``original`` asks for the original model's probabilities as well (see
    :mod:`stages.verification.original`).
    """

    bundle: Path
    params: Path
    config: Path
    tokens: Sequence[int]
    arithmetic: str
    int8_cache: bool
    continued: Sequence[tuple[Sequence[int], Sequence[int]]]
    active_vocab_size: int
    original: JsonObject | None = None


@dataclass(frozen=True)
class ReferenceAnswer:
    """The results of a live reference for a :class:`LiveRequest`.

    ``logits`` float32 [n, V], of which row i follows ``tokens[: i + 1]``; ``spread``: how far rounding moved them, as
    :func:`~stages.verification.checks.difference`; ``picks``: for each continuation as many ids as it has.
    """

    origin: str
    logits: np.ndarray
    spread: float
    picks: Sequence[Sequence[int]]
    original: Mapping[str, np.ndarray] | None = None


def answer(request: LiveRequest, progress: Progress) -> ReferenceAnswer:
    """Compute ``request`` in a process of its own; :class:`LiveError` if that fails."""
    result = apart.call(__name__, asdict(request), progress)
    picks = [result[f"picks_{i}"].tolist() for i in range(len(request.continued))]
    origin = f"{result['origin']} in float32 on the bundle's own weights"
    original = {name: result[name] for name in original_model.ARRAYS} if request.original else None
    return ReferenceAnswer(origin, result["logits"], float(result["spread"]), picks, original)


def compute(request: LiveRequest, progress: Progress = lambda *_: None) -> dict[str, Any]:
    """Return the fields of :class:`ReferenceAnswer` for ``request``, each of ``picks`` as ``picks_0`` and so on."""
    import torch
    import transformers

    # The original goes first and is gone before the other model comes: there is never room for both.
    result: dict[str, Any] = {}
    if request.original:
        result |= original_model.compute(original_model.OriginalRequest(**request.original), progress)
    pieces = [request.tokens, *([*prompt, *ids[:-1]] for prompt, ids in request.continued)]
    places = [range(len(request.tokens))]
    places += [range(len(prompt) - 1, len(prompt) + len(ids) - 1) for prompt, ids in request.continued]
    logits, *following = _read(request, pieces, places, progress)
    (moved,) = _read(request, pieces[:1], places[:1], progress, moved=True)
    origin = f"transformers {transformers.__version__} and torch {torch.__version__}"
    result |= {"origin": origin, "logits": logits, "spread": difference(moved, logits)}
    return result | {f"picks_{i}": rows.argmax(-1) for i, rows in enumerate(following)}


def _read(
    request: LiveRequest,
    pieces: Sequence[Sequence[int]],
    places: Sequence[range],
    progress: Progress,
    *,
    moved: bool = False,
) -> list[np.ndarray]:
    """Return the logits [n, V] after ``places`` of each of ``pieces``, of those after the first by the ids in use;
    ``moved``: by the roundings that the request asks for.
    """
    import torch

    whole = frozenset[str]()
    while True:
        found: list[list[np.ndarray]] = [[] for _ in pieces]
        with loaded(request, progress, whole) as (model, used, groups), torch.inference_mode():
            with ExitStack() as stack:
                if moved:
                    stack.enter_context(rounding.rounded(model, request.arithmetic, groups))
                if moved and request.int8_cache:
                    stack.enter_context(rounding.cache_in_bytes(model))
                for number, _, rows in lending.logits(model, pieces, places):
                    found[number].append(rows[:, : request.active_vocab_size if number else None].numpy())
            passed_by = frozenset(lending.owners(model)) - used - whole
        if not passed_by:
            return [np.concatenate(each) for each in found]
        whole |= passed_by  # some part may compute with them by itself: they are there all the time, then


@contextmanager
def loaded(
    request: LiveRequest, progress: Progress = lambda *_: None, whole: frozenset[str] = frozenset()
) -> Iterator[tuple[Any, set[str], Mapping[str, int]]]:
    """Yield transformers' model in float32 with the weights that the bundle holds, dequantized while a module uses
    them or, of the modules ``whole``, once; the names of the modules that have computed; and the groups in which the
    layers of the weights by name read int8 activations (:attr:`~stages.verification.weights.Rows.group`).
    """
    import torch
    import transformers

    registry = json.loads(Path(request.params).read_text("utf-8"))
    records = tensor_cache.records(Folder(Path(request.bundle)))  # verify has checked them
    family, config = described(json.loads(Path(request.config).read_text("utf-8")))
    name, keywords, state = family.to_reference(config, weights.by_name(registry, records))
    cls = getattr(transformers, name)
    with hollow.parameters_without_memory():
        model = cls(cls.config_class(**keywords, attn_implementation="eager", experts_implementation="eager")).eval()
    model.tie_weights()
    hollow.spread(model)
    divisors = _rescaled(model)

    def values(name: str) -> Any:
        array = state[name].values()
        return torch.from_numpy(array / np.float32(divisors[name]) if name in divisors else array)

    _check_names(model, state)
    model.load_state_dict({name: values(name) for name, _ in model.named_buffers() if name in state}, strict=False)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name.rpartition(".")[0] in whole:
            parameter.data = values(name)

    def tell(done: int, total: int) -> None:
        progress(done, total, "modules of the reference")

    with lending.lent(model, lambda name, _: values(name), progress=tell) as used:
        yield model, used, {name: rows.group for name, rows in state.items()}


def _check_names(model: Any, state: Mapping[str, weights.Rows]) -> None:
    """Refuse a state that is not, name by name and shape by shape, what the model has."""
    wanted = {name: tuple(each.shape) for name, each in model.named_parameters(remove_duplicate=False)}
    wanted |= {name: tuple(each.shape) for name, each in model.named_buffers() if name in state}
    found = {name: each.shape for name, each in state.items()}
    if names := [name for name in sorted(wanted.keys() | found.keys()) if wanted.get(name) != found.get(name)]:
        text = ", ".join(f"{name} (bundle {found.get(name)}, model {wanted.get(name)})" for name in names[:3])
        raise apart.LiveError(f"transformers' {type(model).__name__} has different parameters: {text}")


def _rescaled(model: Any) -> dict[str, int]:
    """Return by what some parameters are divided: RWKV's are, in place, when the model first computes, and what it
    makes of them is halved as often; what is lent must be so from the beginning.
    """
    every = getattr(model.config, "rescale_every", 0)
    if not every:
        return {}
    body = getattr(model, model.base_model_prefix)
    body.layers_are_rescaled = True
    names = ("attention.output.weight", "feed_forward.value.weight")
    prefix = f"{model.base_model_prefix}.blocks"
    return {f"{prefix}.{i}.{name}": 2 ** (i // every) for i in range(len(body.blocks)) for name in names}


def main(request_path: str, result_path: str) -> None:
    """Compute the request in the one file into the other."""
    request = LiveRequest(**json.loads(Path(request_path).read_text("utf-8")))
    np.savez(result_path, **compute(request, apart.say))


if __name__ == "__main__":
    main(*sys.argv[1:])
