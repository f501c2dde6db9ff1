"""prefill, batch_prefill, batch_verify: read a chunk of tokens into the KV cache, return logits of some or of all."""

from __future__ import annotations

import tvm
from tvm import te
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op
from tvm.relax.frontend.nn.llm.kv_cache import PagedKVCache

from stages.graph.export import Build, export_prefill
from stages.graph.trunk import hidden_states
from stages.models.layers import CausalLM
from stages.models.matrices import take


class Prefill(nn.Module):
    """The exported functions; see docs/abi.md for their convention."""

    def __init__(self, model: CausalLM) -> None:
        self.model = model

    def prefill(self, states: Tensor, cache: PagedKVCache) -> tuple[Tensor, PagedKVCache]:
        """Read one sequence's chunk; return the logits [1, 1, V] of its last token."""
        hidden = op.tensor_expr_op(_last, "last_token", [hidden_states(self.model, states, cache)])
        return self.model.logits(hidden), cache

    def batch_prefill(
        self, states: Tensor, logit_positions: Tensor, cache: PagedKVCache
    ) -> tuple[Tensor, PagedKVCache]:
        """Read chunks of several sequences laid end to end; return the logits [1, b, V] at ``logit_positions``."""
        hidden = take(hidden_states(self.model, states, cache), logit_positions, axis=1)
        return self.model.logits(hidden), cache

    def batch_verify(self, states: Tensor, cache: PagedKVCache) -> tuple[Tensor, PagedKVCache]:
        """Read chunks of several sequences laid end to end; return the logits [1, s, V] of every token."""
        return self.model.logits(hidden_states(self.model, states, cache)), cache


def _last(x: te.Tensor) -> te.Tensor:
    batch, seq, width = x.shape
    return te.compute((batch, 1, width), lambda b, _, k: x[b, seq - 1, k], name="last_token")


def export(build: Build) -> tvm.IRModule:
    """Return the module of ``prefill``, ``batch_prefill`` and ``batch_verify``."""
    every = {"states": build.states([1, "verify_len"]), "cache": build.cache}
    return export_prefill(build, Prefill, build.cache, batch_verify=every)
