"""Sizes of operators that stand for whole layers, of the shapes that they read: of sizes, {"tokens": 1} among them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

TOKENS = {"tokens": 1}


def attention_sizes(q: Sequence[Any], k: Sequence[Any], v: Sequence[Any]) -> dict[str, Any] | None:
    """Return the sizes of an attention, None where not one whole sequence after another is read."""
    if any(shape[0] != 1 or shape[2] != TOKENS for shape in (q, k, v)):
        return None
    return {"heads": q[1], "kv_heads": k[1], "width": q[3], "value_width": v[3]}


def state_sizes(name: str, shapes: Sequence[Sequence[Any]]) -> dict[str, Any] | None:
    """Return the sizes of an operator that keeps a state of a sequence, None where that is not of one batch."""
    along = 2 if name in ("causal_conv", "selective_scan") else 1
    if any(len(shape) > 2 and (shape[0] != 1 or shape[along] != TOKENS) for shape in shapes):
        return None
    first = shapes[0]
    sizes: dict[str, Callable[[], dict[str, Any]]] = {
        "causal_conv": lambda: {"channels": first[1], "taps": shapes[1][1]},
        "ssm_scan": lambda: {"heads": first[2], "width": first[3], "groups": shapes[3][2], "size": shapes[3][3]},
        "selective_scan": lambda: {"channels": first[1], "size": shapes[2][1]},
        "linear_scan": lambda: {"channels": first[2]},
        "delta_rule": lambda: {
            **dict(zip(("heads", "width", "key_heads", "size"), (*shapes[2][2:], *first[2:]), strict=True)),
            "rates": shapes[3][3] if len(shapes[3]) == 4 else 1,
        },
        "choose": lambda: {"heads": first[2], "size": first[3]},
    }
    return sizes[name]()
