"""The exported functions of a hybrid model, which has a KV cache and a recurrent state."""

from __future__ import annotations

from typing import Any

import tvm
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op
from tvm.relax.frontend.nn.llm.kv_cache import PagedKVCache

from stages.graph import kv, recurrent_state
from stages.graph.export import Build, export_model, tensor
from stages.graph.recurrent_trunk import STATE, row_numbers
from stages.models.matrices import take
from stages.models.rwkv_layers import RecurrentState

Logits = tuple[Tensor, PagedKVCache, RecurrentState]


class Hybrid(nn.Module):
    """The exported functions; see docs/abi.md for their convention."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def prefill(self, states: Tensor, cache: PagedKVCache, state: RecurrentState) -> Logits:
        """Read one sequence's chunk; return the logits [1, 1, V] of its last token."""
        tokens = states.shape[1]
        return self._logits(states, cache, state, row_numbers(tokens - 1, tokens), (1, 1))

    def batch_prefill(
        self, states: Tensor, logit_positions: Tensor, cache: PagedKVCache, state: RecurrentState
    ) -> Logits:
        """Read chunks of several sequences laid end to end, which ``logit_positions`` are the last tokens of; return
        the logits [1, b, V] there.
        """
        return self._logits(states, cache, state, logit_positions, (1, logit_positions.shape[0]))

    def decode(self, states: Tensor, cache: PagedKVCache, state: RecurrentState) -> Logits:
        """Read one token of one sequence; return its logits [1, 1, V]."""
        return self._logits(states, cache, state, row_numbers(0, 1), (1, 1))

    def batch_decode(self, states: Tensor, cache: PagedKVCache, state: RecurrentState) -> Logits:
        """Read one token of each of b sequences; return their logits [b, 1, V]."""
        batch = states.shape[0]
        return self._logits(states, cache, state, row_numbers(0, batch), (batch, 1))

    def _logits(self, states: Tensor, cache: PagedKVCache, state: RecurrentState, ends: Tensor, shape: Any) -> Logits:
        rows = states.shape[0] * states.shape[1]
        if len(states.shape) == 2:
            states = self.model.embed(op.reshape(states, (rows,)))
        hidden, state = self.model.hidden_kept(op.reshape(states, (1, rows, states.shape[-1])), cache, state, ends)
        logits = self.model.logits(take(hidden, ends, axis=1))
        return op.reshape(logits, (*shape, logits.shape[-1])), cache, state


def export_prefill(build: Build) -> tvm.IRModule:
    """Return the module of ``prefill`` and ``batch_prefill``."""
    states, stores = build.states([1, "seq_len"]), {"cache": build.cache, "state": STATE}
    positions = tensor(["batch_size"], "int32")
    spec = {
        "prefill": {"states": states, **stores},
        "batch_prefill": {"states": states, "logit_positions": positions, **stores},
    }
    return export_model(build, Hybrid, spec)


def export_decode(build: Build) -> tvm.IRModule:
    """Return the module of ``decode`` and ``batch_decode``."""
    stores = {"cache": build.cache, "state": STATE}
    spec = {
        "decode": {"states": build.states([1, 1]), **stores},
        "batch_decode": {"states": build.states(["batch_size", 1]), **stores},
    }
    return export_model(build, Hybrid, spec)


def export_state(build: Build) -> tvm.IRModule:
    """Return the module of ``create_tir_paged_kv_cache`` and ``create_rnn_state``, and the kernels of both."""
    module = kv.export(build)
    module.update(recurrent_state.export(build))
    return module
