"""Maps tensors of checkpoints written by earlier versions of transformers to the names and shapes of today.

transformers 5 stacks the matrices of a mixture's experts when it loads a checkpoint that has them one by one, and saves
them one by one again; some models' projections are one tensor there. The way back, which is its own, is taken with
numbered rows: where they come out says all.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from stages.documents.files import JsonObject


# Part of a layer -> in which of its two layers an older checkpoint has it, and under which name.
PAIRS = {"self_attn": (0, "mixer"), "mlp": (1, "mixer"), "lambda_1": (0, "attn_alpha"), "lambda_2": (1, "mlp_alpha")}


def forms(model: Any, names: Iterable[str]) -> dict[str, JsonObject]:
    """Return those of the ``names`` of the state dict that an older checkpoint has otherwise -> ``sources``, the names
    of its tensors, and their ``shapes``; ``shape``, which they have when they lie one under the other; ``rows``, from
    one to another, where they are only those of a tensor that several share; ``others``, the names of the sources in
    another older form, where there are two.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import LayerPairCollapse, PrefixChange

    conversions = get_model_conversion_mapping(model, add_legacy=False)
    model._weight_conversions = [each for each in conversions if not isinstance(each, PrefixChange)]  # noqa: SLF001
    if not model._weight_conversions:  # noqa: SLF001
        return {}
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found: dict[str, JsonObject] = {}
    sharing: dict[str, list[str]] = defaultdict(list)
    for name in names:
        if form := _form(model, name, shapes[name]) if name in shapes else None:
            found[name] = form
            sharing[form["sources"][0]].append(name)
    for source, shared in sharing.items():
        if len(shared) > 1:  # each had all of it to itself
            found = {name: form for name, form in found.items() if name not in shared}
            found |= _parts(model, source, {name: shapes[name] for name in shared})
    if any(isinstance(each, LayerPairCollapse) for each in conversions):
        found = {name: {**form, "others": [*map(_in_pairs, form["sources"])]} for name, form in found.items()}
    return found


def _in_pairs(name: str) -> str:
    """Return the name of a tensor where attention and MLP of a layer are two layers, which transformers reads and does
    not write.
    """

    def pair(match: re.Match[str]) -> str:
        after, part = PAIRS[match[2]]
        return f"layers.{2 * int(match[1]) + after}.{part}"

    return re.sub(rf"\blayers\.(\d+)\.({'|'.join(PAIRS)})(?=\.|$)", pair, name)


def _form(model: Any, name: str, shape: tuple[int, ...]) -> JsonObject | None:
    import torch

    outer = shape[:-1] or shape
    width = shape[len(outer) :]
    old = _reverted(model, {name: torch.arange(math.prod(outer)).reshape(*outer, *(1 for _ in width))})
    in_order = dict(sorted(old.items(), key=lambda item: int(item[1].flatten()[0])))
    flat = torch.cat([part.flatten() for part in in_order.values()]) if old else torch.zeros(0)
    whole = len(flat) == math.prod(outer) and bool((flat == torch.arange(len(flat))).all())
    if not whole or list(in_order) == [name]:
        return None
    cut = [(*part.shape[: part.dim() - len(width)], *width) for part in in_order.values()]
    return {"sources": [*in_order], "shapes": [[*each] for each in cut], "shape": [*shape], "rows": []}


def _parts(model: Any, source: str, shapes: Mapping[str, Sequence[int]]) -> dict[str, dict[str, Any]]:
    """Return the forms of tensors that are one after the other in the tensor ``source``, whichever comes first."""
    import torch

    numbered, at = {}, 0
    for name, shape in shapes.items():
        numbered[name] = torch.arange(at, at + shape[0]).reshape(-1, *(1 for _ in shape[1:]))
        at += shape[0]
    old = _reverted(model, numbered)
    flat = old[source].flatten().tolist() if [*old] == [source] else []
    found = {}
    for name, rows in numbered.items():
        first, count = int(rows.flatten()[0]), len(rows)
        start = flat.index(first) if first in flat else -1
        if len(flat) != at or flat[start : start + count] != [*range(first, first + count)]:
            return {}
        whole, shape = [at, *shapes[name][1:]], [*shapes[name]]
        found[name] = {"sources": [source], "shapes": [whole], "shape": shape, "rows": [start, start + count]}
    return found


def _reverted(model: Any, tensors: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what an older checkpoint has of ``tensors``; nothing where a conversion wants more than them, and the
    checkpoint must have the new form.
    """
    from transformers.core_model_loading import revert_weight_conversion

    try:
        old: Mapping[str, Any] = revert_weight_conversion(model, dict(tensors))
    except Exception:  # noqa: BLE001 - whatever a conversion raises
        return {}
    return old
