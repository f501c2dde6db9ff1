"""For a bundle that quantization cost too much: which tensors cost most, and which scheme would not.

Both are measured on the original model. A tensor's part is the divergence where it alone is quantized; a scheme is
tried by quantizing every matrix that it takes, while it is used. This runs as ``python -m stages.verification.advice``,
and only for bundles that are refused.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stages.quantization import float8, group
from stages.quantization.parameter import restored
from stages.quantization.schemes import SCHEMES
from stages.verification import apart, gates, original
from stages.verification.loss import Loss, Places

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from stages.quantization.schemes import Scheme
    from stages.verification.apart import Progress
    from stages.verification.case import Case

# Schemes to change to, the smallest first.
CANDIDATES = ("q4f16_2", "q8f16_1", "q0f16", "q0f32")
TENSOR_TOKENS, SCHEME_TOKENS = 48, 256  # that a tensor, and a scheme, is judged by
TOGETHER = 16  # tensors that are judged in one pass, each in a sequence of its own
NAMED = 3  # of the worst tensors, in a message


@dataclass(frozen=True)
class Request:
    """What is asked: the ``original``'s own request, the ``scheme`` whose tensors are judged and how its ``scales`` are
    chosen, the ``candidates`` among other schemes, and the user's ``limits``.
    """

    original: Mapping[str, Any]
    scheme: str
    scales: str
    arithmetic: str
    candidates: Sequence[str]
    limits: Mapping[str, float]


def ask(case: Case, progress: Progress) -> list[str]:
    """Return what there is to say, each a sentence."""
    scheme = SCHEMES[case.registry["scheme"]]
    candidates = [name for name in CANDIDATES if _keeps_more(SCHEMES[name], scheme)]
    request = Request(asdict(case.original), scheme.name, case.scales, case.arithmetic, candidates, case.limits)
    found = apart.call(__name__, asdict(request), progress)
    worst = sorted(zip(found["kl"].tolist(), found["names"].tolist(), strict=True), reverse=True)[:NAMED]
    said = []
    if worst:
        named = ", ".join(f"{name} ({kl:.2g})" for kl, name in worst)
        said.append(f"these tensors cost most where they alone are quantized (KL of {TENSOR_TOKENS} tokens): {named}")
    if str(found["passing"]):
        figures = f"KL {float(found['passing_kl']):.2g}, {float(found['passing_top1']):.0%} equal first choices"
        said.append(
            f"{found['passing']} would pass ({figures} on {SCHEME_TOKENS} tokens): take it as scheme, or allow more by "
            "max_kl, min_top1 and max_ppl_ratio of verify"
        )
    return said


def _keeps_more(one: Scheme, other: Scheme) -> bool:
    return (one.bits, not one.quantize_embedding) > (other.bits, not other.quantize_embedding)


def compute(request: Request, progress: Progress) -> dict[str, Any]:
    """Return ``names`` and ``kl`` of the tensors, and the first scheme ``passing``, empty if none does."""
    import torch

    asked = original.Request(**request.original)
    mapped, model, _ = original.load(asked)
    piece = torch.tensor(asked.pieces[0][: SCHEME_TOKENS + 1])
    with torch.inference_mode():
        tensors = _matrices(model, SCHEMES[request.scheme])
        total = -(-len(tensors) // TOGETHER) + 1 + len(request.candidates)
        with original.weights_in_float32(model, mapped):
            wanted = _log_probs(model, piece[None, :-1])[0]
        progress(1, total, "passes for advice")
        names, divergences = list(tensors), []
        short = piece[:-1][:TENSOR_TOKENS]
        for start in range(0, len(names), TOGETHER):
            chosen = names[start : start + TOGETHER]
            with (
                _each_alone(tensors, chosen, SCHEMES[request.scheme], request.scales),
                original.weights_in_float32(model, mapped),
            ):
                found = _log_probs(model, short[None].expand(len(chosen), -1))
            here = wanted[: len(short)]
            divergences += (here.exp() * (here - found)).sum(-1).mean(-1).tolist()
            progress(2 + start // TOGETHER, total, "passes for advice")
        result: dict[str, Any] = {"names": np.array(names), "kl": np.array(divergences), "passing": ""}
        for number, name in enumerate(request.candidates, start=1):
            with original.weights_in_float32(model, mapped), _all(_matrices(model, SCHEMES[name]), SCHEMES[name]):
                figures = _figures(wanted, _log_probs(model, piece[None, :-1])[0], piece[1:])
            progress(total - len(request.candidates) + number, total, "passes for advice")
            limits = gates.limits(SCHEMES[name], request.arithmetic, request.limits)
            if all(check.ok for check in gates.check(figures, limits)):
                result |= {"passing": name, "passing_kl": figures.kl_mean, "passing_top1": figures.top1}
                break
    return result


def _matrices(model: Any, scheme: Scheme) -> dict[str, list[Any]]:
    """Return the modules of every matrix that ``scheme`` quantizes, by the name of the matrix; a tied one has two."""
    import torch

    head = model.get_output_embeddings()
    kinds = {torch.nn.Linear: "linear", torch.nn.Embedding: "embedding"}
    owners: dict[int, list[Any]] = defaultdict(list)
    for module in model.modules():
        if type(module) in kinds:
            owners[id(module.weight)].append(module)
    found = {}
    for name, parameter in model.named_parameters():
        modules = owners.get(id(parameter), [])
        embedding = any(type(module) is torch.nn.Embedding for module in modules)
        kind = "embedding" if embedding else "head" if head in modules else "linear"
        if modules and scheme.quantizes(kind):
            found[name] = modules
    return found


def _log_probs(model: Any, ids: Any) -> Any:
    return model(ids, use_cache=False).logits.float().log_softmax(-1)


def _quantized(weight: Any, scheme: Scheme, scales: str = "max") -> Any:
    """Return what is left of a float32 ``weight`` [n, k] once ``scheme`` has stored it."""
    import torch

    array = weight.numpy()
    stored = float8.quantize(array) if scheme.kind == "tensor" else group.quantize(array, scheme, scales)
    return torch.from_numpy(restored(stored, scheme, array.shape[1]))


@contextmanager
def _each_alone(tensors: Mapping[str, list[Any]], chosen: Sequence[str], scheme: Scheme, scales: str) -> Iterator[None]:
    """Let sequence i of a batch see the i-th of the ``chosen`` matrices quantized, and no other one."""
    import torch

    def hook(row: int) -> Any:
        def after(module: Any, inputs: Any, output: Any) -> Any:
            weight = _quantized(module.weight.data, scheme, scales)
            here = inputs[0][row % inputs[0].shape[0]]
            if type(module) is torch.nn.Embedding:
                output[row] = weight[here]
            else:
                output[row] = torch.nn.functional.linear(here, weight, module.bias)
            return output

        return after

    hooks = [module.register_forward_hook(hook(row)) for row, name in enumerate(chosen) for module in tensors[name]]
    try:
        yield
    finally:
        for each in hooks:
            each.remove()


@contextmanager
def _all(tensors: Mapping[str, list[Any]], scheme: Scheme) -> Iterator[None]:
    """Let every one of the matrices be quantized while it is used; the others are float32 as they are."""

    def before(module: Any, _inputs: Any) -> None:
        module.weight.data = _quantized(module.weight.data, scheme)

    hooks = [module.register_forward_pre_hook(before) for modules in tensors.values() for module in modules]
    try:
        yield
    finally:
        for each in hooks:
            each.remove()


def _figures(wanted: Any, found: Any, following: Any) -> Loss:
    """Return the figures of log probabilities ``found`` [n, V] against ``wanted``, exactly: nothing is summed up."""
    kl = (wanted.exp() * (wanted - found)).sum(-1)
    same = wanted.argmax(-1) == found.argmax(-1)
    columns = [rows.gather(-1, following[:, None])[:, 0].double().numpy() for rows in (found, wanted)]
    return Places(kl.double().numpy(), same.numpy(), *columns).figures()


def main(request_path: str, result_path: str) -> None:
    """Compute the request in the one file into the other."""
    request = Request(**json.loads(Path(request_path).read_text("utf-8")))
    np.savez(result_path, **compute(request, apart.say))


if __name__ == "__main__":
    main(*sys.argv[1:])
