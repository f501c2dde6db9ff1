"""What checkpoints written for earlier versions of transformers call the tensors of its models, and how they cut them.

transformers 5 stacks the matrices of a mixture's experts when it loads a checkpoint that has them one by one, and saves
them one by one again. The way back, which is its own, is taken with numbered rows: where they come out says all.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


def forms(model: Any, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return those of the ``names`` of the state dict that an older checkpoint has otherwise -> ``sources``, the names
    of its tensors, and their ``shapes``; ``shape``, which they have when they lie one under the other.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange

    conversions = get_model_conversion_mapping(model, add_legacy=False)
    model._weight_conversions = [each for each in conversions if not isinstance(each, PrefixChange)]  # noqa: SLF001
    if not model._weight_conversions:  # noqa: SLF001
        return {}
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = ((name, _form(model, name, shapes[name])) for name in names if name in shapes)
    return {name: form for name, form in found if form}


def _form(model: Any, name: str, shape: tuple[int, ...]) -> dict[str, Any] | None:
    import torch
    from transformers.core_model_loading import revert_weight_conversion

    outer = shape[:-1] or shape
    width = shape[len(outer) :]
    rows = torch.arange(math.prod(outer)).reshape(*outer, *(1 for _ in width))
    try:
        old: Mapping[str, Any] = revert_weight_conversion(model, {name: rows})
    except Exception:  # noqa: BLE001 - a conversion that wants more than rows: the checkpoint must have the new form
        return None
    in_order = dict(sorted(old.items(), key=lambda item: int(item[1].flatten()[0])))
    flat = torch.cat([part.flatten() for part in in_order.values()])
    whole = len(flat) == rows.numel() and bool((flat == torch.arange(len(flat))).all())
    if not whole or list(in_order) == [name]:
        return None
    cut = [(*part.shape[: part.dim() - len(width)], *width) for part in in_order.values()]
    return {"sources": [*in_order], "shapes": [[*each] for each in cut], "shape": [*shape]}
