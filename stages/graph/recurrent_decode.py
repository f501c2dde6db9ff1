"""decode and batch_decode of a recurrent model: one more token for one or several sequences."""

from __future__ import annotations

import tvm
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op

from stages.graph.export import Build, export_decode
from stages.graph.recurrent_trunk import STATE, logits, row_numbers
from stages.models.rwkv_layers import RecurrentLM, RecurrentState


class RecurrentDecode(nn.Module):
    """The exported functions; see docs/abi.md for their convention."""

    def __init__(self, model: RecurrentLM) -> None:
        self.model = model

    def decode(self, states: Tensor, cache: RecurrentState) -> tuple[Tensor, RecurrentState]:
        """Read one token of one sequence; return its logits [1, 1, V]."""
        return self._logits(states, cache)

    def batch_decode(self, states: Tensor, cache: RecurrentState) -> tuple[Tensor, RecurrentState]:
        """Read one token of each of b sequences; return their logits [b, 1, V]."""
        return self._logits(states, cache)

    def _logits(self, states: Tensor, cache: RecurrentState) -> tuple[Tensor, RecurrentState]:
        batch = states.shape[0]
        found, cache = logits(self.model, states, cache, row_numbers(0, batch))  # each row ends its sequence
        return op.reshape(found, (batch, 1, found.shape[-1])), cache


def export(build: Build) -> tvm.IRModule:
    """Return the module of ``decode`` and ``batch_decode``."""
    return export_decode(build, RecurrentDecode, STATE)
