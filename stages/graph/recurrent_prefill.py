"""prefill and batch_prefill of a recurrent model: read a chunk of tokens into the state, return the last logits."""

from __future__ import annotations

import tvm
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op

from stages.graph.export import Build, export_prefill
from stages.graph.recurrent_trunk import STATE, logits, row_numbers
from stages.models.rwkv_layers import RecurrentLM, RecurrentState


class RecurrentPrefill(nn.Module):
    """The exported functions; see docs/abi.md for their convention."""

    def __init__(self, model: RecurrentLM) -> None:
        self.model = model

    def prefill(self, states: Tensor, cache: RecurrentState) -> tuple[Tensor, RecurrentState]:
        """Read one sequence's chunk; return the logits [1, 1, V] of its last token."""
        found, cache = logits(self.model, states, cache, row_numbers(states.shape[1] - 1, states.shape[1]))
        return op.reshape(found, (1, 1, found.shape[-1])), cache

    def batch_prefill(
        self, states: Tensor, logit_positions: Tensor, cache: RecurrentState
    ) -> tuple[Tensor, RecurrentState]:
        """Read chunks of several sequences laid end to end, which ``logit_positions`` are the last tokens of; return
        the logits [1, b, V] there.
        """
        found, cache = logits(self.model, states, cache, logit_positions)
        return op.reshape(found, (1, *found.shape)), cache


def export(build: Build) -> tvm.IRModule:
    """Return the module of ``prefill`` and ``batch_prefill``."""
    return export_prefill(build, RecurrentPrefill, STATE)
