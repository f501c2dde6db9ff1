"""Measures on the original model the loss by quantizing each tensor alone, and by other schemes.

A tensor's part is the divergence where it alone is quantized; a scheme is tried by quantizing every matrix that it
takes, while it is used. This runs as ``python -m stages.verification.advice``, and only for bundles that are refused
(:mod:`stages.verification.refusal`).
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from stages.quantization import layouts
from stages.quantization.parameter import quantize, restored
from stages.quantization.rows import Row
from stages.quantization.schemes import SCHEMES
from stages.verification import apart, gates, original, rounding, streaming
from stages.verification.loss import Loss, Places

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from stages.documents.files import JsonObject
    from stages.documents.params import StoredRow
    from stages.quantization.schemes import Scheme
    from stages.verification.apart import Progress

TENSOR_TOKENS, SCHEME_TOKENS = 48, 256  # that a tensor, and a scheme, is judged by
TOGETHER = 16  # tensors that are judged in one pass, each in a sequence of its own
INT8 = "int8"  # arithmetic of activations
Matrices = dict[str, tuple[str, list[Any]]]  # name -> linear, embedding or head, and the modules that have it


@dataclass(frozen=True)
class AdviceRequest:
    """What is asked: the ``original``'s own request, the ``scheme`` whose tensors are judged, in the ``rows`` in which
    they are stored (null: as floats) and by how their ``scales`` are chosen, the ``candidates`` among other schemes,
    each with the arithmetic of activations, of which the first within the user's ``limits`` is the last that is tried,
    and the tensors that need not be judged because they are ``known``. With ``activations``, layers are judged as well,
    by what int8 activations cost where one alone reads them.
    """

    original: JsonObject
    scheme: str
    scales: str
    candidates: Sequence[tuple[str, str]]
    limits: Mapping[str, float]
    known: Sequence[str] = ()
    activations: bool = False
    rows: Mapping[str, StoredRow | None] = field(default_factory=dict)


def compute(request: AdviceRequest, progress: Progress) -> JsonObject:
    """Return ``names`` and ``kl`` of the tensors, ``layers`` and ``layer_kl`` of those, and as JSON the figures of each
    candidate ``tried``, in order.
    """
    import torch

    original_request = original.OriginalRequest(**request.original)
    mapped, model, _ = streaming.load(
        original_request.root, original_request.files, original_request.config, original_request.scratch
    )
    piece = torch.tensor(original_request.pieces[0][: SCHEME_TOKENS + 1])
    scheme, matrices = SCHEMES[request.scheme], matrices_of(model)
    rows = rows_of(matrices, scheme, request.rows)
    judged = {name: row for name, row in rows.items() if row and name not in request.known}
    groups = byte_groups(model, matrices, rows, scheme) if request.activations else {}
    alone = [storing_one(matrices[name][1], row, request.scales) for name, row in judged.items()]
    alone += [_reading_bytes([model.get_submodule(name)], group) for name, group in groups.items()]
    batches = [alone[start : start + TOGETHER] for start in range(0, len(alone), TOGETHER)]
    total = 1 + len(batches) + len(request.candidates)
    with torch.inference_mode(), streaming.weights_in_float32(model, mapped):
        wanted = log_probs(model, piece[None, :-1])[0]
        progress(1, total, "passes for advice")
    with torch.inference_mode():
        divergences, short = [], piece[:-1][:TENSOR_TOKENS]
        here = wanted[: len(short)]
        for done, chosen in enumerate(batches, start=2):
            with each_alone(chosen), streaming.weights_in_float32(model, mapped):
                found = log_probs(model, short[None].expand(len(chosen), -1))
            divergences += divergence(here, found).mean(-1).tolist()
            progress(done, total, "passes for advice")
        tried: list[Loss] = []
        for done, (name, arithmetic) in enumerate(request.candidates, start=2 + len(batches)):
            with (
                streaming.weights_in_float32(model, mapped),
                changed(matrices, _storing(SCHEMES[name], matrices)),
                rounding.rounded(model, INT8, _byte_weights(model, matrices, SCHEMES[name]))
                if arithmetic == INT8
                else nullcontext(),
            ):
                found = log_probs(model, piece[None, :-1])[0]
            progress(done, total, "passes for advice")
            tried.append(figures_of(wanted, found, piece[1:]))
            if passes(name, arithmetic, tried[-1], request.limits):
                break
    return {
        "names": np.array([*judged]),
        "kl": np.array(divergences[: len(judged)]),
        "layers": np.array([*groups]),
        "layer_kl": np.array(divergences[len(judged) :]),
        "tried": json.dumps([vars(each) for each in tried]),
    }


def passes(scheme: str, arithmetic: str, figures: Loss, own: Mapping[str, float]) -> bool:
    """Say whether a bundle of these figures would be within its limits, the user's ``own`` among them."""
    limits = gates.limits(SCHEMES[scheme], arithmetic, own)
    return all(check.ok for check in gates.check(figures, limits))


def matrices_of(model: Any) -> Matrices:
    """Return what every matrix is (linear, embedding, head) and the modules that have it; a tied one has two."""
    import torch

    head = model.get_output_embeddings()
    owners: dict[int, list[Any]] = defaultdict(list)
    for module in model.modules():
        if type(module) in (torch.nn.Linear, torch.nn.Embedding):
            owners[id(module.weight)].append(module)
    found = {}
    for name, parameter in model.named_parameters():
        modules = owners.get(id(parameter), [])
        embedding = any(type(module) is torch.nn.Embedding for module in modules)
        if modules:
            found[name] = "embedding" if embedding else "head" if head in modules else "linear", modules
    return found


