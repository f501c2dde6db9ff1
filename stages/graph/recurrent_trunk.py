"""Shared by prefill and decode of a recurrent model: argument specs, and the computation of logits."""

from __future__ import annotations

from typing import Any

from tvm import relax as rx
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op

from stages.models.rwkv_layers import RecurrentLM, RecurrentState

STATE = nn.spec.Object(object_type=RecurrentState)


def row_numbers(first: Any, end: Any) -> Tensor:
    """Return int32 [end - first]: the numbers from ``first`` up to ``end``, exclusive."""
    return op.wrap_nested(rx.op.arange(first, end, dtype="int32"), "rows")


def logits(model: RecurrentLM, tokens: Tensor, state: RecurrentState, ends: Tensor) -> tuple[Tensor, RecurrentState]:
    """Embeddings [b, s, h], or ids int32 [b, s] if embedding is inside -> logits [n, V] of the rows ``ends`` int32 [n].

    All tokens are rows of one batch, those of a sequence in a row; a sequence ends at each of ``ends``.
    """
    rows = tokens.shape[0] * tokens.shape[1]
    if len(tokens.shape) == 2:
        embedded = model.embed(op.reshape(tokens, (rows,)))
    else:
        embedded = op.reshape(tokens, (rows, tokens.shape[-1]))
    hidden, state = model.hidden(embedded, state, ends)
    return model.logits(hidden), state
