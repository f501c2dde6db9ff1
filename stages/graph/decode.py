"""decode and batch_decode: one more token for one or several sequences."""

from __future__ import annotations

import tvm
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op
from tvm.relax.frontend.nn.llm.kv_cache import PagedKVCache

from stages.graph.export import Build, export_decode
from stages.graph.trunk import hidden_states
from stages.models.layers import CausalLM


class Decode(nn.Module):
    """The exported functions; see docs/abi.md for their convention."""

    def __init__(self, model: CausalLM) -> None:
        self.model = model

    def decode(self, states: Tensor, cache: PagedKVCache) -> tuple[Tensor, PagedKVCache]:
        """Read one token of one sequence; return its logits [1, 1, V]."""
        return self._logits(states, cache), cache

    def batch_decode(self, states: Tensor, cache: PagedKVCache) -> tuple[Tensor, PagedKVCache]:
        """Read one token of each of b sequences; return their logits [b, 1, V]."""
        return self._logits(states, cache), cache

    def _logits(self, states: Tensor, cache: PagedKVCache) -> Tensor:
        logits = self.model.logits(hidden_states(self.model, states, cache))
        return op.reshape(logits, (states.shape[0], 1, logits.shape[-1]))


def export(build: Build) -> tvm.IRModule:
    """Return the module of ``decode`` and ``batch_decode``."""
    return export_decode(build, Decode, build.cache)