def rows_of(
    matrices: Matrices, scheme: Scheme, own: Mapping[str, StoredRow | None] = MappingProxyType({})
) -> dict[str, Row | None]:
    """Return the row of each matrix by ``scheme``, but of those that are in ``own`` the one there; None for floats."""
    found = {}
    for name, (kind, modules) in matrices.items():
        row = own.get(name)
        found[name] = (Row(**row) if row else None) if name in own else scheme.row(kind, modules[0].weight.shape[1])
    return found


def byte_groups(model: Any, matrices: Matrices, rows: Mapping[str, Row | None], scheme: Scheme) -> dict[str, int]:
    """Return in groups of how many values each layer, by name, reads int8 activations once it is stored in its row;
    layers that read floats are left out.
    """
    import torch

    places = {id(module): (kind, rows[name]) for name, (kind, modules) in matrices.items() for module in modules}
    found = {}
    for name, module in model.named_modules():
        if type(module) is torch.nn.Linear and id(module) in places:
            k = module.weight.shape[1]
            kind, row = places[id(module)]
            direct = layouts.of("n32", kind, scheme, row, scheme.storage_dtype, k) == "n32"
            if row and direct:
                found[name] = row.group_size
    return found


def _byte_weights(model: Any, matrices: Matrices, scheme: Scheme) -> dict[str, int]:
    groups = byte_groups(model, matrices, rows_of(matrices, scheme), scheme)
    return {f"{name}.weight": group for name, group in groups.items()}


def log_probs(model: Any, ids: Any) -> Any:
    """Return the log probabilities float32 [b, n, V] of the next token after each of ``ids`` [b, n]."""
    return model(ids, use_cache=False).logits.float().log_softmax(-1)


def stored(weight: Any, row: Row, scales: str) -> Any:
    """Return the float32 values of ``weight`` [n, k] after quantization in ``row``."""
    import torch

    array = weight.numpy()
    return torch.from_numpy(restored(quantize(array, row, scales), row, array.shape[1]))


def _storing(scheme: Scheme, matrices: Matrices) -> Callable[[Any, str], Any]:
    import torch

    rows, dtype = rows_of(matrices, scheme), getattr(torch, scheme.storage_dtype)

    def change(weight: Any, name: str) -> Any:
        row = rows[name]
        return stored(weight, row, scheme.scales) if row else weight.to(dtype).float()

    return change


Alone = tuple["Sequence[Any]", "Callable[[Any, Any], Any]"]  # modules, and what one of them makes of its inputs


def storing_one(modules: Sequence[Any], row: Row, scales: str) -> Alone:
    """Return what modules do with a weight that is stored in ``row``."""
    import torch

    def compute(module: Any, x: Any) -> Any:
        weight = stored(module.weight.data, row, scales)
        is_table = type(module) is torch.nn.Embedding
        return weight[x] if is_table else torch.nn.functional.linear(x, weight, module.bias)

    return modules, compute


def _reading_bytes(modules: Sequence[Any], group: int) -> Alone:
    """Return what modules do with int8 activations."""
    import torch

    def compute(module: Any, x: Any) -> Any:
        return torch.nn.functional.linear(rounding.in_bytes(x, group), module.weight.data, module.bias)

    return modules, compute


@contextmanager
def each_alone(chosen: Sequence[Alone], sequences: int = 1) -> Iterator[None]:
    """Let the i-th ``sequences`` of a batch see what the modules of the i-th of ``chosen`` compute, and no others."""

    def hook(rows: slice, compute: Callable[[Any, Any], Any]) -> Any:
        def after(module: Any, inputs: Any, output: Any) -> Any:
            output[rows] = compute(module, inputs[0][rows])
            return output

        return after

    hooks = [
        module.register_forward_hook(hook(slice(sequences * i, sequences * (i + 1)), compute))
        for i, (modules, compute) in enumerate(chosen)
        for module in modules
    ]
    try:
        yield
    finally:
        for each in hooks:
            each.remove()


@contextmanager
def changed(matrices: Matrices, change: Callable[[Any, str], Any]) -> Iterator[None]:
    """Let every matrix be ``change(weight, name)``, float32 [n, k], while it is used."""

    def hook(name: str) -> Any:
        def before(module: Any, _inputs: Any) -> None:
            module.weight.data = change(module.weight.data, name)

        return before

    hooks = [
        module.register_forward_pre_hook(hook(name)) for name, (_, modules) in matrices.items() for module in modules
    ]
    try:
        yield
    finally:
        for each in hooks:
            each.remove()


def divergence(wanted: Any, found: Any) -> Any:
    """Return the divergence of log probabilities [..., V], in nats; tokens of probability 0 contribute nothing."""
    p = wanted.exp()
    return (p * (wanted - found)).where(p > 0, 0.0).sum(-1)


def figures_of(wanted: Any, found: Any, following: Any) -> Loss:
    """Return the figures of log probabilities ``found`` [n, V] against ``wanted``, exactly: nothing is summed up."""
    kl = divergence(wanted, found)
    same = wanted.argmax(-1) == found.argmax(-1)
    columns = [rows.gather(-1, following[:, None])[:, 0].double().numpy() for rows in (found, wanted)]
    return Places(kl.double().numpy(), same.numpy(), *columns).figures()


def main(request_path: str, result_path: str) -> None:
    """Compute the request in the one file into the other."""
    request = AdviceRequest(**json.loads(Path(request_path).read_text("utf-8")))
    np.savez(result_path, **compute(request, apart.say))


if __name__ == "__main__":
    main(*sys.argv[1:])
